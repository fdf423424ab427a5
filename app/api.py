"""The public API: functions from a job to a typed answer, safe in any thread."""

from __future__ import annotations

from typing import Any

from . import usecases
from .job import Job
from .schema import Advice, Answer, Comparison, Solved


def plan(job: Job | dict[str, Any], *, all_layers: bool = False) -> Answer:
    """The answer to one job: peaks, parts, phases and layers in bytes, and a verdict for each card.

    ``all_layers`` lists repeated layers one by one. Raises :class:`~vramplan.PlanError`.

    >>> from vramplan import Job, plan
    >>> answer = plan(Job(model="llama-3.1-8b", method="qlora", sequence_length=1024, gpu="rtx-4090"))
    >>> sum(answer.parts.values()) == answer.peak.allocated
    True
    """
    return Answer.model_validate(usecases.plan(job, all_layers=all_layers))


def solve(job: Job | dict[str, Any], target: str = "batch_size", **limits: Any) -> Solved:
    """The largest ``target`` of a job that fits its card: ``batch_size``, ``sequence_length``, ``r``,
    ``accumulation_free_batch``; or the smallest ``gpu``, or the largest ``model``.

    ``limits`` are ``memory_limit_bytes``, ``multiple_of`` and ``prices``. Raises :class:`~vramplan.PlanError`.

    >>> from vramplan import solve
    >>> solve({"model": "llama-3.1-8b", "method": "qlora", "gpu": "rtx-4090"}, "batch_size").batch_size > 0
    True
    """
    fields = job.model_dump(exclude_unset=True) if isinstance(job, Job) else job
    return Solved.model_validate(usecases.solve({**fields, **limits}, target))


def advise(job: Job | dict[str, Any]) -> Advice:
    """The changes that make a job fit its card, each planned. Raises :class:`~vramplan.PlanError`.

    >>> from vramplan import advise
    >>> advise({"model": "llama-3.1-70b", "method": "qlora", "gpu": "a6000"}).suggestions != []
    True
    """
    return Advice.model_validate(usecases.advise(job))


def compare(jobs: list[Job | dict[str, Any]]) -> Comparison:
    """Up to six jobs side by side; a job that cannot be planned has its error in its row.

    >>> from vramplan import compare
    >>> rows = compare([{"model": "llama-3.2-1b", "method": method} for method in ("lora", "qlora")]).rows
    >>> len(rows)
    2
    """
    return Comparison.model_validate(usecases.compare({"jobs": jobs}))
