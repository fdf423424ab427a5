"""The public API: what ``vramplan`` exports, its examples, its types and its answers in threads."""

from __future__ import annotations

import doctest
import inspect
import json
import typing
from concurrent.futures import ThreadPoolExecutor

import pytest
import vramplan
from tiny import JOB
from vramplan import api, usecases

NAMES = ["Answer", "Job", "PlanError", "advise", "compare", "plan", "solve"]


@pytest.mark.parametrize("module", [vramplan, api], ids=["vramplan", "api"])
def test_the_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_what_is_exported():
    assert vramplan.__all__ == NAMES and all(getattr(vramplan, name).__doc__ for name in NAMES)
    with pytest.raises(AttributeError):
        vramplan.nothing


@pytest.mark.parametrize("name", ["plan", "solve", "advise", "compare"])
def test_functions_are_typed(name):
    function = getattr(api, name)
    hints = typing.get_type_hints(function)
    assert hints.keys() == {*inspect.signature(function).parameters, "return"}


def test_the_answer_is_the_wire_format():
    answer = vramplan.plan(JOB)
    told = usecases.plan(JOB)
    assert answer.model_dump(mode="json", by_alias=True, exclude_unset=True) == json.loads(json.dumps(told))
    assert vramplan.plan(vramplan.Job(**JOB)) == answer


def test_what_cannot_be_planned_raises_the_one_error():
    with pytest.raises(vramplan.PlanError) as error:
        vramplan.plan({"model": "llama-3.1-8b", "methd": "qlora"})
    assert "method" in error.value.hint
    rows = vramplan.compare([JOB, {**JOB, "batch_size": 0}]).rows
    assert rows[0].peak and rows[1].error["message"]


def test_threads_get_what_one_gets():
    jobs = [{**JOB, "batch_size": size} for size in range(1, 5)]
    alone = [vramplan.plan(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(vramplan.plan, jobs)) == alone
