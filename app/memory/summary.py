"""What is allocated and why: phases, the peak, its parts and the timeline, read off a replayed run.

Bytes are those of blocks, as ``torch.cuda.memory_allocated`` counts them, so the parts sum to the peak exactly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import PlanError
from .allocator.config import AllocatorConfig
from .events import KINDS, SETUP, Mark
from .template import ConcreteTrace, TraceTemplate, packed, unpacked

if TYPE_CHECKING:
    from .allocator.caching import Replay

HOLDERS = 24
"""How many holders of the peak are told."""
LOAD = "load"
"""The phase before the first step, whatever its marks are called."""


@dataclass(frozen=True)
class Phase:
    """One phase of one step, in bytes: allocated at its ``start`` and ``end``, the most allocated within (``peak``) and
    the most ``reserved``."""

    name: str
    step: int
    start: int
    end: int
    peak: int
    reserved: int


class TimelineSample(NamedTuple):
    """The highest moment of an interval of events: after ``event``, in ``module`` (its fqn).

    The fields' names are those of an answer's timeline.

    Bytes: ``allocated`` then, the most ``reserved`` in the interval, and ``kinds``, what each kind has allocated, in
    the order of :data:`KINDS`.
    """

    event: int
    phase: str
    step: int
    allocated: int
    reserved: int
    module: str
    kinds: tuple[int, ...]


@dataclass(frozen=True)
class MemorySummary:
    """What a run without a limit showed. All sizes are bytes.

    ``phases`` begin with the load. ``peak`` is the phase with the highest peak of all steps; ``peak_event``,
    ``peak_module`` and ``peak_op`` say where that is. ``parts`` is what is allocated then by kind (they sum to
    ``peak.peak``), ``holders`` the largest (module, kind, size), those of repeated layers as one. ``placed`` is what is
    allocated before the first step, ``reserved`` the most reserved from then on.
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
        """The summary as bytes, to be kept."""
        return packed(asdict(self))

    @staticmethod
    def load(data: bytes) -> MemorySummary:
        """What :meth:`dump` wrote. Raises :class:`ValueError` where it is damaged."""
        fields = unpacked(data)
        try:
            fields["phases"] = [Phase(**phase) for phase in fields["phases"]]
            fields["peak"] = Phase(**fields["peak"])
            fields["holders"] = [(module, kind, size) for module, kind, size in fields["holders"]]
            fields["timeline"] = [TimelineSample._make([*rest, tuple(kinds)]) for *rest, kinds in fields["timeline"]]
            return MemorySummary(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a summary: {error}") from None


def run_replay(concrete: ConcreteTrace, config: AllocatorConfig, limit_from: int = 0) -> Replay:
    """A run served by the allocator, with its limit from event ``limit_from`` on."""
    from .allocator.caching import replay  # compiled: 0.3 s to import

    return replay(concrete.template.replay_input, concrete.bytes, config, limit_from)


def summarize(concrete: ConcreteTrace, config: AllocatorConfig = AllocatorConfig()) -> MemorySummary:
    """Serve a run without a limit and say what it showed.

    Raises :class:`PlanError` where it takes more than the address space: no card's memory is so large.
    """
    from .allocator.caching import ADDRESS_SPACE

    template, run = concrete.template, run_replay(concrete, config)
    if run.served < template.events.size:
        raise PlanError(f"the step takes more than {ADDRESS_SPACE >> 50} PiB", "ask for a smaller batch or length")
    phases, begin = _phases(template, run)
    top = _peak_event(run, begin)
    timeline = _timeline(template, run)
    key = int(template.events[top])
    parts = next(sample.kinds for sample in timeline if sample.event == top)
    return MemorySummary(
        phases=phases,
        peak=max(phases[1:], key=lambda phase: phase.peak),
        peak_event=top,
        peak_module=template.fqns[template.fqn[key]],
        peak_op=template.ops[template.op[key]],
        parts={kind: size for kind, size in zip(KINDS, parts, strict=True) if size},
        holders=_holders(concrete, run.block_sizes, top),
        timeline=timeline,
        placed=[0, *run.allocated_after.tolist()][_placed_at(template, begin)],
        reserved=max(phase.reserved for phase in phases[1:]),
    )


def _placed_at(template: TraceTemplate, begin: int) -> int:
    """The interval before which the model is on the card. ``begin``: the first one of the steps.

    A trainer empties the cache while it works: with a trainer, the model is there when that is made, and what that
    makes itself when it is marked again. Else it is there when the cache is emptied last.
    """
    setups = [first for mark, first, _ in template.phase_spans if mark.name == SETUP]
    if setups:
        return setups[-1]
    if not template.empty_cache_events.size:
        return begin
    return int(np.searchsorted(template.replay_input.interval_bounds, template.empty_cache_events[-1]))


def _phases(template: TraceTemplate, run: Replay) -> tuple[list[Phase], int]:
    """The load and the phases of all steps; and the interval with which the first step begins."""
    allocated, reserved = ([0, *after.tolist()] for after in (run.allocated_after, run.reserved_after))
    peaks, most_reserved = run.peak.tolist(), run.peak_reserved.tolist()

    def phase(name: str, step: int, first: int, last: int) -> Phase:
        peak = max([allocated[first], *peaks[first:last]])
        return Phase(
            name, step, allocated[first], allocated[last], peak, max([reserved[first], *most_reserved[first:last]])
        )

    steps = [span for span in template.phase_spans if span[0].step]
    begin = steps[0][1] if steps else len(peaks)
    load = phase(LOAD, 0, 0, begin)
    return [load, *(phase(mark.name, mark.step, first, last) for mark, first, last in steps)], begin


def _peak_event(run: Replay, begin: int) -> int:
    """The event after which most is allocated, from the interval ``begin`` on.

    Where nothing is allocated from there on, it is the highest moment of the last interval that allocates.
    """
    peaks, events = run.peak.tolist(), run.peak_event.tolist()
    top = max(range(begin, len(peaks)), key=peaks.__getitem__, default=None)
    if top is None or events[top] < 0:
        top = max(n for n, event in enumerate(events) if event >= 0)
    return int(events[top])


def _timeline(template: TraceTemplate, run: Replay) -> list[TimelineSample]:
    """A sample for every interval in which something is allocated."""
    from .allocator.caching import tally

    peaks, events, most_reserved = run.peak.tolist(), run.peak_event.tolist(), run.peak_reserved.tolist()
    shown: list[tuple[int, Mark]] = [
        (n, mark) for mark, first, last in template.phase_spans for n in range(first, last) if events[n] >= 0
    ]
    moments = np.array([events[n] for n, _ in shown])
    kinds = tally(template.events, template.kind, run.block_sizes, moments, len(KINDS)).tolist()
    fqns = [template.fqns[index] for index in template.fqn[template.events[moments]].tolist()]
    return [
        TimelineSample(
            events[n], mark.name if mark.step else LOAD, mark.step, peaks[n], most_reserved[n], fqn, tuple(row)
        )
        for (n, mark), fqn, row in zip(shown, fqns, kinds, strict=True)
    ]


def alive_after(concrete: ConcreteTrace, event: int) -> npt.NDArray[np.int_]:
    """The allocations that are alive after ``event``, in ascending order."""
    template = concrete.template
    return np.flatnonzero((template.allocated_at <= event) & (template.freed_at > event))


def holders_after(concrete: ConcreteTrace, config: AllocatorConfig, event: int) -> list[tuple[str, str, int]]:
    """Who holds most after ``event``, as :attr:`MemorySummary.holders` says it of the peak."""
    return _holders(concrete, run_replay(concrete, config).block_sizes, event)


def _holders(concrete: ConcreteTrace, block_sizes: npt.NDArray[np.int64], event: int) -> list[tuple[str, str, int]]:
    """(module, kind, bytes) of the :data:`HOLDERS` largest after ``event``; the modules of repeated layers are one."""
    template, alive = concrete.template, alive_after(concrete, event)
    names, family = template.fqn_families
    cells = family[template.fqn[alive]] * len(KINDS) + template.kind[alive]
    sums = np.bincount(cells, block_sizes[alive], len(names) * len(KINDS)).astype(np.int64)
    largest = [cell for cell in np.argsort(-sums, kind="stable")[:HOLDERS].tolist() if sums[cell]]
    return [(names[cell // len(KINDS)], KINDS[cell % len(KINDS)], int(sums[cell])) for cell in largest]
