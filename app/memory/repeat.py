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
from functools import cached_property
from itertools import groupby, takewhile
from typing import NamedTuple

import numpy as np

from .events import EMPTY_CACHE, Mark, TraceColumns, TraceLog, numbered
from .sizes import Number


class NotRepeatable(Exception):
    """These books cannot be repeated; the message says why."""


class Stack(NamedTuple):
    """Layers run one after another.

    ``paths`` are the module paths of the lists that hold them (``model.layers``; several where lists are zipped),
    ``short`` the layers' types in the books at hand, ``whole`` the types in the books that are wanted. Two layers are
    alike if they are of one type between neighbours of the same types, ``radius`` of them on either side. With ``loop``
    they are iterations: what they do is their module's, and none is known further off than that.
    """

    paths: tuple[str, ...]
    short: tuple[int, ...]
    whole: tuple[int, ...]
    radius: int = 1
    loop: bool = False

    def templates(self) -> list[int]:
        """For every layer of the whole, one of the short run that is like it: for the first and the last of a type,
        which may give back what all of them use, the first and the last."""
        windows = _windows(self.whole, self.radius)
        if _ends(self.short, self.radius) != _ends(self.whole, self.radius):
            raise NotRepeatable(
                f"the first or last layers of a type in {self.paths[0]} stand elsewhere than in the whole"
            )
        alike: dict[tuple, int] = {}
        for position, window in enumerate(_windows(self.short, self.radius)):
            alike.setdefault(window, position)
        missing = set(windows).difference(alike)
        if missing:
            raise NotRepeatable(f"no layer of {self.paths[0]} stands for the types {missing.pop()}")
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


def _assign_boundary_frees(chunks: list[_Chunk], phase: str) -> None:
    """Releases between two layers that run after each other are the doing of the first, whosever memory it was; at
    the end of a pass the last one gives back what is left of the one before it."""
    taking = [at for at, chunk in enumerate(chunks) if chunk.takes]
    came_from = _previous_positions(chunks, taking)
    goes_to = _previous_positions(chunks, reversed(taking))
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


def _previous_positions(chunks: list[_Chunk], order: Iterable[int]) -> dict[int, int | None]:
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


def expand(trace_log: TraceLog, stacks: Sequence[Stack], growth: Mapping[int, Number] | None = None) -> Expansion:
    """The books of the whole stacks from ``books`` of the short ones.

    ``growth`` has, by the key of an allocation that stands for itself alone, the bytes by which it is larger there.
    Raises :class:`NotRepeatable` where an event has no meaning in the whole.
    """
    return Expansion(trace_log, stacks, growth or {})


def same(trace_log: TraceLog, others: TraceLog) -> bool:
    """Whether both are the same, event for event.

    Releases with nothing taken between them may stand in any order, which no allocator can tell: a deep autograd graph
    is torn down in another order than a shallow one.
    """
    return (
        trace_log.allocations == others.allocations
        and trace_log.marks == others.marks
        and len(trace_log.events) == len(others.events)
        and (
            trace_log.events == others.events
            and trace_log.event_fqns == others.event_fqns
            or _normalized(trace_log) == _normalized(others)
        )
    )


def _normalized(trace_log: TraceLog) -> list[tuple[int, str]]:
    """The events with their sites; releases with nothing between them in ascending order."""
    marks = {mark.at for mark in trace_log.marks}
    out: list[tuple[int, str]] = []
    run: list[tuple[int, str]] = []
    for at, entry in enumerate(zip(trace_log.events, trace_log.event_fqns)):
        if run and (entry[0] >= 0 or at in marks):
            out += sorted(run)
            run.clear()
        (out if entry[0] >= 0 else run).append(entry)
    return out + sorted(run)


def growth_of(trace_log: TraceLog, stacks: Sequence[Stack], whole: TraceLog) -> dict[int, Number]:
    """By how many bytes allocations that stand for themselves alone are larger in ``whole`` than in ``books``, by key.

    Raises :class:`NotRepeatable` where ``whole`` is not ``books`` expanded but for that.
    """
    expansion = expand(trace_log, stacks)
    out = expansion.trace_log()
    if same(out, whole):
        return {}
    if len(out.allocations) != len(whole.allocations):
        raise NotRepeatable(f"{len(out.allocations)} allocations expected, {len(whole.allocations)} made")
    origin = {new: old for old, new in enumerate(expansion.sole.tolist()) if new >= 0}
    growth = {}
    for key, (mine, theirs) in enumerate(zip(out.allocations, whole.allocations)):
        if mine.size != theirs.size:
            if key not in origin:
                raise NotRepeatable(f"{theirs.op} of {theirs.fqn}: {mine.size} bytes expected, {theirs.size} taken")
            growth[origin[key]] = theirs.size - mine.size
    if not growth or not same(expand(trace_log, stacks, growth).trace_log(), whole):
        raise NotRepeatable("the events of a deeper run are others than expected")
    return growth


class _Names(dict):
    """Module paths as they are called in one layer of the whole, found when first asked for."""

    def __init__(self, rename):
        super().__init__()
        self._rename = rename

    def __missing__(self, path: str) -> str:
        name = self[path] = self._rename(path)
        return name


class _Given(NamedTuple):
    """What a block gives back that one block of one layer took: where it does in its events, and the numbers of those
    allocations in that block. ``layer`` counts from the block's own one if it is ``near``."""

    part: tuple[int, int]
    stack: int
    layer: int
    near: bool
    at: np.ndarray
    numbers: np.ndarray


class _Plan(NamedTuple):
    """A block as it is written for layers with like neighbours: ``source``, the short run's events; which of them take
    (``takes``) and which give back what no layer owns (``fixed``); ``empties``: after how many events the cache is
    given back, and how often. ``paths``: the modules that occur."""

    source: np.ndarray
    takes: np.ndarray
    given: list[_Given]
    fixed: np.ndarray
    empty_cache_events: list[tuple[int, int]]
    paths: list[str]


class _Block(NamedTuple):
    """What was written at once: of each of ``layers``, (stack, layer) or None, the ``events``, a row each; which of the
    short run's they repeat (``source``), and how many of them take."""

    events: np.ndarray
    source: np.ndarray
    layers: list[tuple[int, int] | None]
    takes: int


class Expansion:
    """The whole, event by event: of each, which of the short run's it repeats and in which layer.

    A layer's events are the same numbers as its template's, but for where its allocations and its neighbours' begin;
    so they are written block by block, for all layers alike that follow each other at once, as arrays. ``events`` and
    ``marks`` are as in :class:`TraceLog`, ``source`` the short run's events, ``sole`` by key of the short run the key of
    what stands for itself alone (-1: for several).
    """

    def __init__(self, trace_log: TraceLog, stacks: Sequence[Stack], growth: Mapping[int, Number]):
        self.short = trace_log
        self.stacks = stacks
        self.growth = growth
        self.templates = [stack.templates() for stack in stacks]
        self.only: list[dict[int, int]] = []
        for templates in self.templates:
            uses = Counter(templates)
            self.only.append({position: layer for layer, position in enumerate(templates) if uses[position] == 1})
        self.units = _Names(self._unit)
        self.names: dict[tuple | None, _Names] = {None: _Names(lambda path: self._name(path, None))}
        # Where an allocation of the short run was made: None, or (stack, position, name within the layer).
        self.homes: list[tuple[int, int, tuple] | None] = [None] * len(trace_log.allocations)
        self.ran: set[tuple[int, int] | None] = set()
        # By part, stack and position the numbers of a block's allocations by name; by part and stack each layer's first
        # key, -1 where it is not written.
        self.numbers: dict[tuple, dict[tuple, int]] = {}
        self.begins: dict[tuple, np.ndarray] = {}
        self.plans: dict[tuple, _Plan] = {}
        # By stack how far away a layer is whose memory another one gives back.
        self.reach = [stack.radius for stack in stacks]
        self.keys = 0
        self.fixed = np.full(len(trace_log.allocations), -1)
        self.sole = np.full(len(trace_log.allocations), -1)
        self.blocks: list[_Block] = []
        self.marks: list[Mark] = []
        self.written = 0
        self._events = np.array(trace_log.events, np.int32)
        self._run()

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
        events = self.short.events
        starts = [n for n, mark in enumerate(self.short.marks) if mark.name != EMPTY_CACHE]
        if not starts or starts[0] != 0 or self.short.marks[0].at != 0:
            raise NotRepeatable("events before the first phase")
        for number, following in zip(starts, (*starts[1:], None)):
            mark = self.short.marks[number]
            end = len(events) if following is None else self.short.marks[following].at
            empty_cache_events: dict[int, int] = Counter(m.at - 1 for m in self.short.marks[number + 1 : following])
            yield mark, mark.at, end, empty_cache_events

    def _chunks(self, start: int, end: int, phase: str) -> list[_Chunk]:
        """Runs of events of one layer, or of none: by where they happened, else by whose memory it is. Releases that
        come first are a run of their own."""
        units, allocations = self.units, self.short.allocations
        chunks: list[_Chunk] = []
        for at, (event, site) in enumerate(zip(self.short.events[start:end], self.short.event_fqns[start:end]), start):
            unit = units[site] or units[allocations[event if event >= 0 else ~event].fqn]
            owner = None if unit is None else unit[:2]
            takes = event >= 0
            if not chunks or owner != chunks[-1].owner or takes > chunks[-1].takes:
                chunks.append(_Chunk(owner, at, takes=takes))
            chunks[-1].end = at + 1
        _assign_boundary_frees(chunks, phase)
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

    def _run(self) -> None:
        for serial, (mark, start, end, empty_cache_events) in enumerate(self._spans()):
            self.marks.append(Mark(self.written, mark.name, mark.step))
            self.marks += [Mark(self.written, EMPTY_CACHE, mark.step)] * empty_cache_events.get(start - 1, 0)
            for number, piece in enumerate(self._pieces(mark, start, end)):
                part = serial, number
                if piece.stack is None:
                    self._write(part, piece.start, piece.end, [None], empty_cache_events, mark.step)
                    continue
                templates = self.templates[piece.stack]
                for position, (low, high) in piece.blocks.items():
                    self._settle(part, piece.stack, position, low, high)
                order = range(len(templates))[:: piece.step]
                last = {templates[layer]: layer for layer in order}
                for (position, final), layers in groupby(
                    order, lambda layer: (templates[layer], last[templates[layer]] == layer)
                ):
                    if position in piece.blocks:
                        written = [(piece.stack, layer) for layer in layers]
                        self._write(part, *piece.blocks[position], written, empty_cache_events, mark.step, final)
        self._check_released()
        self._check_run()

    def _settle(self, part: tuple, number: int, position: int, start: int, end: int) -> None:
        """Give the allocations of a block names by which the same ones of other layers are found."""
        seen: Counter = Counter()
        numbers = self.numbers[part, number, position] = {}
        for event in self.short.events[start:end]:
            if event < 0:
                continue
            entry = self.short.allocations[event]
            unit = self.units[entry.fqn]
            if unit is None:
                module: object = entry.fqn
            elif unit[0] == number:
                module = (unit[1] - position, *unit[2:])
            else:
                module = unit
            what = (module, entry.op)
            name = what, seen[what]
            self.homes[event] = (number, position, (part, name))
            numbers[name] = len(numbers)
            seen[what] += 1

    def _write(
        self,
        part: tuple[int, int],
        start: int,
        end: int,
        layers: list[tuple[int, int] | None],
        empty_cache_events: Mapping[int, int],
        step: int,
        final: bool = True,
    ) -> None:
        """Write a block as each of ``layers`` of the whole, one after another; what its like share is given back by the
        ``final`` one of them."""
        while layers:
            plan = self.plans.get((start, end, final, self._sight(layers[0])))
            if plan is None:
                plan = self._plan(
                    start, end, layers[0], empty_cache_events, final
                )  # may look further than was seen so far
                self.plans[start, end, final, self._sight(layers[0])] = plan
            seen = self._sight(layers[0])
            alike = [*takewhile(lambda layer: self._sight(layer) == seen, layers)]
            self._repeat(part, plan, alike, step)
            layers = layers[len(alike) :]

    def _repeat(self, part: tuple[int, int], plan: _Plan, layers: list[tuple[int, int] | None], step: int) -> None:
        """Write a block as each of ``layers``, which see the same around them."""
        for layer in layers:
            names = self._names(layer)
            for path in plan.paths:
                names[path]  # raises where it has none
        source, count = self._events[plan.source], plan.takes.size
        out = np.tile(source, (len(layers), 1))
        begins = self.keys + count * np.arange(len(layers))
        out[:, plan.takes] = begins[:, None] + np.arange(count)
        taken = source[plan.takes]
        numbers = np.array([0 if layer is None else layer[1] for layer in layers])
        if layers[0] is None:
            self.fixed[taken] = out[0, plan.takes]
        else:
            number, first = layers[0]
            if (part, number) not in self.begins:
                self.begins[part, number] = np.full(len(self.templates[number]), -1)
            self.begins[part, number][numbers] = begins
        if layers[0] is None or self.templates[number][first] in self.only[number]:
            self.sole[taken] = out[0, plan.takes]
        given = self.fixed[~source[plan.fixed]]
        if given.size and given.min() < 0:
            raise self._twice(int(~source[plan.fixed][given.argmin()]))
        out[:, plan.fixed] = ~given
        for group in plan.given:
            whose = numbers + group.layer if group.near else np.array([group.layer])
            known = self.begins.get((group.part, group.stack), np.zeros(0, int))
            if whose.min() < 0 or whose.max() >= known.size or known[whose].min() < 0:
                raise self._twice(int(~source[group.at[0]]))
            out[:, group.at] = ~(known[whose][:, None] + group.numbers)
        self.blocks.append(_Block(out, plan.source, layers, count))
        for row in range(len(layers) if plan.empty_cache_events else 0):
            for after, times in plan.empty_cache_events:
                self.marks += [Mark(self.written + row * source.size + after, EMPTY_CACHE, step)] * times
        self.keys += count * len(layers)
        self.written += out.size

    def _names(self, layer: tuple[int, int] | None) -> _Names:
        """How the short run's modules are called in ``layer``; in all iterations of a loop with one template alike."""
        key = layer
        if layer is not None and self.stacks[layer[0]].loop:
            key = layer[0], self.templates[layer[0]][layer[1]]
        names = self.names.get(key)
        if names is None:
            names = self.names[key] = _Names(lambda path: self._name(path, layer))
        return names

    def _sight(self, layer: tuple[int, int] | None) -> tuple | None:
        """What of ``layer`` decides on how its template is written: the templates around it."""
        if layer is None:
            return None
        number, at = layer
        templates, reach = self.templates[number], self.reach[number]
        return number, *templates[max(0, at - reach) : at], None, *templates[at : at + reach + 1]

    def _plan(
        self, start: int, end: int, layer: tuple[int, int] | None, empty_cache_events: Mapping[int, int], final: bool
    ) -> _Plan:
        source, takes, fixed, marks, paths = [], [], [], [], {}
        given: dict[tuple, tuple[list[int], list[int]]] = {}
        for at in range(start, end):
            event, here = self.short.events[at], len(source)
            if event >= 0:
                takes.append(here)
                paths[self.short.allocations[event].fqn] = None
            else:
                home = self.homes[~event]
                if home is not None:
                    where, number = self._given(~event, home, layer)
                    places, numbers = given.setdefault(where, ([], []))
                    places.append(here)
                    numbers.append(number)
                elif final:
                    fixed.append(here)
                else:
                    if at in empty_cache_events:
                        marks.append((here, empty_cache_events[at]))
                    continue
            source.append(at)
            paths[self.short.event_fqns[at]] = None
            if at in empty_cache_events:
                marks.append((here + 1, empty_cache_events[at]))
        groups = [_Given(*where, np.array(at), np.array(numbers)) for where, (at, numbers) in given.items()]
        return _Plan(np.array(source, int), np.array(takes, int), groups, np.array(fixed, int), marks, list(paths))

    def _given(self, key: int, home: tuple[int, int, tuple], layer: tuple[int, int] | None) -> tuple[tuple, int]:
        """What is given back in ``layer`` where its template gives back ``key``: part, stack, layer, whether that
        counts from ``layer``, and the number within that block."""
        stack, position, (part, name) = home
        whose = self._layer(stack, position, layer)
        number = self.numbers.get((part, stack, self.templates[stack][whose]), {}).get(name)
        if number is None:
            raise self._twice(key)
        near = layer is not None and layer[0] == stack and whose - layer[1] == self._away(position, layer)
        if near:
            self.reach[stack] = max(self.reach[stack], abs(whose - layer[1]))
        return (part, stack, whose - layer[1] if near else whose, near), number

    def _twice(self, key: int) -> NotRepeatable:
        entry = self.short.allocations[key]
        return NotRepeatable(f"more layers give back {entry.op} of {entry.fqn or 'the model'} than took it")

    def _away(self, position: int, layer: tuple[int, int]) -> int:
        """How far ``position`` is from the template of ``layer``."""
        return position - self.templates[layer[0]][layer[1]]

    def _layer(self, number: int, position: int, layer: tuple[int, int] | None) -> int:
        """Which layer of the whole is meant in ``layer`` where its template means the one at ``position``.

        A neighbour stays a neighbour. Further off a layer that occurs once is meant by one that occurs once; by others
        the one as far away, if the layers between are of the same types (several layers use what one of them made).
        """
        own = layer is not None and layer[0] == number
        if own and abs(self._away(position, layer)) <= self.stacks[number].radius:
            return layer[1] + self._away(position, layer)
        if layer is None or self.templates[layer[0]][layer[1]] in self.only[layer[0]]:
            only = self.only[number].get(position)
            if only is not None:
                return only
        if own and self._between(number, position, layer[1]):
            return layer[1] + self._away(position, layer)
        raise NotRepeatable(f"layer {position} of {self.stacks[number].paths[0]} is used from afar")

    def _between(self, number: int, position: int, at: int) -> bool:
        """Whether the layers from ``position`` to the template of layer ``at`` are of the types that they are there."""
        stack, template = self.stacks[number], self.templates[number][at]
        if stack.loop:
            return False
        there = at + position - template
        if position < template:
            return there >= 0 and stack.short[position + 1 : template] == stack.whole[there + 1 : at]
        return there < len(stack.whole) and stack.short[template + 1 : position] == stack.whole[at + 1 : there]

    def _name(self, path: str, layer: tuple[int, int] | None) -> str:
        unit = self.units[path]
        if unit is None:
            return path
        number, position, head, tail = unit
        whose = self._layer(number, position, layer)
        return head.rpartition(".")[0] + tail if self.stacks[number].loop else f"{head}.{whose}{tail}"

    def _check_released(self) -> None:
        """What the short run gives back, and only that, is given back in the whole, by every layer; nothing twice."""
        given = ~self.events[self.events < 0]
        times = np.bincount(given, minlength=self.keys)
        if times.size and times.max() > 1:
            raise self._twice(int(self.origins[times.argmax()]))
        takes = np.flatnonzero(self.events >= 0)
        if (takes[given] > np.flatnonzero(self.events < 0)).any():
            raise NotRepeatable("a layer gives back what is not taken yet")
        kept = np.ones(len(self.homes), bool)
        kept[~self._events[self._events < 0]] = False
        free = np.array([home is None for home in self.homes], bool)
        once = self.fixed[free]
        if (once < 0).any() or (times[once].astype(bool) == kept[free]).any():
            raise NotRepeatable("what no layer owns is given back by a layer that stands for none of the whole")
        stay = Counter(self.homes[key][:2] for key in np.flatnonzero(kept & ~free).tolist())
        left = [np.zeros(len(templates), int) for templates in self.templates]
        at = 0
        for block in self.blocks:
            shape = len(block.layers), block.takes
            end = at + shape[0] * shape[1]
            if block.layers[0] is not None:
                stays = block.takes - times[at:end].reshape(shape).sum(1)
                left[block.layers[0][0]][[layer for _, layer in block.layers]] += stays
            at = end
        for number, templates in enumerate(self.templates):
            for layer, position in enumerate(templates):
                if left[number][layer] != stay[number, position]:
                    raise NotRepeatable(
                        f"layer {layer} of {self.stacks[number].paths[0]} does not give back what it took"
                    )

    def _check_run(self) -> None:
        """Layers of one type all run in the forward pass, or none does: else what runs is chosen by number."""
        for number, stack in enumerate(self.stacks):
            runs = {(kind, (number, position) in self.ran) for position, kind in enumerate(stack.short)}
            if len(runs) > len(set(stack.short)):
                raise NotRepeatable(f"of layers alike in {stack.paths[0]} some run and some do not")

    # --- as books -------------------------------------------------------------------------------------------

    @cached_property
    def events(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int32), *(block.events.ravel() for block in self.blocks)])

    @cached_property
    def origins(self) -> np.ndarray:
        """By key the short run's allocation."""
        sources = [(self._events[block.source], len(block.layers)) for block in self.blocks]
        return np.concatenate([np.zeros(0, np.int32), *(np.tile(took[took >= 0], times) for took, times in sources)])

    def trace_log(self) -> TraceLog:
        """Entry by entry, with the sites."""
        short, out = self.short, TraceLog([], self.events.tolist(), [], list(self.marks))
        for block in self.blocks:
            source = block.source.tolist()
            taken = [short.allocations[event] for event in self._events[source].tolist() if event >= 0]
            for layer in block.layers:
                names = self._names(layer)
                out.event_fqns += [names[short.event_fqns[at]] for at in source]
                out.allocations += [entry._replace(fqn=names[entry.fqn]) for entry in taken]
        for key, more in self.growth.items():
            if self.sole[key] >= 0:
                entry = out.allocations[self.sole[key]]
                out.allocations[self.sole[key]] = entry._replace(size=entry.size + more)
        return out

    def columns(self) -> TraceColumns:
        """As arrays."""
        short, origins = self.short.columns(), self.origins
        sizes, size = list(short.sizes), short.size[origins]
        for key, more in self.growth.items():
            if self.sole[key] >= 0:
                size[self.sole[key]] = len(sizes)
                sizes.append(short.sizes[short.size[key]] + more)
        called, width = {id(names): number for number, names in enumerate(self.names.values())}, len(short.fqns)
        whose = [[called[id(self._names(layer))] for layer in block.layers] for block in self.blocks]
        whose = np.concatenate([np.zeros(0, int), *(np.repeat(w, block.takes) for w, block in zip(whose, self.blocks))])
        cells = whose * width + short.fqn[origins]  # a layer, and a module as the short run calls it
        module = np.zeros(len(called) * width, np.int32)
        found, names = np.flatnonzero(np.bincount(cells)), list(self.names.values())
        module[found], modules = numbered([names[cell // width][short.fqns[cell % width]] for cell in found.tolist()])
        kind, op = short.kind[origins], short.op[origins]
        return TraceColumns(self.events, size, module[cells], kind, op, sizes, modules, short.ops, self.marks)
