"""Names that are no field of a job: each leads to the field that does it, or to the reason that none does."""

from __future__ import annotations

import pytest
from tiny import LLAMA
from vramplan import PlanError, plan
from vramplan.job import _ELSEWHERE, Job, read_job

JOB = {"config": LLAMA, "method": "lora", "gpu": "h100"}


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("batch", "did you mean `batch_size`?"),
        ("max_seq_length", "did you mean `sequence_length`?"),
        ("attn_implementation", "did you mean `attention`?"),
        ("sequence_lenght", "did you mean `sequence_length`?"),
        ("offload", "strategy zero2 or zero3"),
        ("videos", "not planned: ask with `images`"),
        ("torch_compile", "a compiled step is not planned"),
        ("resume", "not planned"),
        ("rank", "set r in `lora`"),
        ("zebra", "the fields are "),
    ],
)
def test_an_unknown_field_is_led_to_the_one_that_does_it(field, hint):
    with pytest.raises(PlanError, match=f"unknown field `{field}`") as told:
        read_job({**JOB, field: 2})
    assert hint in told.value.hint and told.value.field == field
    assert ("did you mean" in told.value.hint) == ("did you mean" in hint)


def test_no_name_from_elsewhere_is_a_field():
    assert not set(_ELSEWHERE) & set(Job.model_fields)


@pytest.mark.parametrize(("field", "meant"), [("rank", "r"), ("target_module", "target_modules")])
def test_fields_of_an_object_are_found_too(field, meant):
    with pytest.raises(PlanError) as told:
        read_job({**JOB, "lora": {field: 8}})
    assert told.value.hint == f"did you mean `{meant}`?"


def test_an_objective_is_no_method():
    with pytest.raises(PlanError) as told:
        read_job({**JOB, "method": "dpo"})
    assert told.value.hint == "set objective to dpo, and method to full, lora or qlora"


def test_of_a_job_that_does_not_load_no_merge_is_told():
    small = {"name": "small", "memory_bytes": 1 << 20, "like": "h100"}
    (fit,) = plan({**JOB, "gpu": small, "trainer": "pytorch"}).fits[:1]
    assert fit.verdict == "does_not_fit" and fit.breaks == "load" and fit.cannot == []
