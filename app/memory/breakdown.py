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
    blocks = [0] * len(allocations)
    phases: list[Phase] = []
    highs: list[tuple[int, int, int, str, int]] = []
    best = placed = 0
    peak_event = -1
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
        for low in range(mark.at, end, stride):
            high, where, held = -1, low, 0
            for at in range(low, min(low + stride, end)):
                event = events[at]
                if event < 0:
                    allocator.free(~event)
                    continue
                before = allocator.allocated
                allocator.malloc(event, allocations[event].size)
                now = allocator.allocated
                blocks[event] = now - before
                if now > high:
                    high, where, held = now, at, allocator.reserved
            if not loading and high >= 0:
                highs.append((where, high, held, mark.name, mark.step))
                if high > best:
                    best, peak_event = high, where
        ends = (allocator.allocated, allocator.peak_allocated, allocator.peak_reserved)
        if loading:
            phases[:1] = [Phase("load", 0, 0, *ends)]
        else:
            phases.append(Phase(mark.name, mark.step, start, *ends))
    peak = max(phases[1:], key=lambda phase: phase.peak)
    timeline, parts, holders = _alive_at(books, blocks, highs, peak_event)
    entry = allocations[events[peak_event]]
    return Reading(
        phases, peak, peak_event, entry.module, entry.op, parts, holders, timeline, placed, allocator.peak_reserved
    )


def _alive_at(books: Books, blocks: list[int], highs: list[tuple[int, int, int, str, int]], last: int):
    """The timeline at the events of ``highs``; and after event ``last`` the parts by kind, and the largest holders as
    (module, kind, bytes). ``blocks`` are the bytes of each allocation's block."""
    index = {kind: i for i, kind in enumerate(KINDS)}
    kinds = [index[allocation.kind] for allocation in books.allocations]
    alive = [0] * len(KINDS)
    live: set[int] = set()
    timeline: list[Point] = []
    parts: dict[str, int] = {}
    holders: dict[tuple[str, str], int] = {}
    start = 0
    for where, allocated, reserved, phase, step in highs:
        for event in books.events[start : where + 1]:
            if event >= 0:
                live.add(event)
                alive[kinds[event]] += blocks[event]
            elif ~event in live:
                live.remove(~event)
                alive[kinds[~event]] -= blocks[~event]
        start = where + 1
        assert sum(alive) == allocated
        module = books.allocations[books.events[where]].module
        timeline.append(Point(where, phase, step, allocated, reserved, module, tuple(alive)))
        if where == last:
            parts = {kind: size for kind, size in zip(KINDS, alive) if size}
            for key in live:
                holder = (books.allocations[key].module, books.allocations[key].kind)
                holders[holder] = holders.get(holder, 0) + blocks[key]
    largest = sorted(((module, kind, size) for (module, kind), size in holders.items()), key=lambda h: -h[2])[:24]
    return timeline, parts, largest
