"""What is alive and why: phases, the peak, its parts, and the timeline, read off a stream.

Bytes are those of blocks, as ``torch.cuda.memory_allocated`` counts them, so parts sum to the peak exactly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from app.errors import PlanError
from app.memory.event import KINDS
from app.memory.rules import Settings
from app.memory.script import Stream, packed, unpacked

if TYPE_CHECKING:
    from app.memory.allocator import Replay

HOLDERS = 24
LOAD = "load"


@dataclass(frozen=True)
class Phase:
    """One phase of one step: ``allocated`` at its start and end, and the peaks within. Bytes."""

    name: str
    step: int
    start: int
    end: int
    peak: int
    reserved: int


class Point(NamedTuple):
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
                    "timeline": [Point(*point, tuple(kinds)) for *point, kinds in told["timeline"]],
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a reading: {error}") from None


def replayed(stream: Stream, settings: Settings, limited: int = 0) -> Replay:
    """``stream`` served by the allocator, its limit from event ``limited`` on."""
    from app.memory.allocator import replay

    return replay(stream.script.course, stream.bytes, settings, limited)


def read(stream: Stream, settings: Settings = Settings()) -> Reading:
    """Serve ``stream`` without a limit and say what it showed. Raises :class:`PlanError`: no memory is so large."""
    from app.memory.allocator import ADDRESSES, tally

    script, run = stream.script, replayed(stream, settings)
    if run.served < script.events.size:
        raise PlanError(f"the step takes more than {ADDRESSES >> 50} PiB", "ask for a smaller batch or length")
    left, kept = ([0, *column.tolist()] for column in (run.left, run.kept))
    peaks, events, most = run.peak.tolist(), run.event.tolist(), run.most.tolist()

    def phase(name: str, step: int, first: int, last: int) -> Phase:
        peak, reserved = max([left[first], *peaks[first:last]]), max([kept[first], *most[first:last]])
        return Phase(name, step, left[first], left[last], peak, reserved)

    steps = [(mark, *span) for mark, *span in script.spans if mark.step]
    begin = steps[0][1] if steps else len(peaks)
    phases = [phase(LOAD, 0, 0, begin), *(phase(mark.name, mark.step, *span) for mark, *span in steps)]
    # The highest moment of the steps; where they take nothing, the last one of the load
    top = max(range(begin, len(peaks)), key=peaks.__getitem__, default=0)
    if not steps or events[top] < 0:
        top = max(n for n, event in enumerate(events) if event >= 0)
    shown = [(n, mark) for mark, first, last in script.spans for n in range(first, last) if events[n] >= 0]
    moments = np.array([events[n] for n, _ in shown])
    kinds = tally(script.events, script.kind, run.blocks, moments, len(KINDS)).tolist()
    modules = [script.modules[name] for name in script.module[script.events[moments]].tolist()]
    timeline = [
        Point(events[n], mark.name if mark.step else LOAD, mark.step, peaks[n], most[n], module, tuple(row))
        for (n, mark), module, row in zip(shown, modules, kinds)
    ]
    entry = int(script.events[events[top]])
    parts = next(point.kinds for point in timeline if point.event == events[top])
    return Reading(
        phases,
        max(phases[1:], key=lambda phase: phase.peak),
        events[top],
        script.modules[script.module[entry]],
        script.ops[script.op[entry]],
        {kind: size for kind, size in zip(KINDS, parts) if size},
        _holders(stream, run.blocks, events[top]),
        timeline,
        left[int(np.searchsorted(script.course.cuts, script.empties[-1])) if script.empties.size else begin],
        max(phase.reserved for phase in phases[1:]),
    )


def alive_after(stream: Stream, event: int) -> np.ndarray:
    """The allocations that are alive after ``event``."""
    script = stream.script
    return np.flatnonzero((script.taken <= event) & (script.released > event))


def holders_after(stream: Stream, settings: Settings, event: int) -> list[tuple[str, str, int]]:
    """Who holds most after ``event``, as :attr:`Reading.holders` has it of the peak."""
    return _holders(stream, replayed(stream, settings).blocks, event)


def _holders(stream: Stream, blocks: np.ndarray, event: int) -> list[tuple[str, str, int]]:
    """Who holds most after ``event``: (module, kind, bytes), the largest first; modules that repeat are one."""
    script, alive = stream.script, alive_after(stream, event)
    names, of = script.families
    cells = of[script.module[alive]] * len(KINDS) + script.kind[alive]
    sums = np.bincount(cells, blocks[alive], len(names) * len(KINDS)).astype(np.int64)
    largest = [cell for cell in np.argsort(-sums, kind="stable")[:HOLDERS].tolist() if sums[cell]]
    return [(names[cell // len(KINDS)], KINDS[cell % len(KINDS)], int(sums[cell])) for cell in largest]
