"""What the same job takes with the other trainers, and why it differs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import PlanError
from ..job import Job, read_job
from ..registry.trainers import TRAINERS
from .fingerprint import NotTraced
from .planned_job import PlannedJob, fit_on, plan_job
from .tracer import TraceRequest, tracer


class _KnownOnly:
    """The tracer of whoever wants what is known already."""

    one_shot = True

    def trace(self, part: str, request: TraceRequest) -> bytes:
        """Nothing is traced."""
        raise NotTraced

    def later(self, part: str, request: TraceRequest) -> None:
        """Nothing is traced."""


def other_trainers(data: Any, *, trace: bool = True) -> list[dict[str, Any]]:
    """A row for each trainer that the job could have named instead, whose step can be planned: ``trainer``, ``peak``,
    ``verdict``, ``headroom``, and ``why``, what it does otherwise. Without ``trace`` only those that are known.

    A job says what it says to any trainer; what it leaves open is the trainer's own choice. Raises :class:`PlanError`
    where the job itself cannot be planned.
    """
    job = read_job(data)
    mine = plan_job(job)
    if mine.job.method == "inference" or job.trainer_args or job.objective != "sft":
        return []
    before = None if trace else tracer.set(_KnownOnly())
    try:
        return [*_rows(job, mine)]
    finally:
        if before is not None:
            tracer.reset(before)


def _rows(job: Job, mine: PlannedJob) -> Iterator[dict[str, Any]]:
    for name, row in TRAINERS.items():
        if name == mine.job.trainer or (row.chunks_loss and mine.facts["task"] != "causal-lm"):
            continue
        try:
            other = plan_job(job.model_copy(update={"trainer": name}))
        except PlanError:
            continue
        fit = fit_on(other, other.card)
        yield {
            "trainer": name,
            "peak": {"allocated": other.summary.peak.peak, "reserved": other.summary.reserved},
            "verdict": fit["verdict"],
            "headroom": fit["headroom"],
            "why": [*_differences(mine.job, other.job)],
        }


def _differences(mine: Job, other: Job) -> Iterator[str]:
    """What the other trainer does that this one does not: its own choices, and its way with the logits."""
    if mine.mixed_precision != other.mixed_precision:
        yield "no autocast" if other.mixed_precision == "no" else f"{other.mixed_precision} autocast"
    if mine.gradient_checkpointing != other.gradient_checkpointing:
        yield "no checkpointing" if other.gradient_checkpointing == "off" else "checkpointing"
    if mine.optimizer != other.optimizer:
        yield str(other.optimizer)
    if mine.prepare_for_kbit_training != other.prepare_for_kbit_training:
        yield "what is not quantised in float32" if other.prepare_for_kbit_training else "nothing cast to float32"
    if mine.whose.chunks_loss != other.whose.chunks_loss:
        yield "logits in tiles" if other.whose.chunks_loss else "all logits at once"
