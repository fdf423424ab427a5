"""A malformed, hostile or giant config ends in a PlanError within 10 seconds and 1.5 GiB, or in a plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import LLAMA

ROOT = Path(__file__).parent.parent
SECONDS, GIB = 10.0, 1 << 30
PATIENCE = 120
"""Seconds by the wall after which a config counts as hung, on the busiest machine."""
MOE = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
LISTED = {**MOE, "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}
BERT = {**LLAMA, "model_type": "bert", "architectures": ["BertForMaskedLM"]}
MAMBA = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}


def nested(depth: int, kind: str = "dict"):
    value = 1
    for _ in range(depth):
        value = {"a": value} if kind == "dict" else [value]
    return value


def llama(**fields) -> dict:
    return {**LLAMA, **fields}


CONFIGS = {
    "nested dicts": llama(text_config=nested(400)),
    "nested lists": llama(layer_types=nested(400, "list")),
    "10^18 layers": llama(num_hidden_layers=10**18),
    "an integer of 4000 digits": llama(hidden_size=10**4000),
    "512 layers": llama(num_hidden_layers=512),
    "2^40 words": llama(vocab_size=1 << 40),
    "width 2^40": llama(hidden_size=1 << 40, intermediate_size=1 << 40),
    "beyond 64 bits": llama(vocab_size=1 << 40, hidden_size=1 << 40),
    "2^39 positions": {**BERT, "max_position_embeddings": 1 << 39},
    "10^9 classes": {**BERT, "num_labels": 10**9, "architectures": ["BertForSequenceClassification"]},
    "10^9 fused experts": {**MOE, "num_local_experts": 10**9},
    "10^9 listed experts": {**LISTED, "num_experts": 10**9, "moe_intermediate_size": 8},
    "more experts a token than experts": {**MOE, "num_local_experts": 4, "num_experts_per_tok": 1000},
    "10^9 heads": llama(num_attention_heads=10**9),
    "no heads": llama(num_attention_heads=0),
    "negative width": llama(hidden_size=-64),
    "negative layers": llama(num_hidden_layers=-1),
    "no layers": llama(num_hidden_layers=0),
    "width that heads do not divide": llama(num_attention_heads=5, num_key_value_heads=5),
    "key heads that do not divide": llama(num_key_value_heads=3),
    "NaN": llama(rms_norm_eps=float("nan")),
    "infinity": llama(rope_theta=float("inf")),
    "half a layer": llama(num_hidden_layers=1.5),
    "half a head": llama(num_attention_heads=0.5),
    "width in words": llama(hidden_size="large"),
    "width as text": llama(hidden_size="64"),
    "a list for a size": llama(hidden_size=[64]),
    "an object for a size": llama(vocab_size={"n": 512}),
    "null sizes": llama(hidden_size=None, vocab_size=None),
    "true layers": llama(num_hidden_layers=True),
    "a million layer types": llama(layer_types=["full_attention"] * 300_000),
    "layer types that are none": llama(layer_types=["nothing", 3]),
    "an activation that is none": llama(hidden_act="os.system"),
    "positions that are none": llama(rope_scaling={"rope_type": "yarn", "factor": "x"}),
    "positions of no type": llama(rope_scaling=[1, 2]),
    "dtype that is none": llama(torch_dtype="bfloat16; import os"),
    "dtype of dtypes": llama(dtype={"a": {"b": 1}}),
    "attention from elsewhere": llama(_attn_implementation="kernels-community/flash-attn"),
    "its own path": llama(_name_or_path="/etc/passwd", name_or_path="../../etc/passwd"),
    "architectures that are none": llama(architectures=["../../x", 3, None]),
    "architectures as text": llama(architectures="LlamaForCausalLM"),
    "architectures as a number": llama(architectures=7),
    "code of its own": llama(model_type="x" * 1000, auto_map={"AutoModelForCausalLM": "evil.Model"}),
    "code beside a known type": llama(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
    "type as a path": llama(model_type="../../../etc/passwd"),
    "type as a list": llama(model_type=["llama"]),
    "type with dots": llama(model_type="transformers.models.llama"),
    "type of a part": {**LLAMA, "model_type": "clip_text_model"},
    "text as a list": {"model_type": "llava", "text_config": [1], "vision_config": 3},
    "parts of unknown types": {"model_type": "llava", "text_config": {"model_type": "x"}, "vision_config": {}},
    "a backbone to download": {
        "model_type": "detr",
        "backbone": "resnet50",
        "use_pretrained_backbone": True,
        "use_timm_backbone": True,
        "d_model": 64,
        "encoder_layers": 1,
    },
    "an encoder of encoders": {
        "model_type": "encoder-decoder",
        "encoder": {"model_type": "encoder-decoder", "encoder": LLAMA, "decoder": LLAMA},
        "decoder": LLAMA,
    },
    "quantised by nobody": llama(quantization_config={"quant_method": ["x"], "bits": "four"}),
    "quantised as text": llama(quantization_config="nf4"),
    "quantised to a type that is none": llama(quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "q"}),
    "gptq of no bits": llama(quantization_config={"quant_method": "gptq", "bits": "x", "group_size": 0}),
    "blocks of nothing": llama(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 0]}),
    "a pattern that does not end": llama(
        quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["re:(a+)+$", "*" * 5000]}
    ),
    "a pattern in the layers that are left": llama(
        quantization_config={"load_in_4bit": True, "llm_int8_skip_modules": ["([a-z._0-9]+)+!"]}
    ),
    "a pattern without end": llama(quantization_config={"quant_method": "modelopt", "ignore": ["re:([a-z._0-9]+)+!"]}),
    "a pattern that is none": llama(quantization_config={"quant_method": "modelopt", "ignore": ["re:(", 3]}),
    "pruned heads": {**BERT, "pruned_heads": {"0": list(range(1000)), "99": [1]}},
    "chunks of one token": {**BERT, "chunk_size_feed_forward": 1},
    "a kernel of 10^9": {**MAMBA, "conv_kernel": 10**9},
    "a state of 2^40": {**MAMBA, "state_size": 1 << 40},
    "an image of 2^39": {"model_type": "vit", "image_size": 1 << 39, "patch_size": 1, "hidden_size": 64},
    "patches of nothing": {"model_type": "vit", "image_size": 224, "patch_size": 0, "hidden_size": 64},
    "generation settings": llama(num_beams=10**12, max_length=-1, return_dict=False, output_attentions=True),
    "fields of every kind": llama(**{name: name for name in ("forward", "__class__", "to_dict", "sub_configs")}),
    "tied to nothing": llama(tie_word_embeddings="maybe"),
    "dropout of a thousand": llama(attention_dropout=1000.0),
}
PLANNED = {
    "512 layers",
    "no layers",
    "infinity",
    "dtype of dtypes",
    "its own path",
    "code of its own",
    "code beside a known type",
    "blocks of nothing",
    "pruned heads",
    "chunks of one token",
    "a kernel of 10^9",
    "dropout of a thousand",
}
"""Absurd, but the stack takes them as they are: what they ask for is planned, quickly; no code of theirs is run."""


def method_of(config: dict) -> str:
    stored = config.get("quantization_config")
    return "qlora" if isinstance(stored, dict) and "load_in_4bit" in stored else "full"


@pytest.fixture(scope="module")
def answers() -> dict[str, dict]:
    jobs = [{"config": config, "method": method_of(config), "sequence_length": 128} for config in CONFIGS.values()]
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "alone.py", str(PATIENCE), str(16 * GIB)],
        input="\n".join(json.dumps([job]) for job in jobs),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(jobs), done.stderr[-2000:]
    return {name: answer for name, (answer,) in zip(CONFIGS, lines, strict=True)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_ends_soon_and_is_told(answers, name):
    answer = answers[name]
    assert "died" not in answer and answer["cpu"] < SECONDS and answer["rss"] < 1.5 * GIB, answer
    assert ("error" in answer) == (name not in PLANNED), answer
    if "error" in answer:
        error = answer["error"]
        assert error["type"] == "PlanError" and error["message"] and error["hint"], error
        assert len(error["message"]) < 600 and "Traceback" not in error["message"]
