"""Repeating layers: the log of a few layers, repeated, is the log of all of them, event for event."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vramplan.dryrun import repeat_layers as fold
from vramplan.dryrun.build.model import bare
from vramplan.dryrun.cuda.card_facts import Card
from vramplan.dryrun.steps.dry_run import dry_run
from vramplan.dryrun.tracker import DataDependent
from vramplan.errors import PlanError
from vramplan.job import read_job
from vramplan.memory.allocator.caching import replay
from vramplan.memory.allocator.config import AllocatorConfig
from vramplan.memory.events import EMPTY_CACHE, Allocation, Mark, TraceLog
from vramplan.memory.repeat import (
    Expansion,
    NotRepeatable,
    Stack,
    combination,
    expand,
    growth_of,
    inner_windows,
    same,
    shorten,
)
from vramplan.memory.sizes import ShapePoint
from vramplan.memory.template import TraceTemplate

pytestmark = pytest.mark.usefixtures("sandbox")

# --- a made-up step -----------------------------------------------------------------------------------------


class Tape:
    """Writes a log by name: what is allocated or freed, and where."""

    def __init__(self):
        self.trace_log = TraceLog()
        self.keys: dict = {}

    def mark(self, name: str, step: int) -> None:
        self.trace_log.marks.append(Mark(len(self.trace_log.events), name, step))
        self.phase = name

    def record_alloc(self, name, size: int, module: str, op: str = "mm") -> None:
        self.keys[name] = len(self.trace_log.allocations)
        self.trace_log.allocations.append(Allocation(size, module, "temporaries", self.phase, op))
        self.trace_log.events.append(self.keys[name])
        self.trace_log.event_fqns.append(module)

    def record_free(self, name, site: str) -> None:
        self.trace_log.events.append(~self.keys.pop(name))
        self.trace_log.event_fqns.append(site)


def step(types, sizes, shares=False, gaps=False, keeps=True) -> TraceLog:
    """Two steps over layers of these types. ``sizes[type]`` are the tensors a layer saves; ``shares``: all layers of a
    type use one tensor, which the last user gives back; ``gaps``: something outside happens after every layer;
    ``keeps``: a layer's input lives until its backward pass (else until the next layer has run)."""
    tape = Tape()
    name = "model.layers.{}.mlp".format
    tape.mark("load", 0)
    for i, kind in enumerate(types):
        tape.record_alloc(("weight", i), 100 + kind, name(i))
        tape.mark(EMPTY_CACHE, 0)
        tape.phase = "load"
    for number in (1, 2):
        tape.mark("forward", number)
        tape.record_alloc("embedded", 8, "model.embed")
        for kind in sorted(set(types)) if shares else ():
            tape.record_alloc(("shared", kind), 16 + kind, "model.rotary")
        for i, kind in enumerate(types):
            tape.record_alloc("temporary", 3, name(i))
            for n, size in enumerate(sizes[kind]):
                tape.record_alloc(("saved", i, n), size, name(i))
            tape.record_free("temporary", name(i))
            tape.record_alloc(("out", i), 8, name(i))
            if i and not keeps:
                tape.record_free(("out", i - 1), name(i))
            if gaps:
                tape.record_alloc("gap", 5 + kind, "model")
                tape.record_free("gap", "model")
        tape.record_alloc("stacked", 4 * len(types), "model.head", "stack")
        tape.mark("backward", number)
        tape.record_alloc(("grad", len(types)), 9, "model.head")
        for i, kind in reversed(list(enumerate(types))):
            tape.record_alloc(("grad", i), 9, name(i))
            for n in range(len(sizes[kind])):
                tape.record_free(("saved", i, n), name(i))
            tape.record_free(("grad", i + 1), name(i))
            tape.record_alloc(("weight grad", i), 100 + kind, name(i))
            if keeps or i == len(types) - 1:
                tape.record_free(("out", i), name(i))
            if shares and i == types.index(kind):
                tape.record_free(("shared", kind), name(i))
        tape.record_free(("grad", 0), "model.embed")
        tape.record_free("embedded", "model.embed")
        tape.record_free("stacked", "model.head")
        tape.mark("optimizer", number)
        for i, kind in enumerate(types):
            tape.record_alloc(("root", i), 100 + kind, name(i), "sqrt")
        for i in range(len(types)):
            tape.record_free(("root", i), name(i))
        for i in range(len(types)):
            tape.record_free(("weight grad", i), name(i))
        tape.mark("end", number)
    return tape.trace_log


TYPES = st.builds(
    lambda prefix, period, repeats, suffix: prefix + period * repeats + suffix,
    st.lists(st.integers(0, 2), max_size=2),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
    st.integers(3, 8),
    st.lists(st.integers(0, 2), max_size=2),
)
SIZES = st.lists(st.lists(st.integers(1, 5000), max_size=3), min_size=3, max_size=3)


@given(TYPES, SIZES, st.booleans(), st.booleans(), st.booleans())
@example([0, *[1, 0, 1] * 3, 0], [[], [], []], True, False, False)
@settings(max_examples=150, deadline=None)
def test_an_expanded_log_is_that_of_the_whole(types, sizes, shares, gaps, keeps):
    """Whatever the layers do: the short run, expanded, is the long run; nothing is given back twice or left behind."""
    short = [types[index] for index in shorten(types, 1)]
    options = {"shares": shares, "gaps": gaps, "keeps": keeps}
    whole = step(types, sizes, **options)
    trace_log = step(short, sizes, **options)
    stacks = [Stack(("model.layers",), tuple(short), tuple(types))]
    stacked = [key for key, entry in enumerate(trace_log.allocations) if entry.op == "stack"]
    growth = {key: 4 * (len(types) - len(short)) for key in stacked}
    expansion = expand(trace_log, stacks, growth)
    out = expansion.trace_log()
    assert out == whole
    assert growth_of(trace_log, stacks, whole) == (growth if len(types) > len(short) else {})
    live: set[int] = set()
    for event in out.events:
        if event >= 0:
            live.add(event)
        else:
            live.remove(~event)
    concrete = TraceTemplate.of(expansion.columns(), []).at(ShapePoint(1, 1, 1))
    assert concrete.trace_log() == TraceTemplate.of(out.columns(), []).at(ShapePoint(1, 1, 1)).trace_log()
    run = replay(concrete.template.replay_input, concrete.bytes, AllocatorConfig())
    assert run.allocated_after[-1] == 512 * len(live) == 512 * len(types)


@given(TYPES, st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=200, deadline=None)
def test_shortened_layers_have_every_neighbourhood(types, repeats, radius):
    kept = shorten(types, repeats, radius)
    assert kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] == len(types) - 1
    have, want = inner_windows([types[index] for index in kept], radius), inner_windows(types, radius)
    assert set(have) == set(want)
    short = [types[index] for index in kept]
    assert list(dict.fromkeys(short)) == list(dict.fromkeys(types))
    assert list(dict.fromkeys(short[::-1])) == list(dict.fromkeys(types[::-1]))
    assert all(have[window] >= min(repeats, count) for window, count in want.items())


def test_shortened_layers_are_few():
    assert len(shorten([0] * 80, 1)) == 3
    assert len(shorten([0] * 3 + [1] * 58, 1)) == 6
    assert len(shorten(([0] * 5 + [1]) * 10 + [0, 0], 1)) == 6


@given(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=3), st.data())
@settings(max_examples=100, deadline=None)
def test_combination_adds_up(vectors, data):
    factors = data.draw(st.lists(st.integers(-4, 4), min_size=len(vectors), max_size=len(vectors)))
    target = [sum(f * v[n] for f, v in zip(factors, vectors, strict=True)) for n in range(3)]
    found = combination(target, vectors)
    assert [sum(f * v[n] for f, v in zip(found, vectors, strict=True)) for n in range(3)] == target
    assert combination([1, 1], [[1, 0]]) is None


def test_a_deeper_run_that_differs_is_noticed():
    """A layer of its own in the second place, a size that is not its like's, memory that stays: all refused."""
    stacks = [Stack(("model.layers",), (0, 0, 0), (0, 0, 0, 0))]
    short, longer = step([0] * 3, [[7]]), step([0] * 4, [[7]])
    assert growth_of(short, stacks, longer)
    key = next(n for n, entry in enumerate(longer.allocations) if entry.fqn == "model.layers.1.mlp")
    for change in ({"size": 1}, {"kind": "buffers"}, {"fqn": "model.layers.2.mlp"}):
        changed = copy.deepcopy(longer)
        changed.allocations[key] = changed.allocations[key]._replace(**change)
        with pytest.raises(NotRepeatable):
            growth_of(short, stacks, changed)
    with pytest.raises(NotRepeatable):
        growth_of(short, stacks, step([0] * 5, [[7]]))
    sizes = [[7], [6]]
    with pytest.raises(NotRepeatable):
        growth_of(step([0, 1, 0], sizes), stacks, step([0, 1, 0, 0], sizes))


def test_memory_that_not_all_alike_give_back_is_refused():
    """The last layer gives back what the one before it made, the middle one does not: what of those in between?"""
    trace_log = step([0] * 3, [[7]], keeps=False)
    made = {event: entry.fqn for event, entry in enumerate(trace_log.allocations)}
    at = next(
        n for n, (event, site) in enumerate(zip(trace_log.events, trace_log.event_fqns, strict=True))
        if event < 0 and site == "model.layers.1.mlp" and made[~event] == "model.layers.0.mlp"
    )  # fmt: skip
    del trace_log.events[at], trace_log.event_fqns[at]
    trace_log.marks = [mark._replace(at=mark.at - (mark.at > at)) for mark in trace_log.marks]
    with pytest.raises(NotRepeatable, match="does not free"):
        expand(trace_log, [Stack(("model.layers",), (0, 0, 0), (0,) * 6)])


def test_layers_chosen_by_number_are_refused():
    """Alike but not all run: which do is decided by number, and no short run knows how the number goes on."""
    tape = Tape()
    tape.mark("load", 0)
    for i in range(3):
        tape.record_alloc(i, 9, f"model.layers.{i}")
    tape.mark("forward", 1)
    tape.record_alloc("x", 9, "model.layers.0")
    with pytest.raises(NotRepeatable, match="some run and some do not"):
        expand(tape.trace_log, [Stack(("model.layers",), (0, 0, 0), (0,) * 6)])


def test_same_allows_only_the_order_of_releases():
    def trace_log(*events):
        taken = [Allocation(4, "", "inputs", "load", "x")] * 3
        return TraceLog(taken, list(events), [""] * len(events), [Mark(0, "load", 0)])

    assert same(trace_log(0, 1, ~0, ~1, 2), trace_log(0, 1, ~1, ~0, 2))
    assert not same(trace_log(0, 1, ~0, 2, ~1), trace_log(0, 1, ~1, 2, ~0))
    assert not same(trace_log(0, 1, ~0, ~1, 2), trace_log(0, 1, ~0, 2, ~1))


# --- real models --------------------------------------------------------------------------------------------

PLAIN = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
DECODER = PLAIN | {"num_key_value_heads": 2, "num_hidden_layers": 6, "pad_token_id": 0}
EXPERTS = DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
IMAGE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}

CONFIGS = {
    "llama": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER | {"head_dim": 16},
    "mistral": DECODER | {"head_dim": 16, "num_hidden_layers": 8},
    "phi3": DECODER,
    "gemma2": DECODER | {"head_dim": 16, "num_hidden_layers": 8, "sliding_window": 8},
    "gemma3_text": DECODER | {"head_dim": 16, "num_hidden_layers": 14, "sliding_window": 8},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 6, "vocab_size": 128},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 4, "num_hidden_layers": 6, "vocab_size": 128,
            "word_embed_proj_dim": 64},
    "gpt_neox": PLAIN | {"num_hidden_layers": 6},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6, "vocab_size": 128},
    "mixtral": DECODER | {"num_local_experts": 4},
    "qwen3_moe": EXPERTS,
    "olmoe": DECODER | {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": DECODER | {"num_local_experts": 4, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 8},
    "deepseek_v3": PLAIN | {
        "num_hidden_layers": 8, "first_k_dense_replace": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 4,
    },
    "glm_moe_dsa": PLAIN | {
        "num_hidden_layers": 27, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 24, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4,
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 4,
        "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2,
        "indexer_types": ["full" if n < 3 or n % 4 == 2 else "shared" for n in range(27)],
    },
    "llama4_text": DECODER | {"num_hidden_layers": 16, "head_dim": 16, "num_local_experts": 4,
                              "intermediate_size_mlp": 96, "attention_chunk_size": 8},
    "qwen3_next": EXPERTS | {
        "num_hidden_layers": 8, "full_attention_interval": 2, "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "mamba2": {"hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 128, "state_size": 16, "num_heads": 8,
               "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "granitemoehybrid": DECODER | MAMBA | {
        "num_hidden_layers": 8, "layer_types": ["mamba", "attention"] * 4, "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 32,
    },
    "bamba": DECODER | MAMBA | {"num_hidden_layers": 8, "attn_layer_indices": [1, 3, 5, 7]},
    "bert": PLAIN | {"num_hidden_layers": 6},
    "albert": PLAIN | {"num_hidden_layers": 6, "embedding_size": 32},
    "modernbert": PLAIN | {"num_hidden_layers": 12, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 1,
                           "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 6, "num_decoder_layers": 7, "num_heads": 4,
           "vocab_size": 128, "decoder_start_token_id": 0},
    "bart": {"d_model": 64, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 4, "vocab_size": 128,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96},
    "vit": IMAGE | {"num_hidden_layers": 6},
    "beit": IMAGE | {"num_hidden_layers": 7, "drop_path_rate": 0.1},
    "swin": {"embed_dim": 32, "depths": [1, 2, 8, 1], "num_heads": [1, 2, 4, 8], "image_size": 64, "patch_size": 4,
             "window_size": 2},
}  # fmt: skip
TASKS = {
    "bert": "masked-lm", "albert": "masked-lm", "modernbert": "masked-lm", "t5": "seq2seq-lm", "bart": "seq2seq-lm",
    "vit": "image-classification", "beit": "image-classification", "swin": "image-classification",
}  # fmt: skip
EAGER = ("gpt_oss", "mamba2")

FULL = {"method": "full"}
LORA = {"method": "lora", "lora": {"target_modules": "all-linear", "dropout": 0.1}}
QLORA = {"method": "qlora", "lora": {"target_modules": "all-linear"}}
AUTOCAST = FULL | {"dtype": "float32", "mixed_precision": "bf16"}
NEW = {"gradient_checkpointing": "non_reentrant"}
OLD = {"gradient_checkpointing": "reentrant"}
EIGHT = {"optimizer": "adamw_8bit"}
FUSED = {"optimizer": "adamw_torch_fused"}
TWICE = {"gradient_accumulation_steps": 2}
LOOP = {"trainer": "pytorch"}

CASES = [
    ("llama", FULL), ("llama", AUTOCAST | NEW | EIGHT | TWICE), ("llama", QLORA | NEW), ("llama", LORA | OLD | FUSED),
    ("llama", QLORA | {"trainer": "transformers"}), ("llama", FULL | {"optimizer": "adamw_torch_forloop"}),
    ("llama", QLORA | {"quantization": {"type": "int8"}, "trainer": "trl"}),
    ("mistral", FULL | {"optimizer": "adafactor"}),
    ("llama", {"method": "lora", "attention_mask": "padded"}),
    ("qwen2", LORA | NEW), ("qwen3", QLORA | OLD | EIGHT), ("mistral", AUTOCAST | TWICE), ("phi3", FULL | OLD),
    ("gemma2", {"method": "qlora"} | NEW), ("gemma3_text", FULL | NEW), ("gemma3_text", {"method": "lora"}),
    ("gpt2", AUTOCAST | OLD | FUSED),
    ("opt", QLORA), ("gpt_neox", LORA | TWICE), ("falcon", FULL | EIGHT | NEW), ("mixtral", FULL | NEW),
    ("qwen3_moe", FULL | FUSED | TWICE), ("olmoe", FULL | OLD), ("gpt_oss", LORA | NEW), ("deepseek_v3", FULL),
    ("glm_moe_dsa", QLORA | NEW),
    ("llama4_text", FULL | EIGHT | LOOP), ("qwen3_next", FULL | NEW), ("mamba2", AUTOCAST), 
    ("granitemoehybrid", LORA | LOOP),
    ("bamba", FULL | EIGHT), ("bert", AUTOCAST | EIGHT), ("modernbert", QLORA), ("t5", AUTOCAST | NEW),
    ("t5", FULL | {"trainer": "transformers"}), ("bart", LORA | OLD), ("vit", LORA), ("beit", FULL | NEW),
    ("swin", FULL | EIGHT), ("qwen2", {"method": "inference", "new_tokens": 3}),
]  # fmt: skip


def prepare(kind: str, choice: dict):
    """The bare model of a made-up config, and what runs a job on it."""
    task = TASKS.get(kind)
    fields = {
        "config": CONFIGS[kind] | {"model_type": kind}, "task": task, "batch_size": 1,
        "sequence_length": None if task == "image-classification" else 16,
        "attention": "eager" if kind in EAGER else "sdpa",
    }  # fmt: skip
    job = read_job(fields | choice).resolved()
    model, task = bare(job.config, task, job.dtype, job.attention)
    return model, lambda model: dry_run(model, job, task, Card())


def log_of(found: TraceLog | Expansion) -> TraceLog:
    return found.trace_log() if isinstance(found, Expansion) else found


@pytest.fixture
def fold_always(monkeypatch):
    """Fold even where so few layers would rather be run."""
    monkeypatch.setattr(fold, "ENOUGH", 9)


@pytest.mark.parametrize(("kind", "choice"), CASES, ids=[f"{n}-{kind}" for n, (kind, _) in enumerate(CASES)])
def test_folded_equals_unfolded(fold_always, kind, choice):
    """Sizes, kinds, modules, phases, operators, order, sites and marks; and fewer layers were run at a time."""
    model, trace = prepare(kind, choice)
    depths = []

    def watched(bare):
        depths.append([len(bare.get_submodule(group.paths[0])) for group in groups])
        return trace(bare)

    groups = fold.repeated(model)
    trace_log = fold.fold(model, watched).trace_log()
    assert len(depths) >= 2
    assert all(depth < len(group.types) for depth, group in zip(depths[0], groups, strict=False))
    assert same(trace_log, trace(model))


def test_checkpointed_layers_differ_from_the_others(fold_always):
    """The comparison itself can fail: other jobs, other depths and other widths give other logs."""
    loop = FULL | LOOP
    model, trace = prepare("llama", loop)
    trace_log = fold.fold(model, trace).trace_log()
    for kind, choice in (("llama", loop | NEW), ("llama", loop | FUSED), ("qwen2", loop)):
        other, run = prepare(kind, choice)
        assert not same(trace_log, run(other))


def test_the_bare_model_stays_as_it_is(fold_always):
    """Folded or not, what is run is a copy: the job's casts, adapters and frozen weights are not the model's."""
    for kind in ("llama", "albert"):
        model, trace = prepare(kind, QLORA | {"gradient_checkpointing": "off"})
        before = [(name, type(p), p.dtype, p.shape, p.requires_grad, id(p)) for name, p in model.named_parameters()]
        config = model.config.to_dict()
        fold.folded_log(model, trace)
        assert [(n, type(p), p.dtype, p.shape, p.requires_grad, id(p)) for n, p in model.named_parameters()] == before
        assert model.config.to_dict() == config


def test_unfolded_where_nothing_repeats():
    """ALBERT runs one layer many times: there is nothing to leave out, and the whole is run."""
    model, trace = prepare("albert", FULL)
    with pytest.raises(NotRepeatable, match="no layers repeat"):
        fold.fold(model, trace)
    assert fold.folded_log(model, trace) == trace(model)


def test_unfolded_where_the_job_names_a_layer(fold_always):
    model, trace = prepare("llama", QLORA)
    with pytest.raises(NotRepeatable, match="by its number"):
        fold.fold(model, trace, ["lm_head", "model.layers.3.mlp.up_proj"])
    fold.fold(model, trace, ["lm_head", "q_proj", "w2"])


def test_unfolded_where_the_short_model_fails(fold_always):
    """An error of the short run is not the job's: the whole model is run, and its own error is the one that is told."""
    model, trace = prepare("llama", FULL)

    def fails(bare):
        if len(bare.model.layers) < 6:
            raise IndexError("short")
        return trace(bare)

    assert log_of(fold.folded_log(model, fails)) == trace(model)


def test_what_folded_a_model_once_folds_it_again(fold_always, monkeypatch):
    """The way that worked is the first to be tried; where none did, other steps of the model may yet be folded."""
    monkeypatch.setitem(CONFIGS, "llama", DECODER | {"num_hidden_layers": 12})
    model, trace = prepare("llama", FULL | LOOP)

    def depths(least: int) -> list[int]:
        ran = []

        def fails(bare):
            ran.append(len(bare.model.layers))
            if ran[-1] < least:
                raise IndexError("short")
            return trace(bare)

        assert log_of(fold.folded_log(model, fails)) == trace(model)
        return ran

    assert depths(6) == [3, 6, 7] and depths(6) == [6, 7]
    model, trace = prepare("llama", FULL | LOOP)
    assert depths(12) == [3, 6, 5, 12] and depths(6) == [3, 6, 7] and depths(6) == [6, 7]


@pytest.mark.parametrize("error", [PlanError("not so", "but so"), DataDependent("here")])
def test_what_the_whole_would_say_too_is_said_at_once(error):
    model, _ = prepare("llama", FULL)
    ran = []

    def refuses(bare):
        ran.append(bare)
        raise error

    with pytest.raises(type(error)):
        fold.folded_log(model, refuses)
    assert len(ran) == 1


def test_layer_types():
    """Alternating attention, leading dense layers, the first block's position bias, drop-path: told apart by facts."""
    expected = {
        "llama": {"model.layers": "000000"},
        "gemma3_text": {"model.layers": "00000100000100"},
        "gpt_oss": {"model.layers": "01010101"},
        "deepseek_v3": {"model.layers": "00111111"},
        "bamba": {"model.layers": "01010101"},
        "t5": {"encoder.block": "011111", "decoder.block": "0111111"},
        "beit": {"beit.layers": "0111111"},
        "swin": {"swin.encoder.layers.2.blocks": "01010101"},
    }
    for kind, lists in expected.items():
        model, _ = prepare(kind, FULL)
        found = {group.paths[0]: "".join(map(str, group.types)) for group in fold.repeated(model)}
        assert found == lists


def test_layers_that_their_parent_may_count(monkeypatch):
    """A config's period that no layer shows makes layers differ by their number within it; one that they show, not."""
    monkeypatch.setitem(CONFIGS, "llama", DECODER | {"num_hidden_layers": 12})
    model, _ = prepare("llama", FULL)
    model.config.cross_layer_interval = 3
    assert [group.types for group in fold.repeated(model)] == [(0, 1, 2) * 4]
    model, _ = prepare("gemma3_text", FULL)
    model.config.sliding_window_pattern = 6
    assert len(set(fold.repeated(model)[0].types)) == 2


def test_layers_whose_features_are_counted(monkeypatch):
    """Where a module stands beside the layers for each that a config names, those are told from all others at once."""
    monkeypatch.setitem(CONFIGS, "llama", DECODER | {"num_hidden_layers": 24})
    model, _ = prepare("llama", FULL)
    assert fold._ways(model) == fold.WAYS
    model.config.feature_layers = [7, 15]
    assert fold._ways(model) == fold.WAYS
    model.model.features = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
    ways = fold._ways(model)
    assert ways == [(fold.APART, 1)]
    assert [group.types for group in fold.repeated(model, *ways[0][:1])] == [(*[0] * 7, 1, *[0] * 7, 2, *[0] * 8)]


def test_shortened_model_is_consistent():
    """Renumbered, its config's depth and lists with it, tied weights tied, storages its own."""
    model, _ = prepare("gemma3_text", FULL)
    groups = fold.repeated(model)
    short = fold.shortened(model, groups, [[0, 4, 5, 6, 13]])
    assert [layer.self_attn.layer_idx for layer in short.model.layers] == [0, 1, 2, 3, 4]
    assert short.config.num_hidden_layers == 5
    assert short.config.layer_types == [model.config.layer_types[index] for index in (0, 4, 5, 6, 13)]
    assert short.model.config is short.config is not model.config
    assert short.lm_head.weight is short.model.embed_tokens.weight is not model.lm_head.weight
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    assert not own & {p.untyped_storage()._cdata for p in short.parameters()}
    assert len(model.model.layers) == model.config.num_hidden_layers == 14
