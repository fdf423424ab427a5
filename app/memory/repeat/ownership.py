"""Whose an event of the short run is: phases, and within them chunks of events that belong to one layer or to none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..events import EMPTY_CACHE, Mark, TraceLog
from .stacks import NotRepeatable, Stack

Owner = tuple[int, int]
"""A layer of the short run: (index of its stack, position)."""


class FqnOwner(NamedTuple):
    """The layer of the short run that a module belongs to, with its name taken apart.

    ``model.layers.2.mlp`` has the ``list_fqn`` ``model.layers``, the ``position`` 2 and the ``suffix`` ``.mlp``.
    """

    stack: int
    position: int
    list_fqn: str
    suffix: str

    @property
    def owner(self) -> Owner:
        """The layer alone."""
        return self.stack, self.position


def owner_of_fqn(fqn: str, stacks: Sequence[Stack]) -> FqnOwner | None:
    """The layer that the module ``fqn`` belongs to; None: it is outside every stack."""
    for number, stack in enumerate(stacks):
        for list_fqn in stack.list_fqns:
            if fqn.startswith(list_fqn + "."):
                index, dot, rest = fqn[len(list_fqn) + 1 :].partition(".")
                if index.isdecimal() and int(index) < len(stack.short_types):
                    return FqnOwner(number, int(index), list_fqn, dot + rest)
    return None


class PhaseSpan(NamedTuple):
    """One phase of the short run: the mark that begins it, and its events from ``start`` to before ``end``.

    ``empty_caches`` says after which events ``empty_cache`` is called, and how often.
    """

    mark: Mark
    start: int
    end: int
    empty_caches: Mapping[int, int]


def phases_of(trace_log: TraceLog) -> Iterator[PhaseSpan]:
    """The phases in their order. Raises :class:`NotRepeatable` where events stand before the first one."""
    marks = trace_log.marks
    starts = [n for n, mark in enumerate(marks) if mark.name != EMPTY_CACHE]
    if not starts or starts[0] != 0 or marks[0].at != 0:
        raise NotRepeatable("events before the first phase")
    for number, following in zip(starts, (*starts[1:], None), strict=False):
        end = len(trace_log.events) if following is None else marks[following].at
        empty_caches = Counter(mark.at - 1 for mark in marks[number + 1 : following])
        yield PhaseSpan(marks[number], marks[number].at, end, empty_caches)


@dataclass
class Chunk:
    """Consecutive events of one owner; ``owner`` None: of no layer.

    ``start`` to before ``end`` are events of the short run. ``allocates``: the first of them allocates, and frees may
    follow; else all of them free.
    """

    owner: Owner | None
    start: int
    end: int = 0
    allocates: bool = False


def chunks_of(trace_log: TraceLog, phase: PhaseSpan, owner_of: Mapping[str, FqnOwner | None]) -> list[Chunk]:
    """The chunks of a phase.

    An event belongs to the layer in which it happened; if it happened outside the layers, to the layer of the memory.
    """
    allocations, start, end = trace_log.allocations, phase.start, phase.end
    chunks: list[Chunk] = []
    for at, (event, fqn) in enumerate(
        zip(trace_log.events[start:end], trace_log.event_fqns[start:end], strict=True), start
    ):
        found = owner_of[fqn] or owner_of[allocations[event if event >= 0 else ~event].fqn]
        owner = None if found is None else found[:2]
        allocates = event >= 0
        if not chunks or owner != chunks[-1].owner or allocates > chunks[-1].allocates:
            chunks.append(Chunk(owner, at, allocates=allocates))
        chunks[-1].end = at + 1
    _assign_boundary_frees(chunks, phase.mark.name)
    return chunks


def _assign_boundary_frees(chunks: list[Chunk], phase: str) -> None:
    """Attribute the frees between layer i and the layer that runs after it to layer i.

    So it is whichever module allocated the memory. At the end of a pass, the last layer is also given the frees of what
    is left of the layer before it.
    """
    allocating = [index for index, chunk in enumerate(chunks) if chunk.allocates]
    came_from = _previous_positions(chunks, allocating)
    goes_to = _previous_positions(chunks, reversed(allocating))
    latest = None  # the last chunk so far in which a layer allocates
    for index, following in zip(allocating, (*allocating[1:], len(chunks)), strict=False):
        latest = index if chunks[index].owner is not None else latest
        between = chunks[index + 1 : following]
        if latest is None or not between:
            continue
        owner, previous = chunks[latest].owner, came_from[latest]
        assert owner is not None
        stack, position = owner
        after = chunks[following].owner if following < len(chunks) else None
        of_stack = [chunk for chunk in between if chunk.owner is not None and chunk.owner[0] == stack]
        neighbours = {position, previous}
        if after is not None and after[0] == stack:
            neighbours.add(after[1])
            assigned = between if _is_on_the_way(previous, position, after[1], goes_to[following]) else []
        else:
            assigned = of_stack if phase != "optimizer" and latest == index else []
        if all(chunk.owner is not None and chunk.owner[1] in neighbours for chunk in of_stack):
            for chunk in assigned:
                chunk.owner = owner


def _previous_positions(chunks: list[Chunk], order: Iterable[int]) -> dict[int, int | None]:
    """For every owned chunk in ``order``, the other position of its stack that came last before it."""
    latest: dict[int, tuple[int, int | None]] = {}
    out = {}
    for index in order:
        owner = chunks[index].owner
        if owner is not None:
            stack, position = owner
            now, other = latest.get(stack, (position, None))
            if now != position:
                other = now
            latest[stack] = position, other
            out[index] = other
    return out


def _is_on_the_way(previous: int | None, position: int, following: int, after: int | None) -> bool:
    """Whether position ``following`` continues the way from ``position``, without a turn or a new start.

    The positions before and after these two (None: there are none) show the way: two of the up to three steps must go
    in the direction of this one.
    """
    upwards = [following > position]
    if previous is not None:
        upwards.append(position > previous)
    if after is not None:
        upwards.append(after > following)
    return position == following or len(upwards) == 1 or upwards.count(upwards[0]) > 1
