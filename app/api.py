"""The public API: functions from a job to a typed answer, safe to call from any thread.

A job is a :class:`~vramplan.Job` or a dict of its fields; both are the wire format of the HTTP API and of ``--job``
files. What cannot be planned raises :class:`~vramplan.PlanError`, whose ``message`` says why and whose ``hint`` says
what to do. Without the packages of the ``[trace]`` extra, only jobs that were traced before can be planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import usecases
from .job import Job
from .schema import Advice, Answer, Comparison, Solved

JobLike = Job | dict[str, Any]
"""A job, or the dict of its fields."""


def plan(job: JobLike, *, all_layers: bool = False) -> Answer:
    """The answer to one job: peaks, parts, phases and layers in bytes, and a verdict for each card.

    ``all_layers`` lists repeated layers one by one. Raises :class:`~vramplan.PlanError`.

    >>> from vramplan import Job, plan
    >>> answer = plan(Job(model="llama-3.1-8b", method="qlora", sequence_length=1024, gpu="rtx-4090"))
    >>> answer.peak.allocated == sum(answer.parts.values())
    True
    >>> answer.fits[0].name, answer.fits[0].verdict
    ('GeForce RTX 4090', 'fits')
    """
    return Answer.model_validate(usecases.plan(job, all_layers=all_layers))


def solve(
    job: JobLike,
    target: str = "batch_size",
    *,
    memory_limit_bytes: int | None = None,
    multiple_of: int | None = None,
    prices: dict[str, float] | None = None,
) -> Solved:
    """The largest ``target`` of a job that fits its card: ``batch_size``, ``sequence_length``, ``r``,
    ``accumulation_free_batch``; or the smallest ``gpu``, the fewest cards (``gpu_count``) or the largest ``model``.

    ``memory_limit_bytes`` is what the allocator may hold, where the job's card is not meant; ``multiple_of`` restricts
    the values that are tried; ``prices`` by card rank the cards for ``gpu``. Raises :class:`~vramplan.PlanError`.

    >>> from vramplan import solve
    >>> solve({"model": "llama-3.1-8b", "method": "qlora"}, "gpu").gpu
    'rtx-4060'
    >>> job = {"model": "gpt2", "method": "full", "sequence_length": 256}
    >>> solve(job, "batch_size", memory_limit_bytes=4 << 30).batch_size > 1
    True
    """
    fields = job.model_dump(exclude_unset=True) if isinstance(job, Job) else job
    limits = {"memory_limit_bytes": memory_limit_bytes, "multiple_of": multiple_of, "prices": prices}
    given = {name: value for name, value in limits.items() if value is not None}
    return Solved.model_validate(usecases.solve({**fields, **given}, target))


def advise(job: JobLike) -> Advice:
    """The changes that make a job fit its card, each planned. Raises :class:`~vramplan.PlanError`.

    >>> from vramplan import advise
    >>> job = {"model": "llama-3.2-1b", "method": "full", "trainer": "transformers", "gpu": "t4"}
    >>> advice = advise({**job, "sequence_length": 2048})
    >>> advice.now.verdict
    'does_not_fit'
    >>> [option.change for option in advice.suggestions if option.title == "gradient checkpointing"]
    [{'gradient_checkpointing': 'non_reentrant'}]
    """
    return Advice.model_validate(usecases.advise(job))


def compare(jobs: Sequence[JobLike]) -> Comparison:
    """Up to six jobs side by side; a job that cannot be planned has its error in its row.

    >>> from vramplan import compare
    >>> rows = compare([{"model": "llama-3.2-1b", "method": method} for method in ("lora", "qlora")]).rows
    >>> rows[0].peak["allocated"] > rows[1].peak["allocated"]
    True
    """
    return Comparison.model_validate(usecases.compare({"jobs": list(jobs)}))
