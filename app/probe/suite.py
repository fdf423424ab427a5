"""A spread of jobs, to be measured on a card of one's own: ``quick`` in minutes on 8 GB, ``full`` over everything."""

from __future__ import annotations

from ..errors import PlanError

ALL_LINEAR = {"r": 16, "target_modules": "all-linear"}
INT8 = {"type": "int8"}
ATTENTION = {"r": 16, "target_modules": ["q_proj", "v_proj"]}
NF4 = {"type": "nf4", "double_quant": False}

_QUICK: list[tuple[str, dict]] = [
    ("qwen2.5-0.5b full", {"model": "qwen2.5-0.5b", "method": "full", "sequence_length": 512}),
    ("llama-3.2-1b lora", {"model": "llama-3.2-1b", "method": "lora"}),
    ("llama-3.2-1b qlora", {"model": "llama-3.2-1b", "method": "qlora", "lora": ALL_LINEAR}),
    (
        "qwen2.5-0.5b full trainer",
        {"model": "qwen2.5-0.5b", "method": "full", "trainer": "transformers", "sequence_length": 512},
    ),
    ("qwen3-0.6b lora trl", {"model": "qwen3-0.6b", "method": "lora", "trainer": "trl", "batch_size": 2}),
    (
        "qwen2.5-0.5b inference",
        {"model": "qwen2.5-0.5b", "method": "inference", "batch_size": 4, "sequence_length": 512, "new_tokens": 32},
    ),
    ("t5-base full", {"model": "t5-base", "method": "full", "batch_size": 4, "sequence_length": 256}),
    ("vit-base full", {"model": "vit-base", "method": "full", "batch_size": 16, "sequence_length": None}),
]

_MORE: list[tuple[str, dict]] = [
    ("llama-65b qlora", {"model": "llama-65b", "method": "qlora", "sequence_length": 2048}),
    ("llama-3.1-70b qlora", {"model": "llama-3.1-70b", "method": "qlora", "sequence_length": 2048}),
    ("llama-3.1-8b qlora", {"model": "llama-3.1-8b", "method": "qlora", "sequence_length": 2048}),
    ("llama-3.1-8b qlora no dq", {"model": "llama-3.1-8b", "method": "qlora", "quantization": NF4}),
    (
        "mistral-7b qlora trainer",
        {
            "model": "mistral-7b",
            "method": "qlora",
            "lora": ALL_LINEAR,
            "trainer": "transformers",
            "optimizer": "paged_adamw_8bit",
            "batch_size": 2,
        },
    ),
    (
        "llama-3.1-8b lora",
        {"model": "llama-3.1-8b", "method": "lora", "gradient_checkpointing": True, "sequence_length": 2048},
    ),
    ("llama-3.2-3b lora", {"model": "llama-3.2-3b", "method": "lora", "lora": {"r": 64, "dropout": 0.05}}),
    ("gemma-2-2b lora", {"model": "gemma-2-2b", "method": "lora", "lora": ALL_LINEAR, "sequence_length": 512}),
    (
        "qwen2.5-1.5b full 8-bit adam",
        {"model": "qwen2.5-1.5b", "method": "full", "optimizer": "adamw_8bit", "gradient_checkpointing": True},
    ),
    ("llama-3.2-1b lora int8", {"model": "llama-3.2-1b", "method": "lora", "quantization": INT8}),
    ("qwen2.5-1.5b qlora int8", {"model": "qwen2.5-1.5b", "method": "qlora", "quantization": INT8, "batch_size": 2}),
    (
        "phi-3-mini qlora trl",
        {"model": "phi-3-mini", "method": "qlora", "lora": ALL_LINEAR, "trainer": "trl", "batch_size": 2},
    ),
    ("llama-3.2-1b full trl", {"model": "llama-3.2-1b", "method": "full", "trainer": "trl"}),
    (
        "gpt2 full trainer",
        {"model": "gpt2", "method": "full", "trainer": "transformers", "dtype": "float32", "batch_size": 4},
    ),
    (
        "bert-base classification",
        {
            "model": "bert-base",
            "method": "full",
            "task": "sequence-classification",
            "batch_size": 16,
            "sequence_length": 128,
            "dtype": "float32",
        },
    ),
    (
        "modernbert mlm trainer",
        {"model": "modernbert", "method": "full", "trainer": "transformers", "batch_size": 4, "sequence_length": 512},
    ),
    (
        "qwen1.5-moe lora",
        {
            "model": "qwen1.5-moe-a2.7b",
            "method": "lora",
            "lora": ATTENTION,
            "gradient_checkpointing": True,
            "sequence_length": 512,
        },
    ),
    (
        "deepseek-v2-lite lora",
        {
            "model": "deepseek-v2-lite",
            "method": "lora",
            "lora": {"r": 16, "target_modules": ["q_proj", "kv_b_proj"]},
            "sequence_length": 512,
        },
    ),
    (
        "qwen3-30b-a3b lora",
        {
            "model": "qwen3-30b-a3b",
            "method": "lora",
            "lora": ATTENTION,
            "gradient_checkpointing": True,
            "sequence_length": 512,
        },
    ),
    (
        "gpt-oss-20b lora",
        {
            "model": "gpt-oss-20b",
            "method": "lora",
            "lora": ATTENTION,
            "gradient_checkpointing": True,
            "sequence_length": 512,
        },
    ),
    (
        "whisper-small full",
        {"model": "whisper-small", "method": "full", "batch_size": 4, "sequence_length": 128},
    ),
    ("flan-t5-large lora", {"model": "flan-t5-large", "method": "lora", "batch_size": 2, "target_length": 128}),
    (
        "flan-t5-base lora trainer",
        {"model": "flan-t5-base", "method": "lora", "trainer": "transformers", "batch_size": 4, "sequence_length": 256},
    ),
    ("vit-large full", {"model": "vit-large", "method": "full", "batch_size": 16, "sequence_length": None}),
    (
        "llama-3.1-8b inference",
        {"model": "llama-3.1-8b", "method": "inference", "batch_size": 2, "new_tokens": 64},
    ),
    ("gemma-2-9b inference", {"model": "gemma-2-9b", "method": "inference", "sequence_length": 512, "new_tokens": 32}),
    (
        "mistral-7b inference nf4",
        {
            "model": "mistral-7b",
            "method": "inference",
            "quantization": {"type": "nf4"},
            "sequence_length": 512,
            "new_tokens": 32,
        },
    ),
    (
        "qwen2-vl-2b lora",
        {"model": "qwen2-vl-2b", "method": "lora", "task": "image-text-to-text", "images": 0, "lora": ATTENTION},
    ),
    (
        "qwen2-vl-2b lora with images",
        {"model": "qwen2-vl-2b", "method": "lora", "lora": ATTENTION, "images": 1, "batch_size": 2},
    ),
    (
        "qwen2.5-vl-7b qlora with images",
        {
            "model": "qwen2.5-vl-7b",
            "method": "qlora",
            "lora": ALL_LINEAR,
            "images": 2,
            "image_size": [504, 672],
            "sequence_length": 2048,
        },
    ),
    (
        "qwen2-vl-2b lora trainer with images",
        {
            "model": "qwen2-vl-2b",
            "method": "lora",
            "lora": ATTENTION,
            "images": 1,
            "batch_size": 2,
            "trainer": "transformers",
        },
    ),
    ("qwen3-vl-2b full with an image", {"model": "qwen3-vl-2b", "method": "full", "images": 1}),
    ("gemma-3-4b lora with an image", {"model": "gemma-3-4b", "method": "lora", "lora": ATTENTION, "images": 1}),
    (
        "llava-1.5-7b qlora with images",
        {"model": "llava-1.5-7b", "method": "qlora", "lora": ALL_LINEAR, "images": 1, "batch_size": 2},
    ),
    (
        "llama-3.2-11b-vision lora with an image",
        {
            "model": "llama-3.2-11b-vision",
            "method": "lora",
            "lora": ATTENTION,
            "images": 1,
            "gradient_checkpointing": True,
            "sequence_length": 512,
        },
    ),
    (
        "qwen2.5-vl-7b inference with an image",
        {"model": "qwen2.5-vl-7b", "method": "inference", "images": 1, "sequence_length": 512, "new_tokens": 32},
    ),
    (
        "gemma-3-4b inference with images",
        {"model": "gemma-3-4b", "method": "inference", "images": 2, "sequence_length": 1024, "new_tokens": 32},
    ),
    ("mamba-130m full", {"model": "mamba-130m", "method": "full", "sequence_length": 256}),
    (
        "tinyllama lora padded",
        {"model": "tinyllama", "method": "lora", "batch_size": 4, "sequence_length": 512, "attention_mask": "padded"},
    ),
    (
        "qwen2.5-0.5b accumulating trainer",
        {
            "model": "qwen2.5-0.5b",
            "method": "full",
            "trainer": "transformers",
            "gradient_accumulation_steps": 4,
            "gradient_checkpointing": True,
        },
    ),
    (
        "llama-3.2-1b lora expandable",
        {"model": "llama-3.2-1b", "method": "lora", "batch_size": 2, "allocator": {"expandable_segments": True}},
    ),
    ("qwen3-8b lora trl", {"model": "qwen3-8b", "method": "lora", "trainer": "trl", "batch_size": 2}),
    ("falcon-7b qlora", {"model": "falcon-7b", "method": "qlora", "lora": ALL_LINEAR}),
    ("opt-1.3b full sgd", {"model": "opt-1.3b", "method": "full", "optimizer": "sgd_momentum", "sequence_length": 512}),
    (
        "llama-2-13b qlora paged",
        {"model": "llama-2-13b", "method": "qlora", "lora": ALL_LINEAR, "optimizer": "paged_adamw_32bit"},
    ),
    (
        "smollm2-360m full fp32 autocast",
        {"model": "smollm2-360m", "method": "full", "dtype": "float32", "mixed_precision": "bf16", "batch_size": 2},
    ),
]

SUITES = {"quick": _QUICK, "full": _QUICK + _MORE}


def suite(name: str) -> list[tuple[str, dict]]:
    """The jobs of a suite, each with its name. Raises :class:`PlanError`."""
    if name not in SUITES:
        raise PlanError(f"there is no suite {name!r}", f"one of {', '.join(SUITES)}", "suite")
    return SUITES[name]
