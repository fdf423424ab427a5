"""A training step as a list of events: memory taken and memory given back.

Writers are the dry run on the meta device and the probe on a real card; readers are the allocator replay,
the breakdown, the timeline and the comparison. They meet only here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np

from .sizes import Number

KINDS = (
    "weights",
    "quantization_constants",
    "adapters",
    "buffers",
    "inputs",
    "gradients",
    "optimizer_state",
    "activations",
    "activation_gradients",
    "logits_and_loss",
    "kv_cache",
    "dequantized_weights",
    "optimizer_temporaries",
    "kernel_workspace",
    "temporaries",
)
"""What an allocation is for. The parts of a peak are sums over these and nothing else."""


class Allocation(NamedTuple):
    """One request to the allocator.

    ``size`` is the bytes asked for (before any rounding), ``module`` the dotted path of the module on whose
    behalf it was made (``""``: the model itself or the training loop), ``kind`` one of :data:`KINDS`,
    ``phase`` the phase in which it was made and ``op`` the operator that made it.
    """

    size: int
    fqn: str
    kind: str
    phase: str
    op: str


class Mark(NamedTuple):
    """A place in the stream: everything from event ``at`` on belongs to phase ``name`` of step ``step``.

    A mark named ``empty_cache`` is the call of that name: the allocator gives back what it holds unused.
    """

    at: int
    name: str
    step: int


EMPTY_CACHE = "empty_cache"


@dataclass
class TraceLog:
    """The events of one run, in order.

    ``events[i]`` is ``k`` where ``allocations[k]`` is taken and ``~k`` where it is given back.
    ``sites[i]`` is the module path during which event ``i`` happened: for a release, where it was released.
    """

    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    event_fqns: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def columns(self) -> TraceColumns:
        sizes, fqns, kinds, _, ops = zip(*self.allocations) if self.allocations else ((),) * 5
        kind = np.fromiter(map(KINDS.index, kinds), np.int8, len(kinds))
        (size, sizes), (fqn, fqns), (op, ops) = map(numbered, (sizes, fqns, ops))
        return TraceColumns(np.array(self.events, np.int32), size, fqn, kind, op, sizes, fqns, ops, list(self.marks))


@dataclass(frozen=True, eq=False)
class TraceColumns:
    """TraceLog as arrays, without their sites: of each allocation ``size``, ``module``, ``kind`` and ``op`` are numbers of
    an entry in ``sizes`` (bytes), ``modules``, ``KINDS`` and ``ops``."""

    events: np.ndarray
    size: np.ndarray
    fqn: np.ndarray
    kind: np.ndarray
    op: np.ndarray
    sizes: Sequence[Number]
    fqns: Sequence[str]
    ops: Sequence[str]
    marks: Sequence[Mark]

    def which(self, kind: str, op: str | None = None) -> np.ndarray:
        """The allocations of a kind, made by an operator."""
        found = self.kind == KINDS.index(kind)
        if op is not None:
            found &= self.op == (self.ops.index(op) if op in self.ops else -1)
        return np.flatnonzero(found)

    def total(self, which: np.ndarray) -> Number:
        """Bytes of these allocations together."""
        counts = np.bincount(self.size[which], minlength=len(self.sizes)).tolist()
        return sum(count * size for count, size in zip(counts, self.sizes) if count)

    def until(self, phase: str) -> TraceColumns:
        """The books before a phase; all of them where there is none."""
        end = next((number for number, mark in enumerate(self.marks) if mark.name == phase), None)
        if end is None:
            return self
        events = self.events[: self.marks[end].at]
        taken = np.count_nonzero(events >= 0)
        columns = {name: vars(self)[name][:taken] for name in ("size", "fqn", "kind", "op")}
        return replace(self, events=events, marks=self.marks[:end], **columns)


Value = TypeVar("Value", bound=Hashable)


def numbered(values: Sequence[Value]) -> tuple[np.ndarray, list[Value]]:
    """Each value as the number of its first like, and those (int32)."""
    index: dict[Value, int] = {}
    for value in values:
        if value not in index:
            index[value] = len(index)
    return np.fromiter(map(index.__getitem__, values), np.int32, len(values)), list(index)
