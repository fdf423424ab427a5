"""The dispatch mode that keeps the books of whatever runs under it on the meta device.

Every tensor's storage is followed by a weak reference: its first appearance is memory taken, its death memory given
back. The same autograd engine, the same Python and the same reference counts run as on a card, so lifetimes are exact;
what CUDA does otherwise is asked of :mod:`vramplan.dryrun.cuda`.

Who an allocation is for is read off the module that is running; in the backward pass off the autograd node, whose
sequence number leads back to the forward operator that made it (as PyTorch's profiler links the two).
"""

from __future__ import annotations

import sys
import weakref
from bisect import bisect_right
from contextlib import contextmanager, nullcontext

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import OurFault
from ..memory.events import EMPTY_CACHE, Allocation, Mark, TraceLog
from . import meta_kernels as native  # noqa: F401  (native: shape functions in C++)
from .cuda.card_facts import Card
from .cuda.host_reads import HOST_READS
from .cuda.registry import KERNELS
from .known_values import Images, KnownValues, kept_in_memory
from .sandbox import is_tracing, replaced
from .symbols import size_of

_current_node = torch._C._current_autograd_node
_sequence_number = torch._C._autograd._get_sequence_nr
FORWARD_OTHER_CHECKPOINTING = "other"
"""The phase of one more forward pass with checkpointing the other way round, which is no part of the job."""
_UNLINKED = 1 << 63  # sequence_nr of AccumulateGrad nodes is UINT64_MAX


class DataDependent(Exception):
    """The program asked for a value that no dry run has; ``where`` is the function that asked."""

    def __init__(self, where: str):
        super().__init__(where)
        self.where = where


def canonical_fqn(path: str) -> str:
    """A module's path without what PEFT wraps around it."""
    if path in ("base_model", "base_model.model"):
        return ""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


class _Watch(weakref.ref):
    __slots__ = ("key", "id")


class MemoryTracker(TorchDispatchMode):
    """Keeps :class:`~vramplan.memory.events.TraceLog` of what runs under it.

    ``card`` is the :class:`~vramplan.dryrun.cuda.card_facts.Card` whose kernels are meant; ``mask``, what the job's batch carries, is
    the answer to a program that asks whether its mask hides anything or sequences are packed, ``length`` to one that
    asks how long a sequence is; where that is a symbol, shapes are computed by PyTorch's functions in Python. Of
    ``shifted`` labels ``labelled`` ones are none of those that are left out; of other numbers of labels all.
    """

    device = "meta"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here: PyTorch need not keep its compiler out of every call (8 % of it)."""
        return False

    def __init__(self, card: Card, mask: str = "full", length: int = 0, symbolic: bool = False):
        super().__init__()
        self.symbolic = symbolic
        self.card = card
        self.mask = mask
        self.length = length
        self.trace_log = TraceLog()
        self.phase = "load"
        self.step = 0
        self.in_backward = False
        self.autocast = None
        self.values: KnownValues | None = None
        self.shifted = self.labelled = 0
        self.heads: set[str] = {""}
        self._kind = "temporaries"
        self._watched: dict[int, _Watch] = {}
        self._paths: dict[int, str] = {}
        self._owner: dict[int, str] = {}
        self._stack: list[str] = []
        self._links: tuple[list[int], list[str]] = ([], [])
        self._site: str | None = None
        self.library_workspaces: set[tuple[str, int, str]] = set()
        self._closed = False

    def __enter__(self):
        if not is_tracing():
            raise OurFault("a tracker runs outside of the sandbox")
        return super().__enter__()

    # --- phases and places ----------------------------------------------------------------------------------

    def mark(self, phase: str, step: int, kind: str) -> None:
        """From here on events belong to ``phase``; what is allocated is of ``kind`` until it proves to be another."""
        self.phase, self.step, self._kind = phase, step, kind
        self._site = None
        self.trace_log.marks.append(Mark(len(self.trace_log.events), phase, step))
        if phase in ("forward", FORWARD_OTHER_CHECKPOINTING):
            self._links = ([], [])

    def empty_cache(self) -> None:
        self.trace_log.marks.append(Mark(len(self.trace_log.events), EMPTY_CACHE, self.step))

    @contextmanager
    def watching(self, model: torch.nn.Module):
        """Know the modules of ``model`` by path while its calls run, and keep the books."""
        self._paths = {id(fqn): canonical_fqn(name) for name, fqn in model.named_modules()}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.heads = {""} if head is None else {"", self._paths.get(id(head), "")}
        original = torch.nn.Module.__call__
        stack, paths = self._stack, self._paths

        def call(fqn, *args, **kwargs):
            path = paths.get(id(fqn))
            if path is None:
                return original(fqn, *args, **kwargs)
            recompute = self.autocast is not None and self.in_backward and not stack
            stack.append(path)
            try:
                with self.autocast.on() if recompute else nullcontext():  # a checkpoint enters its own autocast
                    return original(fqn, *args, **kwargs)
            finally:
                stack.pop()

        with replaced(torch.nn.Module, "__call__", call), self:
            yield self

    @contextmanager
    def track_values(self, values: KnownValues):
        """Know ``values``, which the program may ask for."""
        self.values = values
        with kept_in_memory():
            yield

    @contextmanager
    def on_behalf_of(self, path: str):
        """Keep the books of what runs, all of it for the module at ``path``."""
        with self.attributed_to(path), self:
            yield self

    @contextmanager
    def attributed_to(self, path: str):
        """What runs meanwhile runs on behalf of ``path``, which need not be a module's."""
        self._stack.append(path)
        try:
            yield
        finally:
            self._stack.pop()

    @property
    def current_fqn(self) -> str:
        """The module path on whose behalf the program runs; of the model itself, or none's: empty."""
        return self._current_fqn() or ""

    def _current_fqn(self) -> str | None:
        """The module path on whose behalf the current operator runs; None: nobody's (loop, loss, optimiser)."""
        if self._stack:
            return self._stack[-1]
        node = _current_node()
        if node is None:
            return None
        number = node._sequence_nr()
        if number >= _UNLINKED:
            return self._owner.get(node.variable.untyped_storage()._cdata)
        numbers, places = self._links
        attributed_to = bisect_right(numbers, number)
        return places[attributed_to] if attributed_to < len(places) else None

    # --- entries --------------------------------------------------------------------------------------------

    def record_alloc(self, size: int, fqn: str, kind: str, op: str) -> int:
        """Enter ``size`` bytes taken; returns the key under which they are given back."""
        trace_log = self.trace_log
        key = len(trace_log.allocations)
        trace_log.allocations.append(Allocation(size_of(size), fqn, kind, self.phase, op))
        trace_log.events.append(key)
        trace_log.event_fqns.append(fqn)
        return key

    def close(self) -> TraceLog:
        """Stop: what is released from here on is the dry run's own end, not the job's."""
        self._closed = True
        return self.trace_log

    def record_free(self, key: int) -> None:
        if self._closed:
            return
        trace_log = self.trace_log
        trace_log.events.append(~key)
        trace_log.event_fqns.append(self._site if self._site is not None else trace_log.allocations[key].fqn)

    def record_temporary(self, sizes: list[tuple[int, str]], fqn: str, op: str) -> None:
        """Memory that a kernel takes and gives back within one call, unseen by the dispatcher."""
        for key in [self.record_alloc(size, fqn, kind, op) for size, kind in sizes]:
            self.record_free(key)

    def register_existing(self, tensor: torch.Tensor, fqn: str, kind: str) -> None:
        """Enter a tensor that exists already (a parameter, a buffer, a batch)."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._watched and storage.nbytes():
            self._watch(storage, fqn, kind, "place")
        self._owner.setdefault(storage._cdata, fqn)

    @property
    def images(self) -> Images | None:
        """What a vision-language model is shown."""
        return None if self.values is None else self.values.images

    def register_batch(self, batch: dict[str, torch.Tensor], stated: dict[str, torch.Tensor]) -> None:
        """Enter a batch that lies on the card now, with the values that the job states of it."""
        for name, tensor in batch.items():
            self.register_existing(tensor, "", "inputs")
            self.reclassify(tensor, "inputs")  # where it was made on the card, it is known already
            if self.values is not None and name in stated:
                self.values.set_values(tensor, stated[name])

    def key_of(self, tensor: torch.Tensor) -> int | None:
        watch = self._watched.get(tensor.untyped_storage()._cdata)
        return None if watch is None else watch.key

    def reclassify(self, tensor: torch.Tensor, kind: str, fqn: str | None = None) -> None:
        """Say what an allocation turned out to be (a gradient, a state of the optimiser)."""
        key = self.key_of(tensor)
        if key is None:
            return
        entry = self.trace_log.allocations[key]
        self.trace_log.allocations[key] = entry._replace(kind=kind, fqn=entry.fqn if fqn is None else fqn)

    def inherit_owner(self, tensor: torch.Tensor, owned: torch.Tensor) -> None:
        """What is made of ``tensor`` outside modules belongs to whom ``owned`` belongs."""
        self._owner[tensor.untyped_storage()._cdata] = self._owner.get(owned.untyped_storage()._cdata, "")

    def _watch(self, storage, fqn: str, kind: str, op: str) -> None:
        identity = storage._cdata
        watch = _Watch(storage, self._storage_freed)
        watch.id = identity
        watch.key = self.record_alloc(storage.nbytes(), fqn, kind, op)
        self._watched[identity] = watch

    def _storage_freed(self, watch: _Watch) -> None:
        if self._watched.get(watch.id) is watch:
            del self._watched[watch.id]
            self._owner.pop(watch.id, None)
        self.record_free(watch.key)

    # --- the dispatcher -------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.symbolic:
            with enable_python_dispatcher():
                return self._run(func, args, kwargs or {})
        if self.values is not None:
            return self.values.propagate(func, args, kwargs or {}, self._run)
        return self._run(func, args, kwargs or {})

    def _run(self, func, args, kwargs):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return self._value(args[0])
        current_fqn = self._current_fqn()
        self._site = current_fqn
        if self._stack or not self.in_backward:  # a reentrant checkpoint's recompute makes nodes too
            numbers, places = self._links
            numbers.append(_sequence_number())
            places.append(current_fqn or "")
        special = KERNELS.get(func)
        if special is not None:
            return special(self, func, args, kwargs, current_fqn or "")
        out = func(*args, **kwargs)
        self.record_outputs(out, func, args, current_fqn)
        return out

    def record_outputs(self, out, func, args, current_fqn: str | None) -> None:
        """Enter the storages of ``out`` that are new."""
        if type(out) is torch.Tensor:
            storage = out.untyped_storage()
            if storage._cdata not in self._watched:
                self._enter_new(storage, func, args, current_fqn, 0)
            return
        for index, leaf in enumerate(tree_leaves(out)):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._watched:
                    self._enter_new(storage, func, args, current_fqn, index)

    def _enter_new(self, storage, func, args, current_fqn, index: int) -> None:
        if not storage.nbytes() or storage.device.type != "meta":
            return
        if current_fqn is None or self._site is None:
            current_fqn = self._owned_by(args, index)
            self._owner[storage._cdata] = current_fqn
            self._watch(storage, current_fqn, self._kind, func.__name__)
            return
        self._watch(storage, current_fqn, self.kind_at(current_fqn), func.__name__)

    def _owned_by(self, args, index: int) -> str:
        """Outside modules (the optimiser, clipping): whose parameter, gradient or state the operator works on."""
        if not args:
            return ""
        first = args[0]
        if isinstance(first, (list, tuple)):
            first = first[index] if index < len(first) and len(first) > 1 else None
        if isinstance(first, torch.Tensor):
            return self._owner.get(first.untyped_storage()._cdata, "")
        return ""

    @property
    def in_module(self) -> bool:
        return bool(self._stack)

    def kind_at(self, current_fqn: str) -> str:
        """What an allocation on behalf of ``place`` is, until it proves to be another."""
        if current_fqn in self.heads and self.phase in ("forward", "backward", FORWARD_OTHER_CHECKPOINTING):
            return "logits_and_loss"
        if self.in_backward and self._stack:
            return "activations"  # recomputed by a checkpoint
        return self._kind

    def _value(self, tensor: torch.Tensor):
        """The value of a tensor that the program reads on the host, where the job states it."""
        frame = sys._getframe(2)
        for _ in range(12):
            if frame is None:
                break
            name = frame.f_code.co_qualname
            if name in HOST_READS:
                told = {"full": self.mask != "padded", "single": self.mask != "packed", "length": self.length}
                if HOST_READS[name] == "generated":
                    told["generated"] = frame.f_locals["length"] >= self.length
                answer = HOST_READS[name]
                return told[answer] if isinstance(answer, str) else answer
            frame = frame.f_back
        raise DataDependent(_caller())


def _caller() -> str:
    """The nearest frame outside torch: where the program asked for a value."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and "/app/dryrun/" not in file:
            return f"{file.rsplit('site-packages/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
