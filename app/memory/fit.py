"""Does it fit: the replayed allocator under a card's bytes, with the interval that the answer lies in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from app.memory.allocator import CachingAllocator, OutOfMemory, Settings
from app.memory.breakdown import Reading
from app.memory.event import EMPTY_CACHE, Books
from app.memory.overheads import Context

ALLOCATOR_ERROR = 0.02
"""How far the replayed reserved peak may lie from a card's, as a share of it: the 95th percentile of the measured
rows in the README's table, rounded up. A step inside it is called tight."""


@dataclass(frozen=True)
class Verdict:
    """``fits``, ``tight`` (inside the interval) or ``does_not_fit``; bytes throughout.

    ``limit`` is what the allocator may reserve there, ``headroom`` that less the reserved peak (negative: missing),
    ``margin`` half the interval, ``breaks`` the phase that runs out of memory.
    """

    verdict: str
    limit: int
    headroom: int
    margin: int
    breaks: str | None


def passes(books: Books, settings: Settings, placed: bool = False) -> tuple[bool, str | None]:
    """Whether every event of ``books`` is served within ``settings.limit``; else the phase that is not.

    ``placed``: the model lies there already, the limit holds from the first step on.
    """
    allocator = CachingAllocator(replace(settings, limit=None) if placed else settings)
    sizes = [allocation.size for allocation in books.allocations]
    bounds = [mark.at for mark in books.marks[1:]] + [len(books.events)]
    for mark, end in zip(books.marks, bounds):
        if mark.name == EMPTY_CACHE:
            allocator.empty_cache()
        elif mark.step:
            allocator.settings = settings
        try:
            for at in range(mark.at, end):
                event = books.events[at]
                if event >= 0:
                    allocator.malloc(event, sizes[event])
                else:
                    allocator.free(~event)
        except OutOfMemory:
            return False, "load" if mark.step == 0 else mark.name
    return True, None


def judge(books: Books, reading: Reading, usable: int, context: Context, settings: Settings) -> Verdict:
    """The verdict for a card with ``usable`` bytes, of which ``context`` is gone before the allocator starts.

    ``reading`` is that of ``books`` without a limit. The replay under the limit is asked only where it leaves the
    answer open: between the allocated and the reserved peak.
    """
    limit = usable - context.expected
    load = reading.phases[0]
    allocated, needed = max(reading.peak.peak, load.peak), max(reading.reserved, load.reserved)
    margin = int(ALLOCATOR_ERROR * reading.reserved) + (context.high - context.expected)
    if needed <= limit:
        return Verdict("fits" if needed + margin <= limit else "tight", limit, limit - needed, margin, None)
    if allocated <= limit:
        bounded = Settings(settings.expandable_segments, settings.max_split_size, limit)
        ok, where = passes(books, bounded)
        if ok:
            return Verdict("tight", limit, limit - allocated, margin, None)
    else:
        where = next(phase.name for phase in reading.phases if phase.peak > limit)
    return Verdict("does_not_fit", limit, limit - needed, margin, where)
