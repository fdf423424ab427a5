"""The whole run that a short one is expanded to, and the proof that a deeper run is nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..events import Mark, TraceColumns, TraceLog
from ..sizes import Number
from .as_log import columns_of, log_of
from .blocks import BlockWriter, WrittenBlock
from .layer_map import LayerMap
from .ownership import Owner, chunks_of, phases_of
from .stacks import NotRepeatable, Stack
from .walks import FixedPiece, pieces_of


@dataclass(frozen=True, eq=False)
class Expansion:
    """A run of the whole model: for every event, which one of ``short_log`` it repeats and in which layer.

    ``marks`` are those of the whole. ``single_keys`` has, by key of the short run, the key in the whole of what stands
    for itself alone (-1: it stands for several); ``growth``, by key of the short run, the bytes by which such an
    allocation is larger in the whole.
    """

    short_log: TraceLog
    layer_map: LayerMap
    blocks: list[WrittenBlock]
    marks: list[Mark]
    single_keys: npt.NDArray[np.int_]
    growth: Mapping[int, Number]

    @cached_property
    def events(self) -> npt.NDArray[np.int32]:
        """The events of the whole, as :attr:`TraceLog.events` (int32)."""
        return np.concatenate([np.zeros(0, np.int32), *(block.events.ravel() for block in self.blocks)])

    @cached_property
    def short_events(self) -> npt.NDArray[np.int32]:
        """The events of the short run (int32)."""
        return np.array(self.short_log.events, np.int32)

    @cached_property
    def short_keys(self) -> npt.NDArray[np.int32]:
        """By key of the whole, the key of the short run that it repeats (int32)."""
        sources = [(self.short_events[block.source], len(block.layers)) for block in self.blocks]
        keys = (np.tile(events[events >= 0], times) for events, times in sources)
        return np.concatenate([np.zeros(0, np.int32), *keys])

    def trace_log(self) -> TraceLog:
        """The whole run entry by entry."""
        return log_of(self)

    def columns(self) -> TraceColumns:
        """The whole run as arrays."""
        return columns_of(self)


def expand(trace_log: TraceLog, stacks: Sequence[Stack], growth: Mapping[int, Number] | None = None) -> Expansion:
    """The run of the whole stacks, from the log of a short one.

    ``growth`` has, by key of an allocation that stands for itself alone, the bytes by which it is larger in the whole.
    Raises :class:`NotRepeatable` where an event has no meaning in the whole. Whether the whole model really does this
    is for the caller to test, with a second run of another depth: :func:`growth_of`, :func:`same`.
    """
    from .checks import check_all_run, check_freed  # they read an expansion

    layer_map = LayerMap(stacks)
    writer = BlockWriter(trace_log, layer_map)
    ran: set[Owner] = set()
    for serial, phase in enumerate(phases_of(trace_log)):
        writer.begin_phase(phase)
        chunks = chunks_of(trace_log, phase, layer_map.owner_of)
        if phase.mark.name == "forward":
            ran.update(chunk.owner for chunk in chunks if chunk.allocates and chunk.owner is not None)
        for number, piece in enumerate(pieces_of(chunks, phase.mark.name, stacks)):
            if isinstance(piece, FixedPiece):
                writer.write_fixed((serial, number), piece, phase)
            else:
                writer.write_walk((serial, number), piece, phase)
    out = Expansion(trace_log, layer_map, writer.blocks, writer.marks, writer.single_keys, growth or {})
    check_freed(out, writer)
    check_all_run(out, ran)
    return out


def same(trace_log: TraceLog, other: TraceLog) -> bool:
    """Whether two logs are the same, event for event.

    Frees with no allocation between them may stand in any order: no allocator can tell, and a deep autograd graph is
    torn down in another order than a shallow one.
    """
    return (
        trace_log.allocations == other.allocations
        and trace_log.marks == other.marks
        and len(trace_log.events) == len(other.events)
        and (
            (trace_log.events == other.events and trace_log.event_fqns == other.event_fqns)
            or _with_sorted_frees(trace_log) == _with_sorted_frees(other)
        )
    )


def _with_sorted_frees(trace_log: TraceLog) -> list[tuple[int, str]]:
    """Events and their modules; frees with neither an allocation nor a mark between them in ascending order."""
    marks = {mark.at for mark in trace_log.marks}
    out: list[tuple[int, str]] = []
    frees: list[tuple[int, str]] = []
    for at, entry in enumerate(zip(trace_log.events, trace_log.event_fqns, strict=True)):
        if frees and (entry[0] >= 0 or at in marks):
            out += sorted(frees)
            frees.clear()
        (out if entry[0] >= 0 else frees).append(entry)
    return out + sorted(frees)


def growth_of(trace_log: TraceLog, stacks: Sequence[Stack], whole: TraceLog) -> dict[int, Number]:
    """By how many bytes allocations that stand for themselves alone are larger in ``whole`` than in ``trace_log``.

    Keyed as ``growth`` in :func:`expand`. Raises :class:`NotRepeatable` where ``whole`` differs from the expanded
    ``trace_log`` in anything else.
    """
    expansion = expand(trace_log, stacks)
    out = expansion.trace_log()
    if same(out, whole):
        return {}
    if len(out.allocations) != len(whole.allocations):
        raise NotRepeatable(f"{len(out.allocations)} allocations expected, {len(whole.allocations)} made")
    short_key = {key: short for short, key in enumerate(expansion.single_keys.tolist()) if key >= 0}
    growth: dict[int, Number] = {}
    for key, (expected, made) in enumerate(zip(out.allocations, whole.allocations, strict=True)):
        if expected.size != made.size:
            if key not in short_key:
                raise NotRepeatable(f"{made.op} of {made.fqn}: {expected.size} bytes expected, {made.size} allocated")
            growth[short_key[key]] = made.size - expected.size
    if not growth or not same(expand(trace_log, stacks, growth).trace_log(), whole):
        raise NotRepeatable("the events of a deeper run are others than expected")
    return growth
