"""Stacks of layers: which layer of a short run stands for which layer of the whole model.

Throughout this package:

- ``type`` is an int, equal for layers that are made of equal modules: ``(0, 0, 1, 0)`` is a stack of four layers.
- ``position`` is a layer's index in the short run, ``layer`` its index in the whole model.
- a *window* is a layer's type between its neighbours', ``radius`` of them on either side: ``(None, 0, 0)`` is the first
  layer of that stack for a radius of 1. None stands beyond the ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import NamedTuple

Window = tuple[int | None, ...]
"""A layer's type between those of its neighbours; None beyond the ends."""


class NotRepeatable(Exception):
    """A short run that cannot be repeated to the depth of the whole model. The message says why."""


class Stack(NamedTuple):
    """Layers that run one after another.

    ``list_fqns`` are the names of the module lists that hold them (``model.layers``; several where a model zips lists).
    ``short_types`` are the types of the layers in the short run, ``whole_types`` those in the whole model. Two layers
    are alike if they have one type and their neighbours have the same types, ``radius`` of them on either side.
    ``loop``: the layers are iterations of one module's loop. Then all of them have that module's name, and an
    allocation is never followed further than ``radius`` iterations.
    """

    list_fqns: tuple[str, ...]
    short_types: tuple[int, ...]
    whole_types: tuple[int, ...]
    radius: int = 1
    loop: bool = False

    def templates(self) -> list[int]:
        """For every layer of the whole model, the position of one in the short run that is like it.

        For the first and the last layer of a type these are the first and the last of the short run: they may free what
        all layers of the type use. Raises :class:`NotRepeatable` where the short run has no such layer.
        """
        if _end_windows(self.short_types, self.radius) != _end_windows(self.whole_types, self.radius):
            raise NotRepeatable(
                f"the first or last layers of a type in {self.list_fqns[0]} stand elsewhere than in the whole"
            )
        position_of: dict[Window, int] = {}
        for position, window in enumerate(_windows(self.short_types, self.radius)):
            position_of.setdefault(window, position)
        windows = _windows(self.whole_types, self.radius)
        missing = set(windows).difference(position_of)
        if missing:
            raise NotRepeatable(f"no layer of {self.list_fqns[0]} stands for the types {missing.pop()}")
        out = [position_of[window] for window in windows]
        last_position = {type_: position for position, type_ in enumerate(self.short_types)}
        last_layer = {type_: layer for layer, type_ in enumerate(self.whole_types)}
        for type_, layer in last_layer.items():
            out[layer] = last_position[type_]
        return out


def _windows(types: Sequence[int], radius: int) -> list[Window]:
    """The window of every layer."""
    beyond: Window = (None,) * radius
    padded = (*beyond, *types, *beyond)
    return [padded[at : at + 2 * radius + 1] for at in range(len(types))]


def _end_windows(types: Sequence[int], radius: int) -> tuple[list[Window], list[Window]]:
    """The windows of the first layer of each type, in the order of the types, and those of the last, in theirs."""
    windows = _windows(types, radius)
    first = {window[radius]: window for window in reversed(windows)}
    last = {window[radius]: window for window in windows}
    forwards, backwards = dict.fromkeys(types), dict.fromkeys(reversed(types))
    return [first[type_] for type_ in forwards], [last[type_] for type_ in backwards]


def inner_windows(types: Sequence[int], radius: int = 1) -> Counter[Window]:
    """How often each window occurs, the ``radius`` layers at either end left out."""
    return Counter(_windows(types, radius)[radius : len(types) - radius])


def shorten(types: Sequence[int], repeats: int, radius: int = 1, more: Collection[Window] = ()) -> list[int]:
    """The layers to keep for a short run: the fewest found that still show every window of the whole stack.

    Every window occurs ``repeats`` times in what is kept (those in ``more`` once more), or as often as in the whole
    where that is less. The first and the last layer of each type keep their windows.

    Between two places that are followed by the same ``2 * radius`` types, layers can be left out without a new window:
    so the longest such stretch is cut out from every place on, as long as enough of each window is left.
    """
    wanted = {window: min(repeats + (window in more), count) for window, count in inner_windows(types, radius).items()}
    ends = _end_windows(types, radius)
    kept = list(range(len(types)))
    start = 0
    while start < len(kept) - 2 * radius:
        now = [types[index] for index in kept]
        for stop in reversed(_stops(now, start, radius, wanted)):
            if _end_windows(now[: start + 1] + now[stop + 1 :], radius) == ends:
                del kept[start + 1 : stop + 1]
                break
        start += 1
    return kept


def _stops(types: list[int], start: int, radius: int, wanted: dict[Window, int]) -> list[int]:
    """Up to where the layers after ``start`` may be left out: enough of each window is left, and no new one arises."""
    inner = _windows(types, radius)[radius : len(types) - radius]
    superfluous = Counter(inner)
    superfluous.subtract(wanted)
    lost: Counter[Window] = Counter()
    out = []
    for stop in range(start + 1, len(types) - 2 * radius + 1):
        window = inner[stop - 1]
        lost[window] += 1
        if lost[window] > superfluous[window]:
            break
        if types[stop : stop + 2 * radius] == types[start : start + 2 * radius]:
            out.append(stop)
    return out


def combination(target: Sequence[int], vectors: Sequence[Sequence[int]]) -> list[Fraction] | None:
    """The coefficients with which ``vectors`` add up to ``target`` (Gauss-Jordan elimination); None: they do not."""
    rows = [[*map(Fraction, column), Fraction(value)] for *column, value in zip(*vectors, target, strict=True)]
    pivots: list[int] = []
    for column in range(len(vectors)):
        top = len(pivots)
        pivot = next((n for n in range(top, len(rows)) if rows[n][column]), None)
        if pivot is None:
            continue
        rows[top], rows[pivot] = rows[pivot], rows[top]
        rows[top] = [value / rows[top][column] for value in rows[top]]
        for n, row in enumerate(rows):
            if n != top and row[column]:
                rows[n] = [value - row[column] * other for value, other in zip(row, rows[top], strict=True)]
        pivots.append(column)
    if any(row[-1] for row in rows[len(pivots) :]):
        return None
    out = [Fraction(0)] * len(vectors)
    for row, column in zip(rows, pivots, strict=False):
        out[column] = row[-1]
    return out
