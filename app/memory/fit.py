"""Does it fit: the allocator replayed under what a card leaves it, and the interval that the answer lies in. Bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .allocator.config import LARGE_BUFFER, AllocatorConfig
from .budget import MemoryBudget
from .events import KINDS
from .summary import MemorySummary, run_replay
from .template import ConcreteTrace

MIN_MARGIN = 10 * LARGE_BUFFER
"""Bytes: what may be missing or left over at least, however exact plans of this kind were.

A block that is placed elsewhere on the card costs or saves a large segment, and so do blocks that follow it. Of
measured steps whose every allocation was planned, the worst was off by 205520896 bytes (SmolLM-1.7B qlora in
``h200-settings.jsonl``), the second worst by 83886080.
"""


@dataclass(frozen=True)
class Measured:
    """How far measured steps of one kind were from their plans, in shares of the plan, rounded up.

    Of ``rows`` steps, peaks allocated and reserved, none was more than ``above`` above its plan or ``below`` below it.
    """

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
"""By kind of job: the H200's and the H100's steps in ``shared/measured`` and ``tests/measured``.

``tests/test_accuracy.py`` plans each again and fails where one lies outside.
"""
MIN_ROWS = 20
"""Measured steps from which on a kind's own errors are taken; with fewer, the worst of all kinds."""


def measured_of(kind: str) -> tuple[Measured, str]:
    """The errors of a kind of job, and the sentence that says where they come from."""
    own = MEASURED.get(kind, Measured(0, 0.0, 0.0))
    every = MEASURED.values()
    if own.rows >= MIN_ROWS:
        return own, f"of {own.rows} measured {kind} steps the worst took {own.above:.1%} more than planned"
    widest = Measured(sum(m.rows for m in every), max(m.above for m in every), max(m.below for m in every))
    few = f"{own.rows} steps of this kind were" if own.rows else "no step of this kind was"
    return widest, f"{few} measured; the worst of all {widest.rows} took {widest.above:.1%} more than planned"


@dataclass(frozen=True)
class Verdict:
    """``fits``, ``tight`` (inside the interval) or ``does_not_fit``. All sizes are bytes.

    ``limit`` is what the allocator may reserve, ``needed`` the most that it reserves without a limit. ``headroom`` is
    the limit less what is needed (negative: missing); where the allocator must give back its cache to stay within the
    limit, it is the limit less the allocated peak. ``interval`` has the least and the most that the headroom may be,
    ``margin`` how much of it may be missing and ``margin_source`` why. ``breaks`` is the phase that runs out of memory,
    ``breaks_on`` the kind that holds most there.
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


def fits_under_limit(concrete: ConcreteTrace, config: AllocatorConfig, placed: bool = False) -> tuple[bool, str | None]:
    """Whether the whole run is served within ``config.limit``; if not, the phase that runs out of memory.

    ``placed``: the model is on the card already, so the limit holds from the first step on.
    """
    template = concrete.template
    served = run_replay(concrete, config, template.first_step if placed else 0).served
    if served == template.events.size:
        return True, None
    mark = [mark for mark in template.marks if mark.at <= served][-1]
    return False, mark.name if mark.step else "load"


Passes = Callable[[ConcreteTrace, AllocatorConfig], tuple[bool, str | None]]
"""What answers as :func:`fits_under_limit`: it, or who remembers its answers."""


def verdict_for(
    concrete: ConcreteTrace,
    summary: MemorySummary,
    budget: MemoryBudget,
    kind: str,
    config: AllocatorConfig,
    passes: Passes = fits_under_limit,
) -> Verdict:
    """The verdict on a job of this ``kind`` (a key of :data:`MEASURED`) on a card with ``budget``.

    ``summary`` is that of ``concrete``, replayed without a limit. Whether the run passes under the limit (``passes``)
    is asked only where that limit lies between the allocated and the reserved peak: elsewhere the summary says enough.
    """
    load, limit = summary.phases[0], budget.limit
    allocated, needed = max(summary.peak.peak, load.peak), max(summary.reserved, load.reserved)
    error, source = measured_of(kind)
    margin = budget.slack_low + max(int(error.above * needed), MIN_MARGIN)
    surplus = budget.slack_high + max(int(error.below * needed), MIN_MARGIN)

    def verdict(word: str, headroom: int, breaks: str | None = None, on: str | None = None) -> Verdict:
        between = (headroom - margin, headroom + surplus)
        return Verdict(word, limit, needed, headroom, between, margin, f"{source}; {budget.source}", breaks, on)

    if needed <= limit:
        return verdict("fits" if needed + margin <= limit else "tight", limit - needed)
    if allocated <= limit:
        ok, breaks = passes(concrete, replace(config, limit=limit))
        if ok:
            return verdict("tight", limit - allocated)
    else:
        breaks = next(phase.name for phase in summary.phases if phase.peak > limit)
    return verdict("does_not_fit", limit - needed, breaks, breaks and _largest_part(summary, breaks))


def _largest_part(summary: MemorySummary, phase: str) -> str:
    """The kind that holds most at the highest moment of ``phase``."""
    samples = [sample for sample in summary.timeline if sample.phase == phase]
    kinds = max(samples, key=lambda sample: sample.allocated).kinds
    return KINDS[max(range(len(KINDS)), key=kinds.__getitem__)]
