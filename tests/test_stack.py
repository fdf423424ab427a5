"""What is refused for the stack's own reason fails on a real model too, and what its hint names runs: small models of
those architectures with real weights, trained one step on the CPU by the installed libraries.
"""

from __future__ import annotations

import tempfile

import peft
import pytest
import torch
import transformers
from transformers.quantizers.quantizers_utils import should_convert_module
from vramplan.dryrun.build.model_config import AUTO, read_config, task_of
from vramplan.dryrun.build.peft_config import TASKS
from vramplan.dryrun.build.quantizers.bnb_linear import left_by
from vramplan.errors import PlanError
from vramplan.job import Job, read_job
from vramplan.usecases import plan

pytestmark = pytest.mark.usefixtures("sandbox")

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 512}  # fmt: skip
CLIP_PART = {**TEXT, "image_size": 32, "patch_size": 8, "max_position_embeddings": 48, "eos_token_id": 2}
MAMBA = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
         "state_size": 16, "vocab_size": 512}  # fmt: skip
ZAMBA = {
    "model_type": "zamba2", "architectures": ["Zamba2ForCausalLM"], **TEXT, "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4, "mamba_headdim": 8, "mamba_d_state": 16,
    "adapter_rank": 8,
}  # fmt: skip
"""Eight heads of eight: half of what Mamba's expansion makes, as in Zamba2-7B's published config."""
STEP_TEXT = {**TEXT, "model_type": "step3p7_text", "num_key_value_heads": 2, "head_dim": 16, "n_routed_experts": 8,
             "num_experts_per_tok": 2, "moe_intermediate_size": 32, "share_expert_dim": 32}  # fmt: skip
STEP = {"model_type": "step3p7", "architectures": ["Step3p7ForConditionalGeneration"], "text_config": STEP_TEXT,
        "vision_config": {**TEXT, "image_size": 28, "patch_size": 14}}  # fmt: skip
CONFIGS = {
    "step": STEP,
    "albert": {"model_type": "albert", "architectures": ["AlbertForMaskedLM"], **TEXT, "embedding_size": 32},
    "reranker": {"model_type": "xlm-roberta", "architectures": ["XLMRobertaForSequenceClassification"], **TEXT,
                 "num_labels": 1, "max_position_embeddings": 66},
    "whisper": {
        "model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "d_model": 64,
        "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 512, "max_target_positions": 48,
        "max_source_positions": 100, "num_mel_bins": 16, "pad_token_id": 0, "decoder_start_token_id": 3,
    },
    "clip": {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": CLIP_PART,
             "vision_config": CLIP_PART},
    "mamba": MAMBA,
    "nemotron": {
        "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], **TEXT, "num_hidden_layers": 4,
        "hybrid_override_pattern": "M-*-", "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2,
    },
    "jamba": {
        "model_type": "jamba", "architectures": ["JambaForCausalLM"], **TEXT, "num_hidden_layers": 3,
        "num_key_value_heads": 2, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 16, "mamba_dt_rank": 16,
    },
    "zamba": ZAMBA,
    "llama4": {
        "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], **TEXT, "num_key_value_heads": 2,
        "intermediate_size_mlp": 128, "head_dim": 16, "num_local_experts": 4, "moe_layers": [1],
        "attention_chunk_size": 64,
    },
    "deepseek": {
        "model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], **TEXT, "num_attention_heads": 8,
        "num_key_value_heads": 1, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_hash_layers": 1,
        "compress_ratios": [0, 4, 128], "head_dim": 32, "qk_rope_head_dim": 16, "index_head_dim": 16,
        "index_n_heads": 4, "index_topk": 8, "q_lora_rank": 32, "o_lora_rank": 16, "o_groups": 2,
        "n_routed_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip
ALL = {"lora": {"target_modules": "all-linear"}}
SOME = {"lora": {"target_modules": ["in_proj", "x_proj"]}}
REFUSED = {
    "albert": ("albert", "full", {}, {"gradient_checkpointing": "off"}),
    "reranker": ("reranker", "qlora", ALL, {"quantization": {"skip_modules": ["classifier"]}}),
    "whisper": ("whisper", "full", {}, {"sequence_length": 48}),
    "clip": ("clip", "full", {}, {"sequence_length": 48}),
    "mamba": ("mamba", "lora", ALL, {"lora": {"target_modules": ["dt_proj", "in_proj", "x_proj"]}}),
    "nemotron": ("nemotron", "qlora", ALL, {"lora": {"target_modules": ["down_proj", "in_proj", "q_proj"]}}),
    "a weight taken packed": ("mamba", "qlora", SOME, {"quantization": {"skip_modules": ["dt_proj", "lm_head"]}}),
    "zamba": ("zamba", "qlora", ALL, {"config": {**ZAMBA, "mamba_headdim": 16}}),
    "a router": ("llama4", "lora", ALL, {"lora": {"target_modules": ["down_proj", "gate_proj", "q_proj"]}}),
    "step": ("step", "full", {}, {"config": STEP | {"text_config": STEP_TEXT | {"sliding_window": 8}}}),
    "groups": ("deepseek", "lora", ALL, {"lora": {"target_modules": ["down_proj", "kv_proj", "o_b_proj"]}}),
}
"""The config, the method and the fields of a job that the stack refuses, and what to change by its hint."""
PLANNED = {
    "jamba": ("jamba", "qlora", ALL),
    "reranker": ("reranker", "lora", ALL),
    "deepseek": ("deepseek", "full", {}),
}


def job_of(name: str, method: str, fields: dict) -> Job:
    job = {
        "config": CONFIGS[name],
        "method": method,
        "sequence_length": 64,
        "gradient_checkpointing": True,
        "trainer": "pytorch",
    }
    return read_job(job | fields)


def train(job: Job) -> None:
    """One step of the job for real, with adapters and layers as small."""
    job = job.resolved()
    config = read_config(job.config, None)
    task = task_of(config)
    model = AUTO[task].from_config(config, dtype=torch.bfloat16)
    checkpointing = job.gradient_checkpointing != "off"
    if job.method == "qlora":
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True, llm_int8_skip_modules=list(job.quantization.skip_modules) or None
        )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = AUTO[task].from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings)
        model = peft.prepare_model_for_kbit_training(model, checkpointing, {"use_reentrant": False})
    elif checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if job.method != "full":
        targets = job.lora.target_modules
        targets = targets if isinstance(targets, str) else list(targets)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type=TASKS.get(task)))
    ids = torch.randint(3, 40, (1, job.sequence_length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if task == "sequence-classification":
        batch["labels"] = torch.zeros(1)
    elif task == "speech-seq2seq":
        frames = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, dtype=torch.bfloat16)
        batch = {"input_features": frames, "labels": ids}
    elif task == "zero-shot-image-classification":
        side = config.vision_config.image_size
        pixels = torch.randn(1, 3, side, side, dtype=torch.bfloat16)
        batch = {"pixel_values": pixels, "input_ids": ids, "return_loss": True}
    model.train()(**batch).loss.backward()


def words_of(change: dict) -> list[str]:
    """What a hint says that leads to a change."""
    ((field, value),) = change.items()
    if field == "config":
        return ["check the sizes in the config"]
    return [name for names in value.values() for name in names] if isinstance(value, dict) else [str(value)]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_fails_and_what_is_hinted_runs(name):
    of, method, fields, change = REFUSED[name]
    with pytest.raises(PlanError) as told:
        plan(job_of(of, method, fields).model_dump())
    with pytest.raises((RuntimeError, ValueError, AttributeError)) as failed:
        train(job_of(of, method, fields))
    if "longer than this model's" not in told.value.message:
        assert str(failed.value).splitlines()[0].rstrip(".")[:60] in told.value.message
    assert all(word in told.value.hint for word in words_of(change)), told.value.hint
    assert plan(job_of(of, method, fields | change).model_dump())["peak"]["allocated"] > 0
    train(job_of(of, method, fields | change))


@pytest.mark.parametrize("name", PLANNED)
def test_what_is_planned_runs(name):
    assert plan(job_of(*PLANNED[name]).model_dump())["peak"]["allocated"] > 0
    train(job_of(*PLANNED[name]))


def test_layers_are_left_as_transformers_leaves_them():
    paths = ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "model.lm_head", "lm", ""]
    for patterns in ([], ["lm_head"], ["model.layers.1"], ["up_proj", "lm"], ["model.*.mlp", "x|lm"], ["1.mlp"]):
        leave = left_by(patterns)
        assert [leave(path) for path in paths] == [not should_convert_module(path, patterns) for path in paths]
