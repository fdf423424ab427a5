"""What is alive and why: phases, the peak, its parts, and the timeline, read off a stream.

Bytes are those of blocks, as ``torch.cuda.memory_allocated`` counts them, so parts sum to the peak exactly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from app.memory.event import KINDS
from app.memory.rules import Settings
from app.memory.script import Stream, packed, unpacked
from app.memory.table import NUMBER

if TYPE_CHECKING:
    from app.memory.allocator import Replay

POINTS = 240
"""Points of a timeline: enough for a screen; each keeps the largest moment of its stretch."""
HOLDERS = 24


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
    """The stream served once.

    ``phases`` begin with the load; ``peak`` is the phase with the highest moment of all steps, ``parts`` what is alive
    in it by kind (they sum to ``peak.peak``), ``holders`` the largest by module, those that repeat as one. ``placed``
    is what lies there before the first step, ``reserved`` the most reserved from then on.
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

    def dump(self) -> bytes:
        return packed(asdict(self))

    @staticmethod
    def load(data: bytes) -> Reading:
        """What :meth:`dump` wrote. Raises :class:`ValueError` where it is damaged."""
        told = unpacked(data)
        try:
            return Reading(
                **{
                    **told,
                    "phases": [Phase(**phase) for phase in told["phases"]],
                    "peak": Phase(**told["peak"]),
                    "holders": [(module, kind, size) for module, kind, size in told["holders"]],
                    "timeline": [Point(**{**point, "kinds": tuple(point["kinds"])}) for point in told["timeline"]],
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a reading: {error}") from None


def replayed(stream: Stream, settings: Settings, limited: int = 0) -> Replay:
    """``stream`` served by the allocator, its limit from event ``limited`` on."""
    from app.memory.allocator import replay

    script = stream.script
    return replay(script.events, stream.sizes, settings, script.empties, limited, script.steady)


def read(stream: Stream, settings: Settings = Settings(), points: int = POINTS) -> Reading:
    """Serve ``stream`` without a limit and say what it showed."""
    from app.memory.allocator import tally

    script = stream.script
    events, marks = script.events, script.marks
    run = replayed(stream, settings)
    after = np.concatenate(([0], run.allocated))
    held = np.concatenate(([0], run.reserved))
    bounds = [*(mark.at for mark in marks), events.size]
    load = script.first_step
    phases = [Phase("load", 0, 0, int(after[load]), int(after[: load + 1].max()), int(held[: load + 1].max()))]
    for mark, end in zip(marks, bounds[1:]):
        if mark.step:
            span = slice(mark.at, end + 1)
            peaks = (int(after[span].max()), int(held[span].max()))
            phases.append(Phase(mark.name, mark.step, int(after[mark.at]), int(after[end]), *peaks))
    moments = _moments(
        events, run.allocated, [(mark.at, end) for mark, end in zip(marks, bounds[1:]) if mark.step], points
    )
    peak = max(phases[1:], key=lambda phase: phase.peak)
    peak_event = int(moments[np.argmax(run.allocated[moments])])
    kinds = tally(events, script.kind, run.blocks, moments, len(KINDS))
    steps = np.searchsorted([mark.at for mark in marks], moments, side="right") - 1
    names = script.module[events[moments]]
    rows = zip(moments.tolist(), steps.tolist(), names.tolist(), kinds.tolist())
    timeline = [
        Point(
            at,
            marks[step].name,
            marks[step].step,
            int(run.allocated[at]),
            int(run.reserved[at]),
            script.modules[name],
            tuple(row),
        )
        for at, step, name, row in rows
    ]
    entry = int(events[peak_event])
    parts = next(point.kinds for point in timeline if point.event == peak_event)
    return Reading(
        phases,
        peak,
        peak_event,
        script.modules[script.module[entry]],
        script.ops[script.op[entry]],
        {kind: size for kind, size in zip(KINDS, parts) if size},
        _holders(stream, run.blocks, peak_event),
        timeline,
        int(after[script.empties[-1]] if script.empties.size else after[load]),
        max(phase.reserved for phase in phases[1:]),
    )


def _moments(events: np.ndarray, allocated: np.ndarray, spans: list[tuple[int, int]], points: int) -> np.ndarray:
    """The events to show: of every stretch of a phase the one that takes memory with the most allocated after it."""
    stride = max(1, events.size // points)
    starts = np.concatenate([np.arange(start, end, stride) for start, end in spans])
    ends = np.concatenate([np.minimum(np.arange(start, end, stride) + stride, end) for start, end in spans])
    heights = np.where(events >= 0, allocated, -1)
    out = [start + int(heights[start:end].argmax()) for start, end in zip(starts.tolist(), ends.tolist())]
    out = [at for at in out if heights[at] >= 0]
    return np.array(out or np.flatnonzero(events >= 0)[-1:], np.int64)  # steps that take nothing: the last of the load


def alive_after(stream: Stream, event: int) -> np.ndarray:
    """The allocations that are alive after ``event``."""
    script = stream.script
    return np.flatnonzero((script.taken <= event) & (script.released > event))


def holders_after(stream: Stream, settings: Settings, event: int) -> list[tuple[str, str, int]]:
    """Who holds most after ``event``, as :attr:`Reading.holders` has it of the peak."""
    return _holders(stream, replayed(stream, settings).blocks, event)


def _holders(stream: Stream, blocks: np.ndarray, event: int) -> list[tuple[str, str, int]]:
    """Who holds most after ``event``: (module, kind, bytes), the largest first; modules that repeat are one."""
    script = stream.script
    alive = alive_after(stream, event)
    cells = script.module[alive].astype(np.int64) * len(KINDS) + script.kind[alive]
    found, where = np.unique(cells, return_inverse=True)
    sums = np.bincount(where, blocks[alive], found.size).astype(np.int64)
    together: dict[tuple[str, str], int] = {}
    for cell, size in zip(found.tolist(), sums.tolist()):
        key = _alike(script.modules[cell // len(KINDS)]), KINDS[cell % len(KINDS)]
        together[key] = together.get(key, 0) + size
    largest = sorted(together.items(), key=lambda pair: -pair[1])[:HOLDERS]
    return [(module, kind, size) for (module, kind), size in largest]


@lru_cache(maxsize=1 << 16)
def _alike(path: str) -> str:
    """A module's path with a star for its number in a list: ``model.layers.*.mlp``."""
    return NUMBER.sub(".*", path)
