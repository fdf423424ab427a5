"""Plan and measurement, event by event: what is in both, what is in one only, and by how many bytes.

Phases are told apart by their marks, which both logs have. Within a phase both are sequences of sizes, forward also of
modules, and their longest common subsequence pairs the allocations. What is left is paired by size, wherever it stands
in its phase; and what then stands between two pairs in both, stands for each other with another size. Sizes are
compared as blocks, in multiples of 512 bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from rapidfuzz.distance import LCSseq

from ..memory.allocator.caching import round_size
from ..memory.events import EMPTY_CACHE, TraceLog


@dataclass(frozen=True)
class Difference:
    """Bytes about which plan and measurement disagree at the measured peak: whose, what for, and since which phase.

    ``planned`` and ``measured`` are bytes alive there; ``op`` is the plan's operator, or the function that asked.
    """

    module: str
    kind: str
    phase: str
    op: str
    planned: int
    measured: int


@dataclass(frozen=True)
class Match:
    """``pairs`` maps measured allocations to planned ones of one size; the rest are bytes at the measured peak.

    ``share`` is the part of the bytes alive at the measured peak that is alive in the plan at that moment too, as the
    same event. ``events`` are how many allocations both have, ``planned_only`` and ``measured_only`` how many one has.
    """

    pairs: dict[int, int]
    share: float
    alive: int
    matched: int
    differences: list[Difference]
    events: int
    planned_only: int
    measured_only: int


def compare(plan: TraceLog, measured: TraceLog) -> Match:
    """Hold ``measured`` against ``plan``."""
    pairs, stands_for = pair(plan, measured)
    moment = _peak(measured)
    alive = _alive(measured, moment)
    expected = _alive(plan, _moment_in_plan(plan, measured, pairs, moment))
    total = sum(round_size(measured.allocations[key].size) for key in alive)
    both = {key for key in alive if pairs.get(key) in expected}
    matched = sum(round_size(measured.allocations[key].size) for key in both)
    differences = _differences(plan, measured, alive - both, expected - {pairs[key] for key in both}, stands_for)
    steps = _allocations_of_steps(measured)
    planned = _allocations_of_steps(plan)
    known = sum(key in pairs for key in steps)
    return Match(
        pairs, matched / total if total else 1.0, total, matched, differences,
        known, len(planned) - known, len(steps) - known,
    )  # fmt: skip


def labelled(plan: TraceLog, measured: TraceLog, match: Match) -> TraceLog:
    """``measured`` with the kinds and modules of the plan's events, where they are paired."""
    allocations = list(measured.allocations)
    for key, twin in match.pairs.items():
        known = plan.allocations[twin]
        own = allocations[key]
        allocations[key] = own._replace(kind=known.kind, fqn=known.fqn or own.fqn)
    return TraceLog(allocations, measured.events, measured.event_fqns, measured.marks)


WITH_MODULES = ("forward", "generate")
"""Phases in which the card knows the module of an allocation; in backward, autograd's own thread runs no module."""


# --- pairing ------------------------------------------------------------------------------------------------


def pair(plan: TraceLog, measured: TraceLog) -> tuple[dict[int, int], dict[int, int]]:
    """Measured allocation to planned one: of equal size; and of another size, standing in the same place."""
    pairs: dict[int, int] = {}
    stands_for: dict[int, int] = {}
    theirs = _segments(plan)
    for name, mine in _segments(measured).items():
        other = theirs.get(name, [])
        by_module = name[1] in WITH_MODULES
        equal = [
            (mine[step.src_start + n], other[step.dest_start + n])
            for step in LCSseq.opcodes(_signs(measured, mine, by_module), _signs(plan, other, by_module))
            if step.tag == "equal"
            for n in range(step.src_end - step.src_start)
        ]
        pairs.update(equal)
        left_mine = _left(mine, {a for a, _ in equal})
        left_other = _left(other, {b for _, b in equal})
        waiting: dict[int, list[int]] = {}
        for key in left_other:
            waiting.setdefault(round_size(plan.allocations[key].size), []).append(key)
        for key in left_mine:  # the same in another order
            same = waiting.get(round_size(measured.allocations[key].size))
            if same:
                pairs[key] = same.pop(0)
        free = {key for keys in waiting.values() for key in keys}
        there = _by_place(left_other)
        for place, keys in _by_place(left_mine).items():  # another size in the same place
            open_there = [key for key in there.get(place, ()) if key in free]
            stands_for.update(zip((key for key in keys if key not in pairs), open_there, strict=False))
    return pairs, stands_for


def _signs(trace_log: TraceLog, keys: list[int], by_module: bool) -> list:
    """What an allocation is known by: its block, and where the card knows it too, the module that ran."""
    entries = [trace_log.allocations[key] for key in keys]
    return [hash((round_size(e.size), e.fqn)) if by_module else round_size(e.size) for e in entries]


def _left(keys: list[int], paired: set[int]) -> dict[int, int]:
    """What is not paired, each with the number of pairs before it."""
    out, before = {}, 0
    for key in keys:
        if key in paired:
            before += 1
        else:
            out[key] = before
    return out


def _by_place(left: dict[int, int]) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for key, place in left.items():
        out.setdefault(place, []).append(key)
    return out


def _segments(trace_log: TraceLog) -> dict[tuple, list[int]]:
    """The allocations of each phase, in order, by (step, phase, how often it came before); the load is one."""
    out: dict[tuple, list[int]] = {}
    seen: Counter = Counter()
    marks = [mark for mark in trace_log.marks if mark.name != EMPTY_CACHE]
    ends = [mark.at for mark in marks[1:]] + [len(trace_log.events)]
    for mark, end in zip(marks, ends, strict=False):
        name = (0, "load", 0) if mark.step == 0 else (mark.step, mark.name, seen[mark.step, mark.name])
        seen[mark.step, mark.name] += mark.step > 0
        out.setdefault(name, []).extend(event for event in trace_log.events[mark.at : end] if event >= 0)
    return out


def _allocations_of_steps(trace_log: TraceLog) -> list[int]:
    return [key for name, keys in _segments(trace_log).items() if name[0] in (1, 2) for key in keys]


# --- the peak -----------------------------------------------------------------------------------------------


def _peak(trace_log: TraceLog) -> int:
    """The event after which most is alive, in the steps."""
    start = next((mark.at for mark in trace_log.marks if mark.step > 0), 0)
    now = best = where = 0
    for at, event in enumerate(trace_log.events):
        size = round_size(trace_log.allocations[event if event >= 0 else ~event].size)
        now += size if event >= 0 else -size
        if at >= start and now > best:
            best, where = now, at
    return where


def _alive(trace_log: TraceLog, moment: int) -> set[int]:
    alive: set[int] = set()
    for event in trace_log.events[: moment + 1]:
        if event >= 0:
            alive.add(event)
        else:
            alive.discard(~event)
    return alive


def _moment_in_plan(plan: TraceLog, measured: TraceLog, pairs: dict[int, int], moment: int) -> int:
    """Where the plan takes what was taken last before ``moment``, and is known to both."""
    position = {event: at for at, event in enumerate(plan.events) if event >= 0}
    for event in reversed(measured.events[: moment + 1]):
        if event in pairs:
            return position[pairs[event]]
    return len(plan.events) - 1


def _differences(plan, measured, mine: set[int], theirs: set[int], stands_for) -> list[Difference]:
    """What is alive in one only, by module, kind and phase; what stands for each other, together."""
    rows: dict[tuple, list[int]] = {}
    twins = {stands_for[key]: key for key in mine if stands_for.get(key) in theirs}
    names: dict[int, tuple] = {}
    for key in theirs:
        entry = plan.allocations[key]
        name = (entry.fqn, entry.kind, entry.phase, entry.op)
        names[key] = name
        rows.setdefault(name, [0, 0])[0] += round_size(entry.size)
    for key in mine:
        twin = stands_for.get(key)
        entry = measured.allocations[key]
        name = names[twin] if twin in twins else (entry.fqn, entry.kind, entry.phase, entry.op)
        rows.setdefault(name, [0, 0])[1] += round_size(entry.size)
    found = [Difference(*name, *sizes) for name, sizes in rows.items() if sizes[0] != sizes[1]]
    return sorted(found, key=lambda row: -abs(row.planned - row.measured))


def as_dict(match: Match, limit: int = 40) -> dict:
    """What an answer says of a match."""
    return {
        "share": match.share,
        "alive_at_peak": match.alive,
        "matched_at_peak": match.matched,
        "differences": [asdict(row) for row in match.differences[:limit]],
        "events": match.events,
        "planned_only": match.planned_only,
        "measured_only": match.measured_only,
    }
