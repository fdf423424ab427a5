"""What is alive and why: phases, the peak, its parts, and the timeline, read off the books.

Bytes are those of blocks, as ``torch.cuda.memory_allocated`` counts them, so parts sum to the peak exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.memory.allocator import CachingAllocator, Settings
from app.memory.event import EMPTY_CACHE, KINDS, Books

POINTS = 240
"""Points of a timeline: enough for a screen; each keeps the largest moment of its stretch."""


@dataclass(frozen=True)
class Phase:
    """One phase of one step: ``allocated`` at its start and end, and the peaks within. Bytes."""

    name: str
    step: int
    start: int
    end: int
    peak: int
    reserved: int


@dataclass(frozen=True)
class Point:
    """A moment: after ``event``, what each kind holds (bytes, in the order of ``KINDS``), and where it was."""

    event: int
    phase: str
    step: int
    allocated: int
    reserved: int
    module: str
    kinds: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """The books read once through the allocator.

    ``phases`` begin with the load; ``peak`` is the phase with the highest moment of all steps, ``parts`` what is alive
    in it by kind (they sum to ``peak.peak``), ``holders`` the largest by module. ``placed`` is what lies there before
    the first step, ``reserved`` the most ever reserved.
    """

    phases: list[Phase]
    peak: Phase
    peak_event: int
    peak_module: str
    peak_op: str
    parts: dict[str, int]
    holders: list[tuple[str, str, int]]
    timeline: list[Point]
    placed: int
    reserved: int


def read(books: Books, settings: Settings = Settings(), points: int = POINTS) -> Reading:
    """Replay ``books``. Raises :class:`~app.memory.allocator.OutOfMemory` under a limit that they do not keep."""
    allocator = CachingAllocator(settings)
    allocations, events = books.allocations, books.events
    index = {kind: i for i, kind in enumerate(KINDS)}
    alive = [0] * len(KINDS)
    phases: list[Phase] = []
    timeline: list[Point] = []
    best = (-1, -1)
    live: dict[int, int] = {}
    placed = 0
    bounds = [mark.at for mark in books.marks[1:]] + [len(events)]
    stride = max(1, len(events) // points)
    for mark, end in zip(books.marks, bounds):
        loading = mark.step == 0
        if mark.name == EMPTY_CACHE:
            allocator.empty_cache()
            placed = allocator.allocated
        start = allocator.allocated
        if not loading:
            allocator.reset_peaks()
        high = (-1, None)
        for at in range(mark.at, end):
            event = events[at]
            if event >= 0:
                entry = allocations[event]
                if not entry.size:
                    continue
                before = allocator.allocated
                allocator.malloc(event, entry.size)
                size = allocator.allocated - before
                live[event] = size
                alive[index[entry.kind]] += size
                if allocator.allocated > best[0] and not loading:
                    best = (allocator.allocated, at)
                if allocator.allocated > high[0]:
                    high = (allocator.allocated, (at, allocator.reserved, entry.module, tuple(alive)))
            else:
                size = live.pop(~event, None)
                if size is not None:
                    alive[index[allocations[~event].kind]] -= size
                    allocator.free(~event)
            if not loading and at % stride == 0 and high[1]:
                timeline.append(Point(high[1][0], mark.name, mark.step, high[0], *high[1][1:]))
                high = (-1, None)
        if high[1] and not loading:
            timeline.append(Point(high[1][0], mark.name, mark.step, high[0], *high[1][1:]))
        ends = (allocator.allocated, allocator.peak_allocated, allocator.peak_reserved)
        if loading:
            phases[:1] = [Phase("load", 0, 0, *ends)]
        else:
            phases.append(Phase(mark.name, mark.step, start, *ends))
    peak = max(phases[1:], key=lambda phase: phase.peak)
    parts, holders = _alive_at(books, settings, best[1])
    entry = allocations[events[best[1]]]
    return Reading(
        phases, peak, best[1], entry.module, entry.op, parts, holders, timeline, placed, allocator.peak_reserved
    )


def _alive_at(books: Books, settings: Settings, last: int) -> tuple[dict[str, int], list[tuple[str, str, int]]]:
    """The parts by kind, and the largest holders as (module, kind, bytes), after event ``last``."""
    allocator = CachingAllocator(settings)
    live: dict[int, int] = {}
    caches = [mark.at for mark in books.marks if mark.name == EMPTY_CACHE]
    for at, event in enumerate(books.events[: last + 1]):
        while caches and caches[0] == at:
            caches.pop(0)
            allocator.empty_cache()
        if event >= 0:
            before = allocator.allocated
            allocator.malloc(event, books.allocations[event].size)
            live[event] = allocator.allocated - before
        else:
            live.pop(~event, None)
            allocator.free(~event)
    parts: dict[str, int] = {}
    holders: dict[tuple[str, str], int] = {}
    for key, size in live.items():
        entry = books.allocations[key]
        parts[entry.kind] = parts.get(entry.kind, 0) + size
        holder = (entry.module, entry.kind)
        holders[holder] = holders.get(holder, 0) + size
    assert sum(parts.values()) == allocator.allocated
    largest = sorted(((module, kind, size) for (module, kind), size in holders.items()), key=lambda h: -h[2])[:24]
    return {kind: parts[kind] for kind in KINDS if parts.get(kind)}, largest
