"""A training step as a list of events: memory allocated and memory freed.

Writers are the dry run on the meta device and the probe on a real card; readers are the allocator's replay, the
summary, the timeline and the comparison. They meet only here.

Note [Streams and ranks]
    An allocation belongs to one CUDA stream of one rank. The ``stream`` is a column of the allocations, since PyTorch
    frees a block into the pool of the stream that it was allocated on (Note [Streams] in ``allocator/caching.py``). A
    ``rank`` is no column: ranks share no memory, so each class of ranks that allocate alike has a log, a profile and a
    verdict of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

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

    ``size`` is the bytes asked for, before any rounding. ``fqn`` is the dotted name of the module on whose behalf it
    was made (``""``: the model itself or the training loop), as ``named_modules`` has it; ``kind`` is one of
    :data:`KINDS`, ``phase`` the phase in which it was made and ``op`` the operator that made it. ``stream`` is the
    number of the CUDA stream that was current (0: the default one).
    """

    size: Number
    fqn: str
    kind: str
    phase: str
    op: str
    stream: int = 0


class Mark(NamedTuple):
    """The beginning of a phase: everything from event ``at`` on belongs to phase ``name`` of step ``step`` (0: the
    load).

    A mark named :data:`EMPTY_CACHE` begins none. It is a call of ``torch.cuda.empty_cache`` before event ``at``.
    """

    at: int
    name: str
    step: int


EMPTY_CACHE = "empty_cache"
"""The name of a mark at which the allocator gives back what it holds unused."""
SETUP = "setup"
"""The part of loading in which a trainer is made. The model is on the card before it."""


@dataclass
class TraceLog:
    """The events of one run, in order, entry by entry.

    ``events[i]`` is ``k`` where ``allocations[k]`` is allocated and ``~k`` where it is freed. ``event_fqns[i]`` is the
    module in which event ``i`` happened: for a free not always the one that allocated. ``host``: the most bytes that
    the process has in the host's memory, as far as they are counted: load, pageable and pinned.
    """

    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    event_fqns: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    host: dict[str, int] = field(default_factory=dict)

    def columns(self) -> TraceColumns:
        """The same as arrays, without ``event_fqns``."""
        entries = self.allocations
        size, sizes = numbered([entry.size for entry in entries])
        fqn, fqns = numbered([entry.fqn for entry in entries])
        op, ops = numbered([entry.op for entry in entries])
        kind = np.fromiter((KINDS.index(entry.kind) for entry in entries), np.int8, len(entries))
        stream = np.fromiter((entry.stream for entry in entries), np.uint8, len(entries))
        events = np.array(self.events, np.int32)
        return TraceColumns(events, size, fqn, kind, op, stream, sizes, fqns, ops, list(self.marks), self.host)


@dataclass(frozen=True, eq=False)
class TraceColumns:
    """A :class:`TraceLog` as arrays.

    ``events`` (int32) are the log's. ``size``, ``fqn``, ``op`` (int32) and ``kind`` (int8) have one entry for each
    allocation: its index in ``sizes`` (bytes), ``fqns``, ``ops`` and :data:`KINDS`; ``stream`` (uint8) its stream.
    ``host`` is the log's.
    """

    events: npt.NDArray[np.int32]
    size: npt.NDArray[np.int32]
    fqn: npt.NDArray[np.int32]
    kind: npt.NDArray[np.int8]
    op: npt.NDArray[np.int32]
    stream: npt.NDArray[np.uint8]
    sizes: Sequence[Number]
    fqns: Sequence[str]
    ops: Sequence[str]
    marks: Sequence[Mark]
    host: dict[str, int] = field(default_factory=dict)

    def keys_of(self, kind: str, op: str | None = None) -> npt.NDArray[np.int_]:
        """The allocations of a kind, in ascending order; with ``op`` those that this operator made."""
        found = self.kind == KINDS.index(kind)
        if op is not None:
            found &= self.op == (self.ops.index(op) if op in self.ops else -1)
        return np.flatnonzero(found)

    def total_size(self, keys: npt.NDArray[np.int_]) -> Number:
        """Bytes of these allocations together."""
        counts = np.bincount(self.size[keys], minlength=len(self.sizes)).tolist()
        total: Number = 0
        for count, size in zip(counts, self.sizes, strict=True):
            if count:
                total = total + count * size
        return total

    def before_phase(self, phase: str) -> TraceColumns:
        """What happened before the first phase of this name; everything where there is none."""
        end = next((number for number, mark in enumerate(self.marks) if mark.name == phase), None)
        if end is None:
            return self
        events = self.events[: self.marks[end].at]
        count = np.count_nonzero(events >= 0)
        columns = {name: vars(self)[name][:count] for name in ("size", "fqn", "kind", "op", "stream")}
        return replace(self, events=events, marks=self.marks[:end], **columns)


Value = TypeVar("Value", bound=Hashable)


def numbered(values: Sequence[Value]) -> tuple[npt.NDArray[np.int32], list[Value]]:
    """Each value as an index (int32) into the distinct values, and these, in the order of their first appearance."""
    index: dict[Value, int] = {}
    for value in values:
        if value not in index:
            index[value] = len(index)
    return np.fromiter(map(index.__getitem__, values), np.int32, len(values)), list(index)
