"""The answer to one job: its peaks, parts, layers and verdicts as the wire format has them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..errors import PlanError
from ..job import read_job
from ..memory.budget import Context
from ..memory.events import KINDS
from ..memory.summary import MemorySummary, Phase, TimelineSample, holders_after
from .calibration import warnings_of
from .cards import every_card, outside_of
from .fingerprint import stack, stack_warnings
from .idle_fields import idle_fields
from .planned_job import After, PlannedJob, after, card_warnings, fit_on, plan_job
from .profile_cache import trace_general_later

BESIDE = ("optimizer_state", "rank_classes", "host")
"""Facts of a profile that are no facts of the model."""


def estimate(data: Any, *, all_layers: bool = False) -> dict:
    """The answer to one job: a dict of the fields of the wire format. Raises :class:`PlanError`."""
    asked = read_job(data)
    planned = plan_job(asked)
    trace_general_later(planned.job, planned.config, planned.card)
    job, card, summary, facts = planned.job, planned.card, planned.summary, planned.facts
    following, unknown = _following(planned)
    layers = planned.profile.table.at(planned.point, all_layers)
    others = [other for other in every_card() if other != card]
    idle = idle_fields(asked, facts, planned.profile.warnings)
    about_card = (*card_warnings(job, card), *warnings_of(card), *stack_warnings())
    warnings = [*planned.profile.warnings, *idle, *about_card, *unknown]
    answer = {
        "job": {**job.model_dump(exclude={"config"}, mode="json"), "attention": facts["attention"]},
        "model": {**planned.source, **{key: fact for key, fact in facts.items() if key not in BESIDE}},
        "peak": peak_of(summary, outside_of(card, job)),
        "load": load_of(summary),
        "optimizer_state": facts["optimizer_state"],
        "phases": phases_of(summary.phases),
        "parts": summary.parts,
        "holders": holders_of(summary.holders),
        "timeline": timeline_of(summary.timeline),
        "layers": [layer._asdict() for layer in layers],
        "fits": [fit_on(planned, other) for other in (card, *others)],
        "after": asdict(following) if following else None,
        "warnings": warnings,
        "stack": stack(),
    }
    return answer if planned.ranks is None else answer | _ranks(planned)


def _ranks(planned: PlannedJob) -> dict[str, Any]:
    """The classes of ranks of a job on many cards, and what its nodes hold."""
    return {"ranks": [_rank(one) for one in planned.classes], "host": planned.facts.get("host", {})}


def _rank(planned: PlannedJob) -> dict[str, Any]:
    """What the ranks of one class take: the fields of an answer that differ from rank to rank."""
    summary, ranks = planned.summary, planned.ranks
    assert ranks is not None  # a plan of many cards
    return {
        "class": ranks.name,
        "ranks": [ranks.first, ranks.last],
        "peak": peak_of(summary, outside_of(planned.card, planned.job)),
        "load": load_of(summary),
        "optimizer_state": planned.facts["optimizer_state"],
        "phases": phases_of(summary.phases),
        "parts": summary.parts,
        "holders": holders_of(summary.holders),
    }


def _following(planned: PlannedJob) -> tuple[After | None, list[str]]:
    """What follows the training; where it cannot be planned None, and the reason as a warning."""
    try:
        return after(planned), []
    except PlanError as error:
        return None, [error.message]


def peak_of(summary: MemorySummary, outside: Context) -> dict[str, Any]:
    """The highest moment as the answer's object; ``outside``: what the process holds beside the allocator."""
    return {
        "allocated": summary.peak.peak,
        "reserved": summary.reserved,
        "process": summary.reserved + outside.expected,
        "process_interval": [summary.reserved + outside.low, summary.reserved + outside.high],
        "phase": "generate" if summary.peak.name in PASSES else summary.peak.name,
        "step": summary.peak.step,
        "module": summary.peak_module,
        "op": summary.peak_op,
    }


def load_of(summary: MemorySummary) -> dict[str, int]:
    """What the model holds before the first step, and the peak while it loads."""
    load = summary.phases[0]
    return {"placed_allocated": summary.placed, "peak_allocated": load.peak, "peak_reserved": load.reserved}


PASSES = ("generate", "prefill", "decode")
"""Phases of a generation, which enters them again for each token: one row each. A peak within is the generation's."""


def phases_of(phases: list[Phase]) -> list[dict[str, Any]]:
    """The phases as rows, in the order in which they begin."""
    rows: dict[Any, dict[str, Any]] = {}
    for number, phase in enumerate(phases):
        row = _phase(phase)
        known = rows.setdefault((phase.step, phase.name) if phase.name in PASSES else number, row)
        known["allocated_end"] = row["allocated_end"]
        for peak in ("peak_allocated", "peak_reserved"):
            known[peak] = max(known[peak], row[peak])
    return [*rows.values()]


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "step": phase.step,
        "name": phase.name,
        "allocated_start": phase.start,
        "allocated_end": phase.end,
        "peak_allocated": phase.peak,
        "peak_reserved": phase.reserved,
    }


def timeline_of(samples: list[TimelineSample]) -> dict[str, Any]:
    """The step's moments: bytes alive by kind."""
    return {"kinds": list(KINDS), "points": [_sample(sample) for sample in samples]}


def _sample(sample: TimelineSample) -> dict[str, Any]:
    fields = sample._asdict()
    return {**{name: value for name, value in fields.items() if name != "kinds"}, "bytes": list(sample.kinds)}


def alive(data: Any, event: int) -> list[dict]:
    """Who holds most after an event of a job's timeline, as ``holders`` of its answer. Raises :class:`PlanError`."""
    planned = plan_job(read_job(data))
    if not 0 <= event < planned.concrete.template.events.size:
        raise PlanError(f"the step has no event {event}", "take one of the answer's timeline")
    return holders_of(holders_after(planned.concrete, planned.settings, event))


def holders_of(holders: list[tuple[str, str, int]]) -> list[dict]:
    """Who holds most, as rows."""
    return [{"module": module, "kind": kind, "bytes": size} for module, kind, size in holders]
