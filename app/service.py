"""The answer to one job: its peaks, parts, layers and verdicts as the wire format has them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from app.calibration import warnings_of
from app.cards import every_card, outside_of
from app.errors import PlanError
from app.job import read_job
from app.memory.breakdown import holders_after
from app.memory.event import KINDS
from app.plan import generalise, stack
from app.weigh import after, card_warnings, fit_on, weigh


def estimate(data: Any, *, all_layers: bool = False) -> dict:
    """The answer to one job: a dict of the fields of the wire format. Raises :class:`PlanError`."""
    weighing = weigh(read_job(data))
    generalise(weighing.job, weighing.config, weighing.card)
    job, card, reading = weighing.job, weighing.card, weighing.reading
    facts = weighing.facts
    outside = outside_of(card)
    others = [other for other in every_card() if other != card]
    fits = [fit_on(weighing, other) for other in (card, *others)]
    following, unknown = None, []
    try:
        following = after(weighing)
    except PlanError as error:
        unknown = [error.message]
    layers = weighing.profile.table.at(*weighing.point, all_layers)
    load = reading.phases[0]
    return {
        "job": {**job.model_dump(exclude={"config"}, mode="json"), "attention": facts["attention"]},
        "model": {**weighing.source, **{key: fact for key, fact in facts.items() if key != "optimizer_state"}},
        "peak": {
            "allocated": reading.peak.peak,
            "reserved": reading.reserved,
            "process": reading.reserved + outside.expected,
            "process_interval": [reading.reserved + outside.low, reading.reserved + outside.high],
            "phase": reading.peak.name,
            "step": reading.peak.step,
            "module": reading.peak_module,
            "op": reading.peak_op,
        },
        "load": {"placed_allocated": reading.placed, "peak_allocated": load.peak, "peak_reserved": load.reserved},
        "optimizer_state": facts["optimizer_state"],
        "phases": [
            {
                "step": phase.step,
                "name": phase.name,
                "allocated_start": phase.start,
                "allocated_end": phase.end,
                "peak_allocated": phase.peak,
                "peak_reserved": phase.reserved,
            }
            for phase in reading.phases
        ],
        "parts": reading.parts,
        "holders": _told(reading.holders),
        "timeline": {
            "kinds": list(KINDS),
            "points": [
                {**{k: v for k, v in point._asdict().items() if k != "kinds"}, "bytes": list(point.kinds)}
                for point in reading.timeline
            ],
        },
        "layers": [layer._asdict() for layer in layers],
        "fits": fits,
        "after": asdict(following) if following else None,
        "warnings": [*weighing.profile.warnings, *card_warnings(job, card), *warnings_of(card), *unknown],
        "stack": stack(),
    }


def alive(data: Any, event: int) -> list[dict]:
    """Who holds most after an event of a job's timeline, as ``holders`` of its answer. Raises :class:`PlanError`."""
    weighing = weigh(read_job(data))
    if not 0 <= event < weighing.stream.script.events.size:
        raise PlanError(f"the step has no event {event}", "take one of the answer's timeline")
    return _told(holders_after(weighing.stream, weighing.settings, event))


def _told(holders: list[tuple[str, str, int]]) -> list[dict]:
    return [{"module": module, "kind": kind, "bytes": size} for module, kind, size in holders]
