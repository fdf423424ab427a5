"""TraceLog in columns: what a step does, for every batch, length and number of multiprocessors for which it does that.

:class:`~vramplan.memory.events.TraceLog` are written entry by entry; a :class:`TraceTemplate` is what is kept and read, in
milliseconds: events and entries as arrays, sizes as the few distinct functions of these that occur.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .allocator.config import RepeatedStep, ReplayInput
from .events import EMPTY_CACHE, KINDS, Allocation, Mark, TraceColumns, TraceLog, numbered
from .sizes import ShapePoint, compiled, text_of
from .table import NUMBER

POINTS = 240
"""Stretches of a stream, about: enough for a screen; of each the highest moment is shown."""


_AS = {"back": np.int32, "size": np.int32, "fqn": np.int32, "kind": np.int8, "op": np.int32}
"""A script's columns as bytes."""


@dataclass(frozen=True, eq=False)
class TraceTemplate(TraceColumns):
    """Columns whose ``sizes`` are texts of b, s and m. ``conditions`` are what these must keep. ``digest``
    tells it from others, where it was read from bytes."""

    sizes: Sequence[str]
    conditions: Sequence[str] = ()
    digest: str = ""

    @staticmethod
    def of(trace_log: TraceColumns, conditions: Iterable[str]) -> TraceTemplate:
        return TraceTemplate(
            **{**vars(trace_log), "sizes": [*map(text_of, trace_log.sizes)]}, conditions=list(conditions)
        )

    def holds(self, point: ShapePoint) -> bool:
        """Whether the step does this at ``point``."""
        try:
            return all(self._kept(point))
        except ZeroDivisionError:
            return False

    def at(self, point: ShapePoint) -> ConcreteTrace:
        """The step at ``point``."""
        return ConcreteTrace(self, point, np.array(self._sized(point), np.int64))

    @cached_property
    def _kept(self) -> Callable[[ShapePoint], Sequence]:
        return compiled(self.conditions)

    @cached_property
    def _sized(self) -> Callable[[ShapePoint], Sequence]:
        return compiled(self.sizes)

    @cached_property
    def empty_cache_events(self) -> np.ndarray:
        """The events before which ``empty_cache`` is called."""
        return np.array([mark.at for mark in self.marks if mark.name == EMPTY_CACHE], np.int64)

    @cached_property
    def taken(self) -> np.ndarray:
        """The event that takes each allocation."""
        return np.flatnonzero(self.events >= 0).astype(np.int32)

    @cached_property
    def released(self) -> np.ndarray:
        """The event that gives each allocation back; the number of events where none does."""
        out = np.full(self.size.size, self.events.size, np.int32)
        backs = np.flatnonzero(self.events < 0)
        out[~self.events[backs]] = backs
        return out

    @cached_property
    def first_step(self) -> int:
        """The event with which the first step begins; the number of events where none does."""
        return next((mark.at for mark in self.marks if mark.step), self.events.size)

    @cached_property
    def repeated_step(self) -> RepeatedStep | None:
        """The last step, which training repeats; None where it is the only one, or leaves other than it gives back."""
        last = max((mark.step for mark in self.marks), default=0)
        if last < 2:
            return None
        start = next(mark.at for mark in self.marks if mark.step == last)
        own = np.count_nonzero(self.events[:start] >= 0)  # its allocations are numbered from here on
        released = ~self.events[start:][self.events[start:] < 0]
        stays = np.ones(self.size.size, bool)
        stays[released] = False
        freed_from_previous, carried_over = np.sort(released[released < own]), np.flatnonzero(stays[own:]) + own
        if (
            freed_from_previous.size != carried_over.size
            or (self.size[freed_from_previous] != self.size[carried_over]).any()
        ):
            return None
        return RepeatedStep(start, freed_from_previous, carried_over)

    @cached_property
    def families(self) -> tuple[list[str], np.ndarray]:
        """The modules with a star for their number in a list (``model.layers.*.mlp``), and which one each module is."""
        of, names = numbered([NUMBER.sub(".*", path) for path in self.fqns])
        return names, of

    @cached_property
    def spans(self) -> list[tuple[Mark, int, int]]:
        """The phases in their order, each with the first of its stretches and the one after its last."""
        phases = [mark for mark in self.marks if mark.name != EMPTY_CACHE]
        firsts = np.searchsorted(self._intervals[1], np.arange(len(phases) + 1)).tolist()
        return [*zip(phases, firsts, firsts[1:])]

    @cached_property
    def _intervals(self) -> tuple[list[int], list[int]]:
        """Where each stretch begins, and the number of its phase. What is left when the cache is given back for the
        last time is wanted, too."""
        stride, last = max(1, self.events.size // POINTS), self.empty_cache_events[-1:].tolist()
        starts = [mark.at for mark in self.marks if mark.name != EMPTY_CACHE]
        begins = []
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], self.events.size])):
            own = {start, *range(start, end, stride), *(at for at in last if start <= at < end)}
            begins += [(at, number) for at in sorted(own)]
        return [at for at, _ in begins], [number for _, number in begins]

    @cached_property
    def replay_input(self) -> ReplayInput:
        alive = np.cumsum(np.where(self.events >= 0, 1, -1), dtype=np.int32)
        interval_bounds = np.array([*self._intervals[0], self.events.size], np.int64)
        return ReplayInput(
            self.events,
            self.size,
            interval_bounds,
            self.empty_cache_events,
            self.repeated_step,
            int(alive.max(initial=0)),
        )

    # --- as bytes ---------------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """As a dict of plain values and ``bytes``, small: what layers have in common is written alike."""
        takes = self.events >= 0
        back = np.where(takes, 0, np.cumsum(takes) - ~self.events)
        columns = {
            "back": back,
            "size": self.size,
            "fqn": np.diff(self.fqn, prepend=0),
            "kind": self.kind,
            "op": self.op,
        }
        return {
            **{name: column.astype(_AS[name]).tobytes() for name, column in columns.items()},
            "sizes": self.sizes,
            "fqns": self.fqns,
            "ops": self.ops,
            "marks": [list(mark) for mark in self.marks],
            "conditions": self.conditions,
        }

    @staticmethod
    def load(data: dict[str, Any], digest: str = "") -> TraceTemplate:
        """What :meth:`dump` wrote. Raises :class:`ValueError` where it is no script."""
        try:
            back, size, fqn, kind, op = (np.frombuffer(data[name], kind) for name, kind in _AS.items())
            takes = back == 0
            taken = np.cumsum(takes)
            events = np.where(takes, taken - 1, ~(taken - back)).astype(np.int32)
            fqn = np.cumsum(fqn, dtype=np.int32)
            count = int(taken[-1]) if taken.size else 0
            texts = [data["sizes"], data["fqns"], data["ops"]]
            for column, names in zip((size, fqn, op), texts):
                if column.size != count or count and not 0 <= column.min() <= column.max() < len(names):
                    raise ValueError("numbers of nothing")
            if kind.size != count or count and not 0 <= kind.min() <= kind.max() < len(KINDS):
                raise ValueError("unknown kinds")
            if events.size and not -count <= events.min() <= events.max() < count:
                raise ValueError("events of nothing")
            marks = [Mark(int(at), str(name), int(step)) for at, name, step in data["marks"]]
            return TraceTemplate(events, size, fqn, kind, op, *texts, marks, data["conditions"], digest)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not a script: {error}") from None


@dataclass(frozen=True, eq=False)
class ConcreteTrace:
    """A script at one point: ``bytes`` are those of each of its sizes, ``sizes`` those of each
    allocation."""

    template: TraceTemplate
    point: ShapePoint
    bytes: np.ndarray

    @cached_property
    def sizes(self) -> np.ndarray:
        return self.bytes[self.template.size]

    def trace_log(self) -> TraceLog:
        """The same, entry by entry; where something was released is not kept."""
        template = self.template
        names = [template.fqns[n] for n in template.fqn]
        kinds = [KINDS[n] for n in template.kind]
        ops = [template.ops[n] for n in template.op]
        taken = np.cumsum(template.events >= 0)
        bounds = [
            (int(taken[mark.at - 1]) if mark.at else 0, mark.name)
            for mark in template.marks
            if mark.name != EMPTY_CACHE
        ]
        phases: list[str] = []
        for (start, name), (end, _) in zip(bounds, [*bounds[1:], (len(names), "")]):
            phases += [name] * (end - start)
        entries = map(Allocation, self.sizes.tolist(), names, kinds, phases, ops)
        return TraceLog(list(entries), template.events.tolist(), [], list(template.marks))


def packed(data: dict[str, Any]) -> bytes:
    """A dict of plain values and ``bytes`` as bytes, compressed, with a checksum (zlib's)."""
    blobs = {name: value for name, value in data.items() if isinstance(value, bytes)}
    head = {**{k: v for k, v in data.items() if k not in blobs}, "": {name: len(blob) for name, blob in blobs.items()}}
    text = json.dumps(head, separators=(",", ":")).encode()
    return zlib.compress(b"".join([len(text).to_bytes(8, "little"), text, *blobs.values()]), 3)


def unpacked(data: bytes) -> dict[str, Any]:
    """What :func:`packed` was given. Raises :class:`ValueError` where the bytes are damaged."""
    try:
        raw = zlib.decompress(data)
        at = 8 + int.from_bytes(raw[:8], "little")
        head = json.loads(raw[8:at])
        for name, length in head.pop("").items():
            head[name] = raw[at : at + length]
            at += length
        return head
    except (zlib.error, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"damaged: {error}") from None
