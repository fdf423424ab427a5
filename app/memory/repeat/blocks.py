"""The whole run, written block by block as arrays of events.

A layer's events are the same numbers as its template's, but for where its own allocations and its neighbours' begin. So
all layers alike that follow each other are written at once: one row of an array for each.

- A *key* is the number of an allocation: in the short run, or in the whole.
- A *block* is what one layer does in one piece of one phase, or a stretch that no layer owns.
- A *part* names a piece: (number of the phase, number of the piece).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby, takewhile
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..events import EMPTY_CACHE, Mark, TraceLog
from .layer_map import LayerMap, Memo, WholeLayer
from .ownership import PhaseSpan
from .stacks import NotRepeatable
from .walks import FixedPiece, Walk

Part = tuple[int, int]
Block = tuple[Part, int, int]
"""A block of the short run: (part, stack, position)."""
AllocationName = tuple[Any, ...]
"""An allocation's name within its block, the same in all layers: (module as the layer sees it, op), occurrence."""
Ints = npt.NDArray[np.int_]


class AllocationOwner(NamedTuple):
    """The block that an allocation of the short run belongs to, and its name there."""

    part: Part
    stack: int
    position: int
    name: AllocationName


BlockFreed = tuple[tuple[Part, int, int, bool], Mapping[AllocationName, int]]
"""The first fields of a :class:`FreedGroup`, and the numbers of what that block allocates, by name."""


class FreedGroup(NamedTuple):
    """What a block frees that one block of one layer allocated.

    ``at`` are the indices of the frees among the block's events, ``numbers`` (same length) those of the allocations
    within the block that made them. ``layer`` counts from the layer that frees if it is ``relative``.
    """

    part: Part
    stack: int
    layer: int
    relative: bool
    at: Ints
    numbers: Ints


class BlockPlan(NamedTuple):
    """How a block is written for layers with equal neighbourhoods.

    ``source`` are the events of the short run that it repeats; ``allocating`` the indices in ``source`` of those that
    allocate, ``freeing_unowned`` of those that free what no layer owns. ``empty_caches``: after how many events
    ``empty_cache`` is called, and how often. ``fqns``: the modules that occur.
    """

    source: Ints
    allocating: Ints
    freed: list[FreedGroup]
    freeing_unowned: Ints
    empty_caches: list[tuple[int, int]]
    fqns: list[str]


class WrittenBlock(NamedTuple):
    """What was written at once: ``events`` has one row for each of ``layers``.

    Each row repeats the events ``source`` of the short run, of which ``allocations`` allocate.
    """

    events: npt.NDArray[np.int32]
    source: Ints
    layers: list[WholeLayer | None]
    allocations: int


def _name_allocations(
    trace_log: TraceLog, layer_map: LayerMap, stack: int, position: int, span: tuple[int, int]
) -> dict[int, AllocationName]:
    """Names for what a layer's block allocates, by key: those by which the same are found in the blocks of its like."""
    seen: Counter[AllocationName] = Counter()
    out = {}
    for event in trace_log.events[span[0] : span[1]]:
        if event < 0:
            continue
        entry = trace_log.allocations[event]
        found = layer_map.owner_of[entry.fqn]
        module: object = found
        if found is None:
            module = entry.fqn
        elif found.stack == stack:
            module = found.position - position, found.list_fqn, found.suffix
        what = module, entry.op
        out[event] = what, seen[what]
        seen[what] += 1
    return out


class BlockWriter:
    """Writes the whole run from the short one, in the order of its events.

    ``blocks`` and ``marks`` are what was written so far: ``events_written`` events, ``keys_written`` allocations.
    ``owners`` has, by key of the short run, whose an allocation is; None: no layer's. ``unowned_keys`` has, by key of
    the short run, the key of what no layer owns; ``single_keys`` that of what stands for itself alone (-1: for several,
    or not written yet).
    """

    def __init__(self, trace_log: TraceLog, layer_map: LayerMap):
        self.trace_log, self.layer_map = trace_log, layer_map
        self.owners: list[AllocationOwner | None] = [None] * len(trace_log.allocations)
        self.unowned_keys = np.full(len(trace_log.allocations), -1)
        self.single_keys = np.full(len(trace_log.allocations), -1)
        self.blocks: list[WrittenBlock] = []
        self.marks: list[Mark] = []
        self.events_written = self.keys_written = 0
        self._short_events = np.array(trace_log.events, np.int32)
        # The number of every allocation of a block, by its name.
        self._numbers: dict[Block, dict[AllocationName, int]] = {}
        # By part and stack: the first key of every layer's block; -1: it is not written yet.
        self._first_keys: dict[tuple[Part, int], Ints] = {}
        self._plans: dict[tuple[Any, ...], BlockPlan] = {}
        # By stack: how far away a layer is whose memory another one frees, at most.
        self._reach = [stack.radius for stack in layer_map.stacks]

    # --- what is written ------------------------------------------------------------------------------------

    def begin_phase(self, phase: PhaseSpan) -> None:
        """Write the mark of a phase, and the calls of ``empty_cache`` before its first event."""
        self.marks.append(Mark(self.events_written, phase.mark.name, phase.mark.step))
        self._mark_empty_caches(self.events_written, phase.empty_caches.get(phase.start - 1, 0), phase)

    def write_fixed(self, part: Part, piece: FixedPiece, phase: PhaseSpan) -> None:
        """Write what no layer owns."""
        self._write(part, (piece.start, piece.end), [None], phase, True)

    def write_walk(self, part: Part, walk: Walk, phase: PhaseSpan) -> None:
        """Write a block for every layer of a stack. What several layers share is freed by the last of those alike."""
        stack, templates = walk.stack, self.layer_map.templates[walk.stack]
        for position, span in walk.blocks.items():
            names = _name_allocations(self.trace_log, self.layer_map, stack, position, span)
            self._numbers[part, stack, position] = {name: number for number, name in enumerate(names.values())}
            for key, name in names.items():
                self.owners[key] = AllocationOwner(part, stack, position, name)
        order = range(len(templates))[:: walk.direction]
        last = {templates[layer]: layer for layer in order}
        alike = groupby(order, lambda layer: (templates[layer], last[templates[layer]] == layer))
        for (position, final), layers in alike:
            if position in walk.blocks:
                self._write(part, walk.blocks[position], [(stack, layer) for layer in layers], phase, final)

    def _write(
        self, part: Part, span: tuple[int, int], layers: list[WholeLayer | None], phase: PhaseSpan, final: bool
    ) -> None:
        """Write a block as each of ``layers`` with one template. Only a ``final`` one frees what no layer owns."""
        while layers:
            plan = self._plans.get((span, final, self._neighbourhood_key(layers[0])))
            if plan is None:
                plan = self._plan(span, layers[0], phase.empty_caches, final)
                # The key is asked again: while it was planned, the block may have reached further than any before.
                self._plans[span, final, self._neighbourhood_key(layers[0])] = plan
            key = self._neighbourhood_key(layers[0])
            alike = [*takewhile(lambda layer: self._neighbourhood_key(layer) == key, layers)]  # noqa: B023 - called here
            self._repeat(part, plan, alike, phase)
            layers = layers[len(alike) :]

    def _neighbourhood_key(self, layer: WholeLayer | None) -> tuple[Any, ...] | None:
        """What decides how a layer's template is written for it: the templates around it, as far as blocks reach."""
        if layer is None:
            return None
        stack, at = layer
        templates, reach = self.layer_map.templates[stack], self._reach[stack]
        return stack, *templates[max(0, at - reach) : at], None, *templates[at : at + reach + 1]

    def _repeat(self, part: Part, plan: BlockPlan, layers: list[WholeLayer | None], phase: PhaseSpan) -> None:
        """Write a block as each of ``layers``, which have equal neighbourhoods."""
        for layer in layers:
            names = self.layer_map.names_in(layer)
            for fqn in plan.fqns:
                names[fqn]  # raises NotRepeatable where the module has no counterpart
        source, count = self._short_events[plan.source], plan.allocating.size
        events = np.tile(source, (len(layers), 1))
        first_keys = self.keys_written + count * np.arange(len(layers))
        events[:, plan.allocating] = first_keys[:, None] + np.arange(count)
        self._note_keys(part, source[plan.allocating], first_keys, layers)
        self._free_unowned(events, source, plan)
        self._free_of_layers(events, source, plan, layers)
        self.blocks.append(WrittenBlock(events, plan.source, layers, count))
        for row in range(len(layers) if plan.empty_caches else 0):
            for after, times in plan.empty_caches:
                self._mark_empty_caches(self.events_written + row * source.size + after, times, phase)
        self.keys_written += count * len(layers)
        self.events_written += events.size

    def _note_keys(
        self, part: Part, allocated: npt.NDArray[np.int32], first_keys: Ints, layers: list[WholeLayer | None]
    ) -> None:
        """Note the keys of what the blocks of ``layers`` allocate, for those who free it later."""
        keys = first_keys[0] + np.arange(allocated.size)
        layer = layers[0]
        if layer is None:
            self.unowned_keys[allocated] = keys
        else:
            stack = layer[0]
            if (part, stack) not in self._first_keys:
                self._first_keys[part, stack] = np.full(len(self.layer_map.templates[stack]), -1)
            self._first_keys[part, stack][_layer_numbers(layers)] = first_keys
        if self.layer_map.is_single(layer):
            self.single_keys[allocated] = keys

    def _free_unowned(self, events: npt.NDArray[np.int32], source: npt.NDArray[np.int32], plan: BlockPlan) -> None:
        """Write the frees of what no layer owns. Raises :class:`NotRepeatable` where it is not there."""
        freed = ~source[plan.freeing_unowned]
        keys = self.unowned_keys[freed]
        if keys.size and keys.min() < 0:
            raise self.freed_too_often(int(freed[keys.argmin()]))
        events[:, plan.freeing_unowned] = ~keys

    def _free_of_layers(
        self,
        events: npt.NDArray[np.int32],
        source: npt.NDArray[np.int32],
        plan: BlockPlan,
        layers: list[WholeLayer | None],
    ) -> None:
        """Write the frees of what layers allocated. Raises :class:`NotRepeatable` where it is not there."""
        numbers = _layer_numbers(layers)
        for group in plan.freed:
            owners = numbers + group.layer if group.relative else np.array([group.layer])
            first_keys = self._first_keys.get((group.part, group.stack), np.zeros(0, int))
            if owners.min() < 0 or owners.max() >= first_keys.size or first_keys[owners].min() < 0:
                raise self.freed_too_often(int(~source[group.at[0]]))
            events[:, group.at] = ~(first_keys[owners][:, None] + group.numbers)

    def _mark_empty_caches(self, at: int, times: int, phase: PhaseSpan) -> None:
        self.marks += [Mark(at, EMPTY_CACHE, phase.mark.step)] * times

    def freed_too_often(self, key: int) -> NotRepeatable:
        """The error that the whole would free more of the short run's allocation ``key`` than it allocated."""
        entry = self.trace_log.allocations[key]
        return NotRepeatable(f"more layers free {entry.op} of {entry.fqn or 'the model'} than allocate it")

    # --- how it is written ----------------------------------------------------------------------------------

    def _plan(
        self, span: tuple[int, int], layer: WholeLayer | None, empty_caches: Mapping[int, int], final: bool
    ) -> BlockPlan:
        """How the block of the short run's events ``span`` is written for ``layer`` and those like it."""
        source: list[int] = []
        allocating, freeing_unowned, marks = [], [], []
        fqns: dict[str, None] = {}
        freed: dict[Block, tuple[list[int], list[int]]] = {}
        blocks: Memo[Block, BlockFreed] = Memo(lambda block: self._block_freed(block, layer))
        for at in range(*span):
            event, index = self.trace_log.events[at], len(source)
            owner = self.owners[~event] if event < 0 else None
            if event >= 0:
                allocating.append(index)
                fqns[self.trace_log.allocations[event].fqn] = None
            elif owner is not None:
                block = owner[:3]
                number = blocks[block][1].get(owner.name)
                if number is None:
                    raise self.freed_too_often(~event)
                indices, numbers = freed.setdefault(block, ([], []))
                indices.append(index)
                numbers.append(number)
            elif final:
                freeing_unowned.append(index)
            else:  # left out: the last of the layers alike frees it
                if at in empty_caches:
                    marks.append((index, empty_caches[at]))
                continue
            source.append(at)
            fqns[self.trace_log.event_fqns[at]] = None
            if at in empty_caches:
                marks.append((index + 1, empty_caches[at]))
        groups = [FreedGroup(*blocks[block][0], _ints(at), _ints(numbers)) for block, (at, numbers) in freed.items()]
        return BlockPlan(_ints(source), _ints(allocating), groups, _ints(freeing_unowned), marks, [*fqns])

    def _block_freed(self, block: Block, layer: WholeLayer | None) -> BlockFreed:
        """Of which block ``layer`` frees where its template frees of ``block``."""
        part, stack, position = block
        counterpart = self.layer_map.counterpart(stack, position, layer)
        numbers = self._numbers.get((part, stack, self.layer_map.templates[stack][counterpart]), {})
        if layer is not None and layer[0] == stack:
            away = counterpart - layer[1]
            if away == self.layer_map.distance(position, layer):
                self._reach[stack] = max(self._reach[stack], abs(away))
                return (part, stack, away, True), numbers
        return (part, stack, counterpart, False), numbers


def _layer_numbers(layers: Iterable[WholeLayer | None]) -> Ints:
    """The layers without their stack; 0 where no layer owns the block."""
    return np.array([0 if layer is None else layer[1] for layer in layers])


def _ints(values: list[int]) -> Ints:
    return np.array(values, int)
