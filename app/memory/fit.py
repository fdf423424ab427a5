"""Does it fit: the replayed allocator under a card's bytes, with the interval that the answer lies in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .allocator.config import LARGE_BUFFER, AllocatorConfig
from .budget import MemoryBudget
from .events import KINDS
from .summary import MemorySummary, run_replay
from .template import ConcreteTrace

LEAST = 10 * LARGE_BUFFER
"""The least that an interval is wide: a block that finds its place elsewhere takes or spares a large segment, and so do
those that follow it. The most measured was 205520896 bytes (SmolLM-1.7B qlora in ``h200-settings.jsonl``; the second
83886080), of steps whose every allocation was planned."""


@dataclass(frozen=True)
class Measured:
    """How far real steps of one kind were from their plans: of ``rows`` steps, peaks allocated and reserved, the worst
    lay ``above`` and the worst lay ``below`` its plan, as shares of the plan, rounded up."""

    rows: int
    above: float
    below: float


MEASURED = {
    "full": Measured(36, 0.003, 0.018),
    "lora": Measured(42, 0.010, 0.003),
    "qlora": Measured(40, 0.001, 0.010),
    "int8": Measured(2, 0.013, 0.0),
    "inference": Measured(3, 0.001, 0.0),
}
"""By kind of job: the H200's and the H100's steps in ``shared/measured`` and ``tests/measured``;
``tests/test_accuracy.py`` plans each again and fails where one lies outside."""
ENOUGH = 20
"""Rows from which a kind speaks for itself; with fewer, the worst of all kinds is taken."""


def measured_of(kind: str) -> tuple[Measured, str]:
    """The errors of a kind of job, and the sentence that says where they come from."""
    known = MEASURED.get(kind, Measured(0, 0.0, 0.0))
    every = MEASURED.values()
    if known.rows >= ENOUGH:
        return known, f"of {known.rows} measured {kind} steps the worst took {known.above:.1%} more than planned"
    widest = Measured(sum(m.rows for m in every), max(m.above for m in every), max(m.below for m in every))
    few = f"{known.rows} steps of this kind were" if known.rows else "no step of this kind was"
    return widest, f"{few} measured; the worst of all {widest.rows} took {widest.above:.1%} more than planned"


@dataclass(frozen=True)
class Verdict:
    """``fits``, ``tight`` (inside the interval) or ``does_not_fit``; bytes throughout.

    ``limit`` is what the allocator may reserve there, ``needed`` what it reserves left alone, ``headroom`` what is left
    of the limit (negative: missing; where the allocator must give back its cache, less the allocated peak),
    ``interval`` what the headroom lies between, ``margin`` how much of it may be missing and ``margin_source`` why.
    ``breaks`` is the phase that runs out of memory, ``breaks_on`` the kind that holds most there.
    """

    verdict: str
    limit: int
    needed: int
    headroom: int
    interval: tuple[int, int]
    margin: int
    margin_source: str
    breaks: str | None = None
    breaks_on: str | None = None


def fits_under_limit(
    concrete: ConcreteTrace, settings: AllocatorConfig, placed: bool = False
) -> tuple[bool, str | None]:
    """Whether every event of ``stream`` is served within ``settings.limit``; else the phase that is not.

    ``placed``: the model lies there already, the limit holds from the first step on.
    """
    template = concrete.template
    served = run_replay(concrete, settings, template.first_step if placed else 0).served
    if served == template.events.size:
        return True, None
    mark = [mark for mark in template.marks if mark.at <= served][-1]
    return False, mark.name if mark.step else "load"


Passes = Callable[[ConcreteTrace, AllocatorConfig], tuple[bool, str | None]]


def verdict_for(
    concrete: ConcreteTrace,
    summary: MemorySummary,
    budget: MemoryBudget,
    kind: str,
    settings: AllocatorConfig,
    passes: Passes = fits_under_limit,
) -> Verdict:
    """The verdict on a job of this ``kind`` (a key of :data:`MEASURED`) for a card with ``budget``.

    ``summary`` is that of ``concrete`` without a limit. The replay under the limit (``passes``) is asked only where the
    summary leaves the answer open: between the allocated and the reserved peak.
    """
    load, limit = summary.phases[0], budget.limit
    allocated, needed = max(summary.peak.peak, load.peak), max(summary.reserved, load.reserved)
    error, source = measured_of(kind)
    margin = budget.slack_low + max(int(error.above * needed), LEAST)
    spare = budget.slack_high + max(int(error.below * needed), LEAST)

    def verdict(word: str, headroom: int, breaks: str | None = None, on: str | None = None) -> Verdict:
        between = (headroom - margin, headroom + spare)
        return Verdict(word, limit, needed, headroom, between, margin, f"{source}; {budget.source}", breaks, on)

    if needed <= limit:
        return verdict("fits" if needed + margin <= limit else "tight", limit - needed)
    if allocated <= limit:
        ok, where = passes(concrete, replace(settings, limit=limit))
        if ok:
            return verdict("tight", limit - allocated)
    else:
        where = next(phase.name for phase in summary.phases if phase.peak > limit)
    return verdict("does_not_fit", limit - needed, where, _largest_part(summary, where))


def _largest_part(summary: MemorySummary, phase: str) -> str:
    """The kind that holds most at the highest moment of ``phase``."""
    moments = [point for point in summary.timeline if point.phase == phase]
    held = max(moments, key=lambda point: point.allocated).kinds
    return KINDS[max(range(len(KINDS)), key=held.__getitem__)]
