"""What a job states of its data is what the model is shown: images, tokens, experts; and the answer says it."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import GRID, LLAMA, T5, TEXT
from transformers.models.llama import modeling_llama
from vramplan.dryrun.build.model_config import read_config
from vramplan.dryrun.cuda.card_facts import Card
from vramplan.dryrun.known_values import KnownValues
from vramplan.dryrun.tracker import MemoryTracker
from vramplan.errors import PlanError
from vramplan.job import read_job
from vramplan.planning.planned_job import plan_job, written
from vramplan.usecases import plan

pytestmark = pytest.mark.usefixtures("sandbox")

SQUARE = {  # images of one size
    "model_type": "llava",
    "image_token_index": 500,
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
    },
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 512,
}
LOOP = {  # experts one by one, each of the tokens that chose it
    "model_type": "dbrx",
    "architectures": ["DbrxForCausalLM"],
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 512,
    "max_seq_len": 512,
    "attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 10000.0},
    "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2, "ffn_hidden_size": 128},
}


def ask(config: dict, **fields) -> dict:
    return plan(
        {"config": config, "method": "full", "trainer": "pytorch", "sequence_length": 512, "gpu": "h100", **fields}
    )


def said(answer: dict, text: str) -> bool:
    return any(text in warning for warning in answer["warnings"])


def tower(answer: dict) -> int:
    """Bytes of activations of modules that see."""
    return sum(row["activations"] * row["count"] for row in answer["layers"] if "vis" in row["path"])


@pytest.mark.parametrize("size, tokens", [([448, 448], 256), ([224, 224], 64), ([100, 300], 44)])
def test_an_image_takes_the_tokens_that_its_processor_and_its_tower_make(size, tokens):
    """One token for 28 × 28 pixels: 4 × 11 of 100 × 300, which is rounded to 112 × 308."""
    answer = ask(GRID, image_size=size, images=1)
    assert said(answer, f"1 image of {size[0]} × {size[1]} pixels in every sequence, {tokens} of its tokens each")
    assert tower(answer) > 0


def test_the_tower_grows_with_the_images_and_text_alone_leaves_it_out():
    none, one, two = (ask(GRID, images=count, image_size=[112, 112]) for count in (0, 1, 2))
    assert said(none, "planned on text alone") and tower(none) == 0
    assert 0 < tower(one) < tower(two) and none["peak"]["allocated"] < one["peak"]["allocated"]
    assert none["model"]["parameters"] == one["model"]["parameters"]
    batch = ask(GRID, images=1, image_size=[112, 112], batch_size=2)
    assert tower(batch) == tower(two)


def test_images_of_one_size_take_what_the_config_states():
    answer = ask(SQUARE)
    assert said(answer, f"{(112 // 14) ** 2} of its tokens each") and tower(answer) > 0


def test_images_beyond_the_sequence_are_refused_or_left_out_and_said():
    with pytest.raises(PlanError, match="1 image of 448 × 448") as error:
        ask(GRID, images=1, sequence_length=128)
    assert error.value.field == "sequence_length" and "258" in error.value.hint
    assert said(ask(GRID, sequence_length=128), "takes 256 tokens, more than sequence_length leaves; 258 hold one")


def test_images_beyond_all_measure_are_refused_at_once():
    for fields in ({"images": 1000, "image_size": [8192, 8192]}, {"images": 1, "batch_size": 10_000_000}):
        with pytest.raises(PlanError, match="too many to be followed") as error:
            ask(GRID, **fields)
        assert error.value.field == "images"
    assert said(ask(GRID, batch_size=10_000), "too many to be followed. Planned on text alone")


def test_generation_is_shown_images_too():
    shown, none = (ask(GRID, method="inference", new_tokens=2, images=count) for count in (1, 0))
    assert said(none, "on text alone") and shown["peak"]["allocated"] > none["peak"]["allocated"]


def test_adapters_and_trainers_are_shown_the_same():
    lora = {"r": 4, "target_modules": "all-linear"}
    for fields in ({"method": "lora", "lora": lora}, {"method": "qlora", "lora": lora}, {"trainer": "transformers"}):
        assert tower(ask(GRID, image_size=[112, 112], **fields)) > 0


def test_experts_that_run_one_by_one_take_the_stated_routing():
    balanced, same = ask(LOOP), ask(LOOP, expert_routing="same")
    assert said(balanced, "balanced") and said(same, "same")
    assert same["peak"]["allocated"] != balanced["peak"]["allocated"]
    assert balanced["model"]["parameters"] == same["model"]["parameters"]


def test_packed_sequences_get_the_mask_that_a_real_model_makes(monkeypatch):
    """Found by their positions: a mask of tokens × tokens where one sequence has none."""
    made = []
    create = modeling_llama.create_causal_mask

    def watched(*args, **kwargs):
        made.append(create(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(modeling_llama, "create_causal_mask", watched)
    absent, packed = (ask(LLAMA, attention_mask=kind, batch_size=2) for kind in ("absent", "packed"))
    assert said(packed, "positions that start over") and not said(absent, "start over")
    assert made[0] is None and made[-1].shape == (1, 1, 1024, 1024)
    assert packed["peak"]["allocated"] > absent["peak"]["allocated"]
    ids = torch.ones(1, 1024, dtype=torch.long)
    model = transformers.AutoModelForCausalLM.from_config(read_config(LLAMA, None))
    model(ids, position_ids=torch.arange(1024).remainder(256)[None], use_cache=False)
    assert made[-1].device.type == "cpu" and (made[-1].shape, made[-1].dtype) == (made[-2].shape, made[-2].dtype)
    model(ids, position_ids=torch.arange(1024)[None], use_cache=False)
    assert made[-1] is None


def test_what_cannot_be_packed_is_told():
    classes = {**LLAMA, "architectures": ["LlamaForSequenceClassification"]}
    for config, reason in ((GRID, "by its images"), (T5, "takes no position_ids"), (classes, "answers once a row")):
        with pytest.raises(PlanError, match=reason) as error:
            ask(config, attention_mask="packed")
        assert error.value.field == "attention_mask" and "full" in error.value.hint
    assert ask(GRID, attention_mask="packed", images=0)["peak"]["allocated"] > 0


def test_sfttrainer_takes_no_model_that_cannot_generate():
    """It writes into ``model.generation_config`` (trl/trainer/sft_trainer.py), which such a model does not have."""
    with pytest.raises(PlanError, match="BertForMaskedLM has no generation_config") as error:
        ask(BERT, trainer="trl")
    assert error.value.field == "trainer"
    with pytest.raises(AttributeError, match="generation_config"):
        transformers.AutoModelForMaskedLM.from_config(read_config(BERT, None)).generation_config


def test_a_trainer_fetches_all_batches_of_a_step_first():
    """``Trainer.get_batch_samples``: ids, labels and mask of each lie on the card until the next step's are there."""
    one = 3 * 8 * 2 * 512
    for trainer, steps, held in (
        ("transformers", 1, 1),
        ("transformers", 2, 2),
        ("transformers", 7, 7),
        ("pytorch", 7, 1),
    ):
        asked = ask(LLAMA, trainer=trainer, gradient_accumulation_steps=steps, batch_size=2)
        assert asked["parts"]["inputs"] == held * one


def test_what_more_batches_write_grows_with_their_number():
    """A trainer's are fetched into memory of their own, each once."""
    for trainer in ("pytorch", "transformers"):
        job = {"config": LLAMA, "method": "full", "sequence_length": 64, "gpu": "h100", "trainer": trainer}
        two, four, eight = (written(plan_job(read_job({**job, "gradient_accumulation_steps": n}))) for n in (2, 4, 8))
        assert eight - four == 2 * (four - two) > 0


def program(ids: torch.Tensor) -> tuple:
    """What programs do with ids: masks, positions, groups, lengths, host reads."""
    mask = ids == 7
    places = mask.nonzero()
    ends = torch.cumsum(mask.sum(-1), 0)
    total = torch.zeros(ids.shape, dtype=torch.long, device=ids.device)
    total[mask] = torch.arange(int(ends[-1]), device=ids.device)
    lengths = torch.tensor([row.sum().item() for row in mask], device=ids.device)
    parts = torch.split(total.flatten(), [int(n) for n in lengths.tolist()] + [ids.numel() - int(ends[-1])])
    return mask, places, ends, total, ids[mask], torch.repeat_interleave(lengths, lengths), parts[0], total.max() + 1


def test_values_are_followed_as_a_device_would_compute_them():
    ids = torch.randint(5, 9, (3, 40), generator=torch.Generator().manual_seed(1))
    values = KnownValues("balanced")
    tracker = MemoryTracker(Card())
    with tracker, tracker.track_values(values):
        told = torch.empty(ids.shape, dtype=torch.long, device="meta")
        values.set_values(told, ids)
        found = program(told)
    for meta, real in zip(found, program(ids), strict=True):
        assert meta.device.type == "meta" and meta.shape == real.shape and meta.dtype == real.dtype
        assert torch.equal(values.get(meta), real)


def test_what_is_overwritten_by_the_unknown_is_forgotten():
    values = KnownValues("balanced")
    tracker = MemoryTracker(Card())
    with tracker, tracker.track_values(values):
        known = torch.zeros(4, dtype=torch.long, device="meta")
        view = known[1:]
        known += 2
        assert values.get(view).tolist() == [2, 2, 2]
        known.copy_(torch.empty(4, dtype=torch.long, device="meta"))
        assert values.get(known) is None and values.get(view) is None
