"""The answer to a script: the fields of an estimate, and which lines of the script hold the peak."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..catalog.gpus import Gpu
from ..job import OwnGpu
from ..memory.allocator.caching import round_size
from ..memory.allocator.config import AllocatorConfig
from ..memory.events import KINDS
from ..memory.fit import verdict_for
from ..memory.sizes import ShapePoint
from ..memory.summary import summarize
from ..memory.template import ConcreteTrace, TraceTemplate
from ..planning.cards import budget_on, every_card, id_of, outside_of, usable
from ..planning.estimate import holders_of, load_of, peak_of, phases_of, timeline_of
from ..planning.fingerprint import stack
from ..planning.resolve import chip_of
from .script_tracker import Line, ScriptTracker

LINES = 20
"""Lines of the script that are told at most."""
KIND = "script"
"""The kind of job by which measured errors are grouped: none was measured of scripts."""


def answer_of(tracker: ScriptTracker, card: Gpu | OwnGpu, expandable: bool = False) -> dict[str, Any]:
    """The answer to the script that ``tracker`` has recorded, on ``card``."""
    log = tracker.trace_log
    concrete = TraceTemplate.of(log.columns(), {}).at(ShapePoint(1, 1, chip_of(card)[1]))
    settings = AllocatorConfig(expandable_segments=expandable)
    summary = summarize(concrete, settings)
    cards = (card, *(other for other in every_card() if other != card))
    return {
        "script": _script(tracker, concrete, summary.peak_event),
        "peak": peak_of(summary, outside_of(card)),
        "load": load_of(summary),
        "optimizer_state": _state(tracker),
        "phases": phases_of(summary.phases),
        "parts": summary.parts,
        "holders": holders_of(summary.holders),
        "timeline": timeline_of(summary.timeline),
        "fits": [_fit(concrete, summary, settings, other) for other in cards],
        "warnings": _warnings(tracker),
        "stack": stack(),
    }


def _fit(concrete: ConcreteTrace, summary, settings: AllocatorConfig, card: Gpu | OwnGpu) -> dict[str, Any]:
    budget = budget_on(card, 0, summary.parts.get("kernel_workspace", 0))
    verdict = verdict_for(concrete, summary, budget, KIND, settings)
    named = {"gpu": id_of(card), "name": card.name, "memory_bytes": usable(card)}
    return {**named, **vars(verdict), "interval": list(verdict.interval), "cannot": []}


def _script(tracker: ScriptTracker, concrete: ConcreteTrace, event: int) -> dict[str, Any]:
    """What is told of the script alone: its steps, who holds the peak, what was stated."""
    held: Counter[tuple[Line, str]] = Counter()
    alive: set[int] = set()
    for key in concrete.template.events[: event + 1].tolist():
        alive ^= {key if key >= 0 else ~key}
    kinds, sizes = concrete.template.kind, concrete.sizes
    for key in alive:
        held[tracker.lines[key], KINDS[kinds[key]]] += round_size(int(sizes[key]))
    return {
        "path": tracker.script,
        "steps": tracker.finished,
        "lines": [
            {"line": str(line), "text": line.text, "kind": kind, "bytes": size}
            for (line, kind), size in held.most_common(LINES)
        ],
        "reads": [{"line": str(line), "text": line.text, "value": value} for line, value in tracker.reads.items()],
    }


def _state(tracker: ScriptTracker) -> int:
    columns = tracker.trace_log.columns()
    return int(columns.total_size(columns.keys_of("optimizer_state")))


def _warnings(tracker: ScriptTracker) -> list[str]:
    warnings = []
    if tracker.reads:
        warnings.append(
            f"{len(tracker.reads)} lines read a value of a tensor on the card, which a dry run does not have: each was "
            "told a stated one (script.reads)"
        )
    if not tracker.finished:
        warnings.append("no optimiser made a step: what is planned is what ran")
    return warnings
