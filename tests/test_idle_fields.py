"""Every field of a job changes the plan, is refused, or is said to cost no memory and why."""

from __future__ import annotations

import json

import pytest
from tiny import LLAMA
from vramplan import PlanError, plan
from vramplan.job import Job

JOB = {"config": LLAMA, "gpu": "h100", "batch_size": 2, "sequence_length": 32}
ADAPTERS = {"lora": {"target_modules": "all-linear"}}
METHODS = {"full": {}, "lora": ADAPTERS, "qlora": ADAPTERS, "inference": {}}
OTHER = {
    "adapter": {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []},
    "allocator": {"expandable_segments": True},
    "attention": "eager",
    "attention_mask": "padded",
    "batch_size": 3,
    "completion_length": 16,
    "dtype": "float32",
    "expert_routing": "same",
    "generation_args": {"num_beams": 3},
    "gpu": "t4",
    "gradient_accumulation_steps": 3,
    "gradient_checkpointing": "reentrant",
    "images": 2,
    "image_size": [30, 30],
    "lora": {"r": 4, "target_modules": "all-linear"},
    "mixed_precision": "fp16",
    "new_tokens": 7,
    "objective": "dpo",
    "optimizer": "sgd",
    "prepare_for_kbit_training": True,
    "processor": {"max_pixels": 100000},
    "prompt_length": 16,
    "quantization": {"type": "int8"},
    "sequence_length": 48,
    "target_length": 24,
    "trainer_args": {"max_grad_norm": 0.0},
}
"""For each field a value that the jobs above do not have."""
ELSEWHERE = {"model", "config", "revision", "task", "method", "trainer", "reserve"}
"""Fields that name the job itself, and the one that decides its verdict alone."""
OF_MANY_CARDS = {"gpu_count", "nodes", "strategy", "ddp", "fsdp", "deepspeed", "device_map", "max_memory"}
"""In ``test_parallel.py``."""
SAME_NUMBERS = {
    ("qlora", "pytorch", "prepare_for_kbit_training"),
    ("qlora", "transformers", "prepare_for_kbit_training"),
}
"""The default."""


def answer(job: dict) -> tuple[str, list[str]]:
    """The figures of a job, or the reason of its refusal; and the warnings."""
    try:
        found = plan(job).model_dump(mode="json")
    except PlanError as error:
        return error.message, []
    return json.dumps([found[name] for name in ("peak", "phases", "parts", "load")]), found["warnings"]


def test_there_is_a_value_for_every_field():
    assert set(OTHER) | ELSEWHERE | OF_MANY_CARDS == set(Job.model_fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_length": 24}, "target_length costs no memory here: LlamaForCausalLM has one length"),
        ({"new_tokens": 7}, "new_tokens costs no memory here: a training step generates none"),
        ({"images": 2}, "images costs no memory here: LlamaForCausalLM reads text alone"),
        ({"expert_routing": "same"}, "expert_routing costs no memory here: nothing that runs depends on a router's"),
        ({"method": "inference", "optimizer": "sgd"}, "optimizer costs no memory here: inference trains nothing"),
        ({"method": "inference", "trainer_args": {"max_grad_norm": 0.0}}, "trainer_args costs no memory here"),
    ],
)
def test_a_field_that_changes_nothing_is_said_to(fields, said):
    job = {**JOB, "method": "full", "trainer": None if "method" in fields else "pytorch"}
    assert [text for text in answer({**job, **fields})[1] if text.startswith(said)]
    assert not [text for text in answer({**job, **dict.fromkeys(fields), "method": "full"})[1] if "costs no" in text]


def test_what_freezes_every_weight_is_no_full_training():
    with pytest.raises(PlanError, match="trains the weights that prepare_for_kbit_training freezes"):
        plan({**JOB, "method": "full", "prepare_for_kbit_training": True})


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["pytorch", "transformers", "trl"])
@pytest.mark.parametrize("method", METHODS)
def test_no_field_is_ignored_in_silence(method, trainer):
    job = {**JOB, "method": method, **METHODS[method]}
    if method != "inference":
        job["trainer"] = trainer
    before, warnings = answer(job)
    for field, value in OTHER.items():
        after, more = answer({**job, field: value})
        told = [text for text in more if text not in warnings]
        assert after != before or told or (method, trainer, field) in SAME_NUMBERS, field
