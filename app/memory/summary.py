"""What is alive and why: phases, the peak, its parts, and the timeline, read off a stream.

Bytes are those of blocks, as ``torch.cuda.memory_allocated`` counts them, so parts sum to the peak exactly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import PlanError
from .allocator.config import AllocatorConfig
from .events import KINDS
from .template import ConcreteTrace, packed, unpacked

if TYPE_CHECKING:
    from .allocator.caching import Replay

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


class TimelineSample(NamedTuple):
    """A moment: after ``event``, what each kind holds (bytes, in the order of ``KINDS``), and where it was."""

    event: int
    phase: str
    step: int
    allocated: int
    reserved: int
    module: str
    kinds: tuple[int, ...]


@dataclass(frozen=True)
class MemorySummary:
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
    timeline: list[TimelineSample]
    placed: int
    reserved: int

    def dump(self) -> bytes:
        return packed(asdict(self))

    @staticmethod
    def load(data: bytes) -> MemorySummary:
        """What :meth:`dump` wrote. Raises :class:`ValueError` where it is damaged."""
        told = unpacked(data)
        try:
            return MemorySummary(
                **{
                    **told,
                    "phases": [Phase(**phase) for phase in told["phases"]],
                    "peak": Phase(**told["peak"]),
                    "holders": [(module, kind, size) for module, kind, size in told["holders"]],
                    "timeline": [TimelineSample(*point, tuple(kinds)) for *point, kinds in told["timeline"]],
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a reading: {error}") from None


def run_replay(concrete: ConcreteTrace, settings: AllocatorConfig, limited: int = 0) -> Replay:
    """``stream`` served by the allocator, its limit from event ``limited`` on."""
    from .allocator.caching import replay

    return replay(concrete.template.replay_input, concrete.bytes, settings, limited)


def summarize(concrete: ConcreteTrace, settings: AllocatorConfig = AllocatorConfig()) -> MemorySummary:
    """Serve ``stream`` without a limit and say what it showed. Raises :class:`PlanError`: no memory is so large."""
    from .allocator.caching import ADDRESS_SPACE, tally

    template, run = concrete.template, run_replay(concrete, settings)
    if run.served < template.events.size:
        raise PlanError(f"the step takes more than {ADDRESS_SPACE >> 50} PiB", "ask for a smaller batch or length")
    left, kept = ([0, *column.tolist()] for column in (run.allocated_after, run.reserved_after))
    peaks, events, most = run.peak.tolist(), run.peak_event.tolist(), run.peak_reserved.tolist()

    def phase(name: str, step: int, first: int, last: int) -> Phase:
        peak, reserved = max([left[first], *peaks[first:last]]), max([kept[first], *most[first:last]])
        return Phase(name, step, left[first], left[last], peak, reserved)

    steps = [(mark, *span) for mark, *span in template.spans if mark.step]
    begin = steps[0][1] if steps else len(peaks)
    phases = [phase(LOAD, 0, 0, begin), *(phase(mark.name, mark.step, *span) for mark, *span in steps)]
    # The highest moment of the steps; where they take nothing, the last one of the load
    top = max(range(begin, len(peaks)), key=peaks.__getitem__, default=0)
    if not steps or events[top] < 0:
        top = max(n for n, event in enumerate(events) if event >= 0)
    shown = [(n, mark) for mark, first, last in template.spans for n in range(first, last) if events[n] >= 0]
    moments = np.array([events[n] for n, _ in shown])
    kinds = tally(template.events, template.kind, run.block_sizes, moments, len(KINDS)).tolist()
    modules = [template.fqns[name] for name in template.fqn[template.events[moments]].tolist()]
    timeline = [
        TimelineSample(events[n], mark.name if mark.step else LOAD, mark.step, peaks[n], most[n], module, tuple(row))
        for (n, mark), module, row in zip(shown, modules, kinds)
    ]
    entry = int(template.events[events[top]])
    parts = next(point.kinds for point in timeline if point.event == events[top])
    return MemorySummary(
        phases,
        max(phases[1:], key=lambda phase: phase.peak),
        events[top],
        template.fqns[template.fqn[entry]],
        template.ops[template.op[entry]],
        {kind: size for kind, size in zip(KINDS, parts) if size},
        _holders(concrete, run.block_sizes, events[top]),
        timeline,
        left[
            int(np.searchsorted(template.replay_input.interval_bounds, template.empty_cache_events[-1]))
            if template.empty_cache_events.size
            else begin
        ],
        max(phase.reserved for phase in phases[1:]),
    )


def alive_after(concrete: ConcreteTrace, event: int) -> np.ndarray:
    """The allocations that are alive after ``event``."""
    template = concrete.template
    return np.flatnonzero((template.taken <= event) & (template.released > event))


def holders_after(concrete: ConcreteTrace, settings: AllocatorConfig, event: int) -> list[tuple[str, str, int]]:
    """Who holds most after ``event``, as :attr:`MemorySummary.holders` has it of the peak."""
    return _holders(concrete, run_replay(concrete, settings).block_sizes, event)


def _holders(concrete: ConcreteTrace, blocks: np.ndarray, event: int) -> list[tuple[str, str, int]]:
    """Who holds most after ``event``: (module, kind, bytes), the largest first; modules that repeat are one."""
    template, alive = concrete.template, alive_after(concrete, event)
    names, of = template.families
    cells = of[template.fqn[alive]] * len(KINDS) + template.kind[alive]
    sums = np.bincount(cells, blocks[alive], len(names) * len(KINDS)).astype(np.int64)
    largest = [cell for cell in np.argsort(-sums, kind="stable")[:HOLDERS].tolist() if sums[cell]]
    return [(names[cell // len(KINDS)], KINDS[cell % len(KINDS)], int(sums[cell])) for cell in largest]
