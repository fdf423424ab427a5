"""A phase as pieces: events that stand as they are, and walks up or down a stack, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .ownership import Chunk, Owner
from .stacks import Stack


class FixedPiece(NamedTuple):
    """Events of the short run, from ``start`` to before ``end``, that no layer owns: written once."""

    start: int
    end: int


class Walk(NamedTuple):
    """A pass through the layers of one stack, upwards (``direction`` 1) or downwards (-1).

    ``blocks`` has, by position, the first event of that layer's block and the one after its last. Events of no layer
    between two layers belong to the block of the one before.
    """

    stack: int
    direction: int
    blocks: dict[int, tuple[int, int]]


def pieces_of(chunks: Sequence[Chunk], phase: str, stacks: Sequence[Stack]) -> list[FixedPiece | Walk]:
    """The pieces of the phase of this name, in their order."""
    seen = {chunk.owner for chunk in chunks if chunk.owner is not None}
    pieces: list[FixedPiece | Walk] = []
    index = 0
    while index < len(chunks):
        owner = chunks[index].owner
        if owner is None:
            pieces.append(FixedPiece(chunks[index].start, chunks[index].end))
        else:
            direction, blocks, index = _walk_from(chunks, index, owner, seen, stacks)
            pieces.append(Walk(owner[0], direction or (-1 if phase == "backward" else 1), blocks))
        index += 1
    return pieces


def _walk_from(
    chunks: Sequence[Chunk], index: int, owner: Owner, seen: set[Owner], stacks: Sequence[Stack]
) -> tuple[int, dict[int, tuple[int, int]], int]:
    """The walk that begins with the chunk ``index``: its direction (0: a single layer), its blocks, its last chunk."""
    number, last = owner
    blocks = {last: (chunks[index].start, chunks[index].end)}
    direction = 0
    while (found := _next_owned(chunks, index)) is not None:
        following, (stack, position) = found
        if stack != number:
            break
        chunk = chunks[following]
        towards = (position > last) - (position < last)
        if not towards and (following == index + 1 or len(seen) > 1):
            blocks[last] = (blocks[last][0], chunk.end)
        elif towards and direction in (0, towards) and _may_skip(stacks[number], number, last, position, seen):
            direction = towards
            blocks[last] = (blocks[last][0], chunk.start)
            blocks[position] = (chunk.start, chunk.end)
            last = position
        else:
            break
        index = following
    return direction, blocks, index


def _next_owned(chunks: Sequence[Chunk], index: int) -> tuple[int, Owner] | None:
    """The next chunk after ``index`` that a layer owns, and its owner."""
    for following in range(index + 1, len(chunks)):
        owner = chunks[following].owner
        if owner is not None:
            return following, owner
    return None


def _may_skip(stack: Stack, number: int, last: int, position: int, seen: set[Owner]) -> bool:
    """Whether a walk may go from ``last`` to ``position`` at once.

    It may if the layers between have no part in this phase, or are of other types than these two.
    """
    types = stack.short_types
    ends = {types[last], types[position]}
    between = range(min(last, position) + 1, max(last, position))
    return all((number, skipped) not in seen or types[skipped] not in ends for skipped in between)
