"""A run for every batch, length and number of multiprocessors for which it does the same.

A :class:`~vramplan.memory.events.TraceLog` is written entry by entry. A :class:`TraceTemplate` is what is kept and
read, in milliseconds: events and entries as arrays, sizes as the few distinct functions of (b, s, m) that occur. At one
point it is a :class:`ConcreteTrace`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .allocator.config import RepeatedStep, ReplayInput
from .events import EMPTY_CACHE, KINDS, Allocation, Mark, TraceColumns, TraceLog, numbered
from .sizes import ShapePoint, compiled, text_of
from .table import NUMBER

INTERVALS = 240
"""Into how many intervals a run's events are divided, about: enough for a screen. Of each the highest moment is
told."""

_DTYPES: dict[str, type[np.signedinteger[Any]]] = {
    "back": np.int32, "size": np.int32, "fqn": np.int32, "kind": np.int8, "op": np.int32,
}  # fmt: skip
"""A template's columns as they are kept. ``back``: 0 where an event allocates, else how many allocations ago it was
that the freed one was made. Beside them a ``stream`` (uint8), where not all are of the default one."""


@dataclass(frozen=True, eq=False)
class TraceTemplate(TraceColumns):
    """Columns whose ``sizes`` are texts: arithmetic of b, s and m, as :mod:`~vramplan.memory.sizes` writes it.

    ``conditions`` are texts, too: where all are true, a run does this. ``digest`` tells the template from others where
    it was read from bytes; "": it was not.
    """

    sizes: Sequence[str]  # type: ignore[assignment]  # the column of TraceColumns, each entry by text_of
    conditions: Sequence[str] = ()
    digest: str = ""

    @staticmethod
    def of(trace_log: TraceColumns, conditions: Iterable[str]) -> TraceTemplate:
        """The template of a run that was traced with sizes that are functions, under these conditions."""
        return TraceTemplate(
            **{**vars(trace_log), "sizes": [*map(text_of, trace_log.sizes)]}, conditions=list(conditions)
        )

    def holds(self, point: ShapePoint) -> bool:
        """Whether the run does this at ``point``."""
        try:
            return all(self._conditions_at(point))
        except ZeroDivisionError:
            return False

    def at(self, point: ShapePoint) -> ConcreteTrace:
        """The run at ``point``, which must hold."""
        return ConcreteTrace(self, point, np.array(self._sizes_at(point), np.int64))

    @cached_property
    def _conditions_at(self) -> Callable[[ShapePoint], list[bool]]:
        return compiled(self.conditions)

    @cached_property
    def _sizes_at(self) -> Callable[[ShapePoint], list[int]]:
        return compiled(self.sizes)

    @cached_property
    def empty_cache_events(self) -> npt.NDArray[np.int64]:
        """The events before which ``empty_cache`` is called, in ascending order."""
        return np.array([mark.at for mark in self.marks if mark.name == EMPTY_CACHE], np.int64)

    @cached_property
    def allocated_at(self) -> npt.NDArray[np.int32]:
        """By key, the event that allocates."""
        return np.flatnonzero(self.events >= 0).astype(np.int32)

    @cached_property
    def freed_at(self) -> npt.NDArray[np.int32]:
        """By key, the event that frees; the number of events where none does."""
        out = np.full(self.size.size, self.events.size, np.int32)
        frees = np.flatnonzero(self.events < 0)
        out[~self.events[frees]] = frees
        return out

    @cached_property
    def first_step(self) -> int:
        """The event with which the first step begins; the number of events where none does."""
        return next((mark.at for mark in self.marks if mark.step), self.events.size)

    @cached_property
    def repeated_step(self) -> RepeatedStep | None:
        """The last step, if training can repeat it; None: it is the only one, or leaves other sizes than it frees."""
        last = max((mark.step for mark in self.marks), default=0)
        if last < 2:
            return None
        start = next(mark.at for mark in self.marks if mark.step == last)
        first_key = np.count_nonzero(self.events[:start] >= 0)  # its own allocations have this key and higher ones
        freed = ~self.events[start:][self.events[start:] < 0]
        stays = np.ones(self.size.size, bool)
        stays[freed] = False
        from_previous, carried_over = np.sort(freed[freed < first_key]), np.flatnonzero(stays[first_key:]) + first_key
        if from_previous.size != carried_over.size:
            return None
        if any((column[from_previous] != column[carried_over]).any() for column in (self.size, self.stream)):
            return None
        return RepeatedStep(start, from_previous, carried_over)

    @cached_property
    def fqn_families(self) -> tuple[list[str], npt.NDArray[np.int32]]:
        """The modules with a star for their index in a list (``model.layers.*.mlp``), and of which one each is.

        The second has one entry for each of ``fqns``: an index into the first.
        """
        family, names = numbered([NUMBER.sub(".*", fqn) for fqn in self.fqns])
        return names, family

    @cached_property
    def phase_spans(self) -> list[tuple[Mark, int, int]]:
        """The phases in their order, each with the first of its intervals and the one after its last."""
        phases = [mark for mark in self.marks if mark.name != EMPTY_CACHE]
        firsts = np.searchsorted(self._intervals[1], np.arange(len(phases) + 1)).tolist()
        return [*zip(phases, firsts, firsts[1:], strict=False)]

    @cached_property
    def _intervals(self) -> tuple[list[int], list[int]]:
        """The event with which each interval begins, and the number of its phase.

        Intervals begin with phases, then at equal distances, and with the last call of ``empty_cache``: what is
        allocated then is asked for.
        """
        stride, last = max(1, self.events.size // INTERVALS), self.empty_cache_events[-1:].tolist()
        starts = [mark.at for mark in self.marks if mark.name != EMPTY_CACHE]
        begins = []
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], self.events.size], strict=False)):
            within = {start, *range(start, end, stride), *(at for at in last if start <= at < end)}
            begins += [(at, number) for at in sorted(within)]
        return [at for at, _ in begins], [number for _, number in begins]

    @cached_property
    def replay_input(self) -> ReplayInput:
        """What the allocator is fed, but for the sizes: these are :attr:`ConcreteTrace.bytes`."""
        alive = np.cumsum(np.where(self.events >= 0, 1, -1), dtype=np.int32)
        interval_bounds = np.array([*self._intervals[0], self.events.size], np.int64)
        return ReplayInput(
            self.events,
            self.size,
            self.stream,
            interval_bounds,
            self.empty_cache_events,
            self.repeated_step,
            int(alive.max(initial=0)),
        )

    # --- as bytes ---------------------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """The template as a dict of plain values and ``bytes``, for :func:`packed`.

        Columns are differences where that makes layers that are alike look alike: compressed, they are small.
        """
        allocates = self.events >= 0
        back = np.where(allocates, 0, np.cumsum(allocates) - ~self.events)
        columns = {
            "back": back,
            "size": self.size,
            "fqn": np.diff(self.fqn, prepend=0),
            "kind": self.kind,
            "op": self.op,
        }
        streams = {"stream": self.stream.tobytes()} if self.stream.any() else {}
        return {
            **{name: column.astype(_DTYPES[name]).tobytes() for name, column in columns.items()},
            **streams,
            "sizes": self.sizes,
            "fqns": self.fqns,
            "ops": self.ops,
            "marks": [list(mark) for mark in self.marks],
            "conditions": self.conditions,
        }

    @staticmethod
    def load(data: dict[str, Any], digest: str = "") -> TraceTemplate:
        """What :meth:`dump` wrote. Raises :class:`ValueError` where it is no template."""
        try:
            columns: dict[str, Any] = {name: np.frombuffer(data[name], dtype) for name, dtype in _DTYPES.items()}
            back = columns.pop("back")
            allocates = back == 0
            counts = np.cumsum(allocates)
            events = np.where(allocates, counts - 1, ~(counts - back)).astype(np.int32)
            columns["fqn"] = np.cumsum(columns["fqn"], dtype=np.int32)
            count = int(counts[-1]) if counts.size else 0
            if events.size and not -count <= events.min() <= events.max() < count:
                raise ValueError("events of no allocation")
            texts = {name: data[name] for name in ("sizes", "fqns", "ops")}
            ranges = {"size": texts["sizes"], "fqn": texts["fqns"], "op": texts["ops"], "kind": KINDS}
            for name, values in ranges.items():
                column = columns[name]
                if column.size != count or (count and not 0 <= column.min() <= column.max() < len(values)):
                    raise ValueError(f"the column {name} names what is not there")
            columns["stream"] = np.frombuffer(data.get("stream", bytes(count)), np.uint8)
            if columns["stream"].size != count:
                raise ValueError("the column stream has another length")
            marks = [Mark(int(at), str(name), int(step)) for at, name, step in data["marks"]]
            conditions = list(data["conditions"])
            return TraceTemplate(events=events, **columns, **texts, marks=marks, conditions=conditions, digest=digest)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not a template: {error}") from None


@dataclass(frozen=True, eq=False)
class ConcreteTrace:
    """A run at one point: a template with numbers for its sizes.

    ``bytes`` has one entry for each of the template's ``sizes`` (int64).
    """

    template: TraceTemplate
    point: ShapePoint
    bytes: npt.NDArray[np.int64]

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each allocation, by key."""
        return self.bytes[self.template.size]

    def trace_log(self) -> TraceLog:
        """The run entry by entry, without ``event_fqns``: those are not kept."""
        template = self.template
        names = [template.fqns[n] for n in template.fqn]
        kinds = [KINDS[n] for n in template.kind]
        ops = [template.ops[n] for n in template.op]
        allocations = np.cumsum(template.events >= 0)
        marks = [mark for mark in template.marks if mark.name != EMPTY_CACHE]
        bounds = [(int(allocations[mark.at - 1]) if mark.at else 0, mark.name) for mark in marks]
        phases: list[str] = []
        for (start, name), (end, _) in zip(bounds, [*bounds[1:], (len(names), "")], strict=False):
            phases += [name] * (end - start)
        entries = map(Allocation, self.sizes.tolist(), names, kinds, phases, ops, template.stream.tolist())
        return TraceLog(list(entries), template.events.tolist(), [], list(template.marks))


def packed(data: dict[str, Any]) -> bytes:
    """A dict of plain values and ``bytes`` as bytes: compressed, with zlib's checksum."""
    blobs = {name: value for name, value in data.items() if isinstance(value, bytes)}
    head = {**{k: v for k, v in data.items() if k not in blobs}, "": {name: len(blob) for name, blob in blobs.items()}}
    text = json.dumps(head, separators=(",", ":")).encode()
    return zlib.compress(b"".join([len(text).to_bytes(8, "little"), text, *blobs.values()]), 3)


def unpacked(data: bytes) -> dict[str, Any]:
    """What :func:`packed` was given. Raises :class:`ValueError` where the bytes are damaged."""
    try:
        raw = zlib.decompress(data)
        at = 8 + int.from_bytes(raw[:8], "little")
        head: dict[str, Any] = json.loads(raw[8:at])
        for name, length in head.pop("").items():
            head[name] = raw[at : at + length]
            at += length
        return head
    except (zlib.error, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"damaged: {error}") from None
