"""The books of a deep model from the books of a shallow one: each kind of layer run once, its events repeated.

A stack of layers is a sequence of types. What a layer takes and gives back depends on its own type and on its
neighbours' (the first and the last layer are neighbours of nothing), so a run over few layers that has every such
triple shows what every layer of the whole stack does. :func:`expand` writes those books; whether it may is not for it
to know: the caller compares it, event for event, with a second run of another depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from app.memory.event import EMPTY_CACHE, Allocation, Books, Mark


class Unfoldable(Exception):
    """These books cannot be repeated; the message says why."""


class Stack(NamedTuple):
    """Layers run one after another.

    ``paths`` are the module paths of the lists that hold them (``model.layers``; several where lists are zipped),
    ``short`` the layers' types in the books at hand, ``whole`` the types in the books that are wanted. Two layers are
    alike if they are of one type between neighbours of the same types, ``radius`` of them on either side.
    """

    paths: tuple[str, ...]
    short: tuple[int, ...]
    whole: tuple[int, ...]
    radius: int = 1

    def templates(self) -> list[int]:
        """For every layer of the whole, one of the short run that is like it: for the first and the last of a type,
        which may give back what all of them use, the first and the last."""
        windows = _windows(self.whole, self.radius)
        if _ends(self.short, self.radius) != _ends(self.whole, self.radius):
            raise Unfoldable(f"the first or last layers of a type in {self.paths[0]} stand elsewhere than in the whole")
        alike: dict[tuple, int] = {}
        for position, window in enumerate(_windows(self.short, self.radius)):
            alike.setdefault(window, position)
        missing = set(windows).difference(alike)
        if missing:
            raise Unfoldable(f"no layer of {self.paths[0]} stands for the types {missing.pop()}")
        out = [alike[window] for window in windows]
        last = {kind: position for position, kind in enumerate(self.short)}
        for layer in {kind: layer for layer, kind in enumerate(self.whole)}.values():
            out[layer] = last[self.whole[layer]]
        return out


def _windows(types: Sequence[int], radius: int) -> list[tuple]:
    """Each layer's type in the midst of its neighbours'; None beyond the ends."""
    ends = (None,) * radius
    padded = (*ends, *types, *ends)
    return [padded[at : at + 2 * radius + 1] for at in range(len(types))]


def _ends(types: Sequence[int], radius: int) -> tuple[list[tuple], list[tuple]]:
    """Where the first layer of each type stands, in their order, and the last, in theirs."""
    windows = _windows(types, radius)
    first = {window[radius]: window for window in reversed(windows)}
    last = {window[radius]: window for window in windows}
    forth, back = dict.fromkeys(types), dict.fromkeys(reversed(types))
    return [first[kind] for kind in forth], [last[kind] for kind in back]


def inner_windows(types: Sequence[int], radius: int = 1) -> Counter:
    """How often each type stands between each neighbourhood, the layers near the ends left out."""
    return Counter(_windows(types, radius)[radius : len(types) - radius])


def shorten(types: Sequence[int], repeats: int, radius: int = 1, more: Collection[tuple] = ()) -> list[int]:
    """The layers to keep: the fewest found in which every window of ``radius`` neighbours of the whole occurs,
    ``repeats`` times (those in ``more`` once more) where the whole has it that often, and the first and the last layer
    of each type stand where they stood.

    Between two places where the same types follow, layers can be left out and no new window arises.
    """
    wanted = {window: min(repeats + (window in more), count) for window, count in inner_windows(types, radius).items()}
    ends = _ends(types, radius)
    kept = list(range(len(types)))
    start = 0
    while start < len(kept) - 2 * radius:
        now = [types[index] for index in kept]
        inner = _windows(now, radius)[radius : len(now) - radius]
        spare = Counter(inner)
        spare.subtract(wanted)
        lost: Counter = Counter()
        stops = []
        for stop in range(start + 1, len(kept) - 2 * radius + 1):
            lost[inner[stop - 1]] += 1
            if lost[inner[stop - 1]] > spare[inner[stop - 1]]:
                break
            if now[stop : stop + 2 * radius] == now[start : start + 2 * radius]:
                stops.append(stop)
        for stop in reversed(stops):
            if _ends(now[: start + 1] + now[stop + 1 :], radius) == ends:
                del kept[start + 1 : stop + 1]
                break
        start += 1
    return kept


def combination(target: Sequence[int], vectors: Sequence[Sequence[int]]) -> list[Fraction] | None:
    """The coefficients with which ``vectors`` add up to ``target``; None: they do not."""
    rows = [[*map(Fraction, column), Fraction(value)] for *column, value in zip(*vectors, target)]
    pivots: list[int] = []
    for column in range(len(vectors)):
        at = next((n for n in range(len(pivots), len(rows)) if rows[n][column]), None)
        if at is None:
            continue
        top = len(pivots)
        rows[top], rows[at] = rows[at], rows[top]
        rows[top] = [value / rows[top][column] for value in rows[top]]
        for n, row in enumerate(rows):
            if n != top and row[column]:
                rows[n] = [value - row[column] * pivot for value, pivot in zip(row, rows[top])]
        pivots.append(column)
    if any(row[-1] for row in rows[len(pivots) :]):
        return None
    out = [Fraction(0)] * len(vectors)
    for row, column in zip(rows, pivots):
        out[column] = row[-1]
    return out


@dataclass
class _Chunk:
    """Consecutive events of one ``owner``, a (stack, position) or None; ``takes``: not releases only."""

    owner: tuple[int, int] | None
    start: int
    end: int = 0
    takes: bool = False


def _lend(chunks: list[_Chunk], phase: str) -> None:
    """Releases between two layers that run after each other are the doing of the first, whosever memory it was; at
    the end of a pass the last one gives back what is left of the one before it."""
    taking = [at for at, chunk in enumerate(chunks) if chunk.takes]
    came_from = _turns(chunks, taking)
    goes_to = _turns(chunks, reversed(taking))
    low = None
    for at, high in zip(taking, (*taking[1:], len(chunks))):
        low = at if chunks[at].owner is not None else low
        between = chunks[at + 1 : high]
        if low is None or not between:
            continue
        owner, before = chunks[low].owner, came_from[low]
        there = chunks[high].owner if high < len(chunks) else None
        near = {owner[1], before}
        own = [chunk for chunk in between if chunk.owner is not None and chunk.owner[0] == owner[0]]
        if there is not None and there[0] == owner[0]:
            near.add(there[1])
            lent = between if _is_on_the_way(before, owner[1], there[1], goes_to[high]) else []
        else:
            lent = own if phase != "optimizer" and low == at else []
        if all(chunk.owner[1] in near for chunk in own):
            for chunk in lent:
                chunk.owner = owner


def _turns(chunks: list[_Chunk], order: Iterable[int]) -> dict[int, int | None]:
    """For every owned chunk, the other position of its stack that comes last before it in ``order``."""
    latest: dict[int, tuple[int, int | None]] = {}
    out = {}
    for at in order:
        if chunks[at].owner is not None:
            stack, position = chunks[at].owner
            now, other = latest.get(stack, (position, None))
            if now != position:
                other = now
            latest[stack] = position, other
            out[at] = other
    return out


def _is_on_the_way(before: int | None, here: int, there: int, after: int | None) -> bool:
    """Whether the layer ``there`` follows ``here`` in one direction, not after a turn or a new start."""
    ways = [there > here]
    if before is not None:
        ways.append(here > before)
    if after is not None:
        ways.append(after > there)
    return here == there or len(ways) == 1 or ways.count(ways[0]) > 1


class _Piece(NamedTuple):
    """Events ``start`` to ``end`` that stand as they are, or (``stack`` not None) blocks that stand for layers."""

    start: int = 0
    end: int = 0
    stack: int | None = None
    step: int = 0
    blocks: dict[int, tuple[int, int]] = {}


def expand(books: Books, stacks: Sequence[Stack], growth: Mapping[int, int] | None = None) -> Books:
    """The books of the whole stacks from ``books`` of the short ones.

    ``growth`` has, by the key of an allocation that stands for itself alone, the bytes by which it is larger there.
    Raises :class:`Unfoldable` where an event has no meaning in the whole.
    """
    return _Expansion(books, stacks, growth or {}).run()


def same(books: Books, others: Books) -> bool:
    """Whether both are the same, event for event.

    Releases with nothing taken between them may stand in any order, which no allocator can tell: a deep autograd graph
    is torn down in another order than a shallow one.
    """
    return (
        books.allocations == others.allocations
        and books.marks == others.marks
        and len(books.events) == len(others.events)
        and (books.events == others.events and books.sites == others.sites or _settled(books) == _settled(others))
    )


def _settled(books: Books) -> list[tuple[int, str]]:
    """The events with their sites; releases with nothing between them in ascending order."""
    marks = {mark.at for mark in books.marks}
    out: list[tuple[int, str]] = []
    run: list[tuple[int, str]] = []
    for at, entry in enumerate(zip(books.events, books.sites)):
        if run and (entry[0] >= 0 or at in marks):
            out += sorted(run)
            run.clear()
        (out if entry[0] >= 0 else run).append(entry)
    return out + sorted(run)


def growth_of(books: Books, stacks: Sequence[Stack], whole: Books) -> dict[int, int]:
    """By how many bytes allocations that stand for themselves alone are larger in ``whole`` than in ``books``, by key.

    Raises :class:`Unfoldable` where ``whole`` is not ``books`` expanded but for that.
    """
    expansion = _Expansion(books, stacks, {})
    out = expansion.run()
    if same(out, whole):
        return {}
    if len(out.allocations) != len(whole.allocations):
        raise Unfoldable(f"{len(out.allocations)} allocations expected, {len(whole.allocations)} made")
    origin = {new: old for old, new in expansion.origins.items()}
    growth = {}
    for key, (mine, theirs) in enumerate(zip(out.allocations, whole.allocations)):
        if mine.size != theirs.size:
            if key not in origin:
                raise Unfoldable(f"{theirs.op} of {theirs.module}: {mine.size} bytes expected, {theirs.size} taken")
            growth[origin[key]] = theirs.size - mine.size
    if not growth or not same(expand(books, stacks, growth), whole):
        raise Unfoldable("the events of a deeper run are others than expected")
    return growth


class _Names(dict):
    """Module paths as they are called in one layer of the whole, found when first asked for."""

    def __init__(self, rename):
        super().__init__()
        self._rename = rename

    def __missing__(self, path: str) -> str:
        name = self[path] = self._rename(path)
        return name


class _Expansion:
    def __init__(self, books: Books, stacks: Sequence[Stack], growth: Mapping[int, int]):
        self.books = books
        self.stacks = stacks
        self.growth = growth
        self.templates = [stack.templates() for stack in stacks]
        self.sole: list[dict[int, int]] = []
        for templates in self.templates:
            uses = Counter(templates)
            self.sole.append({position: layer for layer, position in enumerate(templates) if uses[position] == 1})
        self.units = _Names(self._unit)
        self.out = Books()
        # Where an allocation of the short run was made: None, or (stack, position, key within the layer).
        self.homes: list[tuple[int, int, tuple] | None] = [None] * len(books.allocations)
        # Keys in the whole: of what no layer owns and is alive, and of all that stands for itself alone.
        self.fixed: dict[int, int] = {}
        self.ran: set[tuple[int, int] | None] = set()
        self.origins: dict[int, int] = {}
        self.live = [[{} for _ in stack.whole] for stack in stacks]
        self.names: dict[tuple | None, _Names] = {None: _Names(lambda path: self._name(path, None))}

    # --- reading --------------------------------------------------------------------------------------------

    def _unit(self, path: str) -> tuple[int, int, str, str] | None:
        """Whose ``path`` is: stack, position, the list's path, the rest; None: no layer's."""
        for number, stack in enumerate(self.stacks):
            for head in stack.paths:
                if path.startswith(head + "."):
                    index, dot, tail = path[len(head) + 1 :].partition(".")
                    if index.isdecimal() and int(index) < len(stack.short):
                        return number, int(index), head, dot + tail
        return None

    def _spans(self):
        """The phases: the mark that begins one, its events, and the calls of empty_cache by the event they follow."""
        events = self.books.events
        starts = [n for n, mark in enumerate(self.books.marks) if mark.name != EMPTY_CACHE]
        if not starts or starts[0] != 0 or self.books.marks[0].at != 0:
            raise Unfoldable("events before the first phase")
        for number, following in zip(starts, (*starts[1:], None)):
            mark = self.books.marks[number]
            end = len(events) if following is None else self.books.marks[following].at
            empties: dict[int, int] = Counter(m.at - 1 for m in self.books.marks[number + 1 : following])
            yield mark, mark.at, end, empties

    def _chunks(self, start: int, end: int, phase: str) -> list[_Chunk]:
        """Runs of events of one layer, or of none: by where they happened, else by whose memory it is. Releases that
        come first are a run of their own."""
        units, allocations = self.units, self.books.allocations
        chunks: list[_Chunk] = []
        for at, (event, site) in enumerate(zip(self.books.events[start:end], self.books.sites[start:end]), start):
            unit = units[site] or units[allocations[event if event >= 0 else ~event].module]
            owner = None if unit is None else unit[:2]
            takes = event >= 0
            if not chunks or owner != chunks[-1].owner or takes > chunks[-1].takes:
                chunks.append(_Chunk(owner, at, takes=takes))
            chunks[-1].end = at + 1
        _lend(chunks, phase)
        return chunks

    def _pieces(self, mark: Mark, start: int, end: int) -> list[_Piece]:
        """The span as what stands still and what goes up or down a stack, layer by layer.

        Events of no layer between two layers belong to the one before.
        """
        chunks = self._chunks(start, end, mark.name)
        if mark.name == "forward":
            self.ran.update(chunk.owner for chunk in chunks if chunk.takes)
        seen = {chunk.owner for chunk in chunks}.difference({None})
        pieces = []
        at = 0
        while at < len(chunks):
            chunk = chunks[at]
            if chunk.owner is None:
                pieces.append(_Piece(chunk.start, chunk.end))
                at += 1
                continue
            number, last = chunk.owner
            blocks = {last: (chunk.start, chunk.end)}
            step = 0
            while True:
                after = at + 1
                while after < len(chunks) and chunks[after].owner is None:
                    after += 1
                if after >= len(chunks) or chunks[after].owner[0] != number:
                    break
                chunk = chunks[after]
                position = chunk.owner[1]
                towards = (position > last) - (position < last)
                if not towards and (after == at + 1 or len(seen) > 1):
                    blocks[last] = (blocks[last][0], chunk.end)
                    at = after
                    continue
                if not towards or step not in (0, towards) or not self._may_skip(number, last, position, seen):
                    break
                step = towards
                blocks[last] = (blocks[last][0], chunk.start)
                blocks[position] = (chunk.start, chunk.end)
                last, at = position, after
            pieces.append(_Piece(stack=number, step=step or (-1 if mark.name == "backward" else 1), blocks=blocks))
            at += 1
        return pieces

    def _may_skip(self, number: int, last: int, position: int, seen: set) -> bool:
        """Whether the layers between may have no part here: they have none in the phase, or are of other types."""
        short = self.stacks[number].short
        ends = {short[last], short[position]}
        between = range(min(last, position) + 1, max(last, position))
        return all((number, skipped) not in seen or short[skipped] not in ends for skipped in between)

    # --- writing --------------------------------------------------------------------------------------------

    def run(self) -> Books:
        for serial, (mark, start, end, empties) in enumerate(self._spans()):
            self.out.marks.append(Mark(len(self.out.events), mark.name, mark.step))
            self._empty(empties.get(start - 1, 0), mark.step)
            for part, piece in enumerate(self._pieces(mark, start, end)):
                if piece.stack is None:
                    self._write(piece.start, piece.end, None, empties, mark.step)
                    continue
                templates = self.templates[piece.stack]
                for position, (low, high) in piece.blocks.items():
                    self._settle((serial, part), piece.stack, position, low, high)
                order = range(len(templates))[:: piece.step]
                last = {templates[layer]: layer for layer in order}
                for layer in order:
                    position = templates[layer]
                    if position in piece.blocks:
                        final = last[position] == layer
                        self._write(*piece.blocks[position], (piece.stack, layer), empties, mark.step, final)
        self._check_released()
        self._check_run()
        return self.out

    def _settle(self, part: tuple, number: int, position: int, start: int, end: int) -> None:
        """Give the allocations of a block names by which the same ones of other layers are found."""
        seen: Counter = Counter()
        for event in self.books.events[start:end]:
            if event < 0:
                continue
            entry = self.books.allocations[event]
            unit = self.units[entry.module]
            if unit is None:
                module: object = entry.module
            elif unit[0] == number:
                module = (unit[1] - position, *unit[2:])
            else:
                module = unit
            what = (module, entry.op)
            self.homes[event] = (number, position, (part, what, seen[what]))
            seen[what] += 1

    def _write(
        self,
        start: int,
        end: int,
        layer: tuple[int, int] | None,
        empties: Mapping[int, int],
        step: int,
        final: bool = True,
    ) -> None:
        """Write a block as ``layer`` of the whole; what its like share is given back by the ``final`` one of them."""
        out, homes, events, sites = self.out, self.homes, self.books.events, self.books.sites
        allocations, own, sole = self.books.allocations, None, True
        names = self.names.get(layer)
        if layer is not None:
            sole = self.templates[layer[0]][layer[1]] in self.sole[layer[0]]
            own = self.live[layer[0]][layer[1]]
            if names is None:
                names = self.names[layer] = _Names(lambda path: self._name(path, layer))
        for at in range(start, end):
            event = events[at]
            if event >= 0:
                size, module, kind, phase, op = allocations[event]
                key = len(out.allocations)
                if own is None:
                    self.fixed[event] = key
                else:
                    own[homes[event][2]] = key
                if sole:
                    self.origins[event] = key
                    size += self.growth.get(event, 0)
                out.allocations.append(Allocation(size, names[module], kind, phase, op))
                out.events.append(key)
                out.sites.append(names[sites[at]])
            elif final or homes[~event] is not None:
                out.events.append(~self._given(~event, layer))
                out.sites.append(names[sites[at]])
            if at in empties:
                self._empty(empties[at], step)

    def _empty(self, times: int, step: int) -> None:
        self.out.marks += [Mark(len(self.out.events), EMPTY_CACHE, step)] * times

    def _given(self, key: int, layer: tuple[int, int] | None) -> int:
        """What is given back in ``layer`` where its template gives back ``key``."""
        home = self.homes[key]
        try:
            if home is None:
                return self.fixed.pop(key)
            number, position, name = home
            return self.live[number][self._layer(number, position, layer)].pop(name)
        except KeyError:
            entry = self.books.allocations[key]
            whose = entry.module or "the model"
            raise Unfoldable(f"more layers give back {entry.op} of {whose} than took it") from None

    def _layer(self, number: int, position: int, layer: tuple[int, int] | None) -> int:
        """Which layer of the whole is meant in ``layer`` where its template means the one at ``position``.

        A neighbour stays a neighbour; further off only a layer that occurs once is known to be the same one.
        """
        if layer is not None and layer[0] == number:
            away = position - self.templates[number][layer[1]]
            if abs(away) <= self.stacks[number].radius:
                return layer[1] + away
        if layer is None or self.templates[layer[0]][layer[1]] in self.sole[layer[0]]:
            sole = self.sole[number].get(position)
            if sole is not None:
                return sole
        raise Unfoldable(f"layer {position} of {self.stacks[number].paths[0]} is used from afar")

    def _name(self, path: str, layer: tuple[int, int] | None) -> str:
        unit = self.units[path]
        if unit is None:
            return path
        number, position, head, tail = unit
        return f"{head}.{self._layer(number, position, layer)}{tail}"

    def _check_released(self) -> None:
        """What the short run gives back, and only that, is given back in the whole, by every layer."""
        kept = set(range(len(self.homes))).difference(~event for event in self.books.events if event < 0)
        if set(self.fixed) != {key for key in kept if self.homes[key] is None}:
            raise Unfoldable("what no layer owns is given back by a layer that stands for none of the whole")
        stay = Counter(self.homes[key][:2] for key in kept if self.homes[key] is not None)
        for number, templates in enumerate(self.templates):
            for layer, position in enumerate(templates):
                if len(self.live[number][layer]) != stay[number, position]:
                    raise Unfoldable(f"layer {layer} of {self.stacks[number].paths[0]} does not give back what it took")

    def _check_run(self) -> None:
        """Layers of one type all run in the forward pass, or none does: else what runs is chosen by number."""
        for number, stack in enumerate(self.stacks):
            runs = {(kind, (number, position) in self.ran) for position, kind in enumerate(stack.short)}
            if len(runs) > len(set(stack.short)):
                raise Unfoldable(f"of layers alike in {stack.paths[0]} some run and some do not")
