"""The dispatch mode that records the allocations of a program that runs on the meta device.

A weak reference watches the storage of every tensor. The first operator that returns a storage allocates it; the death
of the storage frees it. The autograd engine, Python and reference counts are the same as on a GPU, so lifetimes are
exact. What CUDA does differently is in :mod:`vramplan.dryrun.cuda`.

An allocation is attributed to the module that is running. In backward no module runs: the sequence number of the
autograd node leads to the forward operator that made the node, as in PyTorch's profiler.
"""

from __future__ import annotations

import os
import sys
import weakref
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import OurFault
from ..memory.events import EMPTY_CACHE, Allocation, Mark, TraceLog
from . import meta_kernels as native  # noqa: F401  (native: shape functions in C++)
from .cuda import host_reads
from .cuda.card_facts import Card
from .cuda.registry import KERNELS
from .host_copies import PARKING, PinnedMemory, answer_to, is_fetched, is_kept_on_host, ones_for, reader
from .known_values import Images, KnownValues, kept_in_memory
from .places import HOST, Place, Places, tensors_in
from .sandbox import is_tracing, replaced
from .symbols import size_of

_current_node = torch._C._current_autograd_node
_sequence_number = torch._C._autograd._get_sequence_nr
FORWARD_OTHER_CHECKPOINTING = "other"
"""The phase of one more forward pass, with checkpointing off where the job has it on, and on where it is off.

It is not part of the job. It tells what checkpointing would change."""
_UNLINKED = 1 << 63
"""Sequence numbers from here on have no forward operator: that of an AccumulateGrad node is UINT64_MAX."""


class DataDependent(Exception):
    """The program read a value that is unknown on the meta device; ``where`` is the function that read it."""

    def __init__(self, where: str):
        super().__init__(where)
        self.where = where


def canonical_fqn(path: str) -> str:
    """A module's path (torch's fqn) in the bare model: without the names that PEFT adds."""
    if path in ("base_model", "base_model.model"):
        return ""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a DTensor that lies on this rank; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


class _Watch(weakref.ref):
    """A weak reference to a storage: ``id`` is its address in C++, ``key`` that of its latest allocation, which is
    ``freed`` where it was resized to nothing. ``place`` is where it lies; only at one place allocations are recorded,
    else ``key`` is None and ``size`` its bytes, ``pinned`` or not.
    """

    __slots__ = ("key", "id", "freed", "place", "size", "pinned")


class MemoryTracker(TorchDispatchMode):
    """The recorder of a :class:`~vramplan.memory.events.TraceLog`, for the program that runs while it is entered.

    ``card``: the GPU whose kernels are meant. ``mask``: the job's attention mask, which answers a program that asks
    whether the mask hides anything or sequences are packed. ``length``: tokens of a sequence, for a program that asks.
    ``symbolic``: sizes are symbols, so that shapes are computed by PyTorch's functions in Python.

    ``shifted``: number of label positions after the causal shift. ``labelled``: how many of them are not -100. A
    boolean mask of ``shifted`` elements selects ``labelled`` rows; any other mask is assumed all-true.

    ``heads``: the fqns of the output embeddings, whose allocations are of kind ``logits_and_loss``.
    ``library_workspaces``: the workspaces that cuBLAS has, by (thread, stream, name). ``stream``: the number of the
    stream that is current (:mod:`vramplan.dryrun.cuda.streams`).

    ``passed_on``: subclasses of tensors whose operators run operators on plain tensors: those are recorded.
    ``on_host``: what is made now lies on the host, and nothing is recorded.
    """

    device = "meta"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here. PyTorch's check costs 8 % of each call."""
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
        self._cast_in_forward: dict[int, bool] = {}
        self.library_workspaces: set[tuple[str, int, str]] = set()
        self._workspaces_elsewhere: set[tuple[str, int, str]] = set()
        self._muted = False
        self.forwards_left: int | None = None
        self.fault: OurFault | None = None
        self._closed = False
        self._pinned = PinnedMemory()
        self.stream = 0
        self.passed_on: tuple[type, ...] = ()
        self.on_host = False
        self.places: Places | None = None

    def __enter__(self):
        if not is_tracing():
            raise OurFault("a tracker runs outside of the sandbox")
        return super().__enter__()

    # --- phases and modules ---------------------------------------------------------------------------------

    def mark(self, phase: str, step: int, kind: str) -> None:
        """Begin ``phase`` of ``step``. Allocations are of ``kind`` until :meth:`reclassify` says otherwise."""
        self.phase, self.step, self._kind = phase, step, kind
        self._site = None
        self.trace_log.marks.append(Mark(len(self.trace_log.events), phase, step))
        if phase in ("forward", FORWARD_OTHER_CHECKPOINTING):
            self._links = ([], [])

    @contextmanager
    def during(self, phase: str, kind: str = "activations"):
        """A phase within another one, which goes on afterwards."""
        before, links = (self.phase, self.step, self._kind), self._links
        self._links = ([], [])
        self.mark(phase, self.step, kind)
        try:
            yield
        finally:
            self.mark(*before)
            self._links = links

    def fqn_of(self, module: torch.nn.Module) -> str:
        """The fqn of a module that is watched; empty for any other."""
        return self._paths.get(id(module), "")

    def register_model(self, model: torch.nn.Module, prefix: str) -> None:
        """Know one more model, whose weights are on the card now: its fqns begin with ``prefix``."""
        for name, module in model.named_modules():
            fqn = prefix + canonical_fqn(name)
            self._paths[id(module)] = fqn
            for store, kind in ((module._parameters, "weights"), (module._buffers, "buffers")):
                for tensor in store.values():
                    if tensor is not None:
                        self.register_existing(tensor, fqn, kind)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.heads |= {prefix} if head is None else {prefix, self._paths[id(head)]}

    def empty_cache(self) -> None:
        """Record a call of ``torch.cuda.empty_cache()``."""
        self.trace_log.marks.append(Mark(len(self.trace_log.events), EMPTY_CACHE, self.step))

    @contextmanager
    def watching(self, model: torch.nn.Module):
        """Record what runs, and attribute it to the modules of ``model``."""
        self._paths = {id(module): canonical_fqn(name) for name, module in model.named_modules()}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.heads = {""} if head is None else {"", self._paths.get(id(head), "")}
        original = torch.nn.Module.__call__
        stack, paths = self._stack, self._paths

        def call(module, *args, **kwargs):
            fqn = paths.get(id(module))
            if fqn is None:
                return original(module, *args, **kwargs)
            if not fqn and not stack and self.forwards_left is not None:
                self._count_forward()
            recompute = self._recomputes_under_autocast(module)
            stack.append(fqn)
            try:
                with self.autocast.on() if recompute else nullcontext():  # a checkpoint enters its own autocast
                    return original(module, *args, **kwargs)
            finally:
                stack.pop()

        with replaced(torch.nn.Module, "__call__", call), self:
            yield self

    def _recomputes_under_autocast(self, module: torch.nn.Module) -> bool:
        """Whether a checkpoint runs ``module`` anew, and autocast was on when it ran first."""
        if self.autocast is None:
            return False
        if not self.in_backward:
            self._cast_in_forward[id(module)] = self.autocast.active
        return self.in_backward and not self._stack and self._cast_in_forward.get(id(module), True)

    def _count_forward(self) -> None:
        """A model's forward pass begins: of a generation there is an end to them."""
        if not self.forwards_left:
            raise OurFault("a generation runs past its new tokens: what it reads to know its end is answered wrongly")
        self.forwards_left -= 1

    @contextmanager
    def track_values(self, values: KnownValues):
        """Compute ``values`` along with the program, which may read them."""
        self.values = values
        with kept_in_memory():
            yield

    @contextmanager
    def on_behalf_of(self, fqn: str):
        """Record what runs, and attribute all of it to ``fqn``."""
        with self.attributed_to(fqn), self:
            yield self

    @contextmanager
    def attributed_to(self, fqn: str):
        """Attribute what runs to ``fqn``, which need not be a module's."""
        self._stack.append(fqn)
        try:
            yield
        finally:
            self._stack.pop()

    @property
    def current_fqn(self) -> str:
        """The fqn of the module that runs; empty for the model itself, and where no module runs."""
        return self._current_fqn() or ""

    def _current_fqn(self) -> str | None:
        """The fqn of the module that the current operator belongs to; None for the loop, the loss, the optimiser."""
        if self._stack:
            return self._stack[-1]
        node = _current_node()
        if node is None:
            return None
        number = node._sequence_nr()
        if number >= _UNLINKED:
            return self._owner.get(node.variable.untyped_storage()._cdata)
        numbers, fqns = self._links
        position = bisect_right(numbers, number)
        return fqns[position] if position < len(fqns) else None

    # --- entries --------------------------------------------------------------------------------------------

    def record_alloc(self, size: int, fqn: str, kind: str, op: str) -> int | None:
        """Record an allocation of ``size`` bytes. Returns its key, for :meth:`record_free`; None: the module is loaded
        to another place."""
        if self._muted:
            return None
        if self.places is not None and not self.step and self.places.place_for((), fqn) != self.places.here:
            return None
        return self._append(size, fqn, kind, op)

    def _append(self, size: int, fqn: str, kind: str, op: str) -> int:
        trace_log = self.trace_log
        key = len(trace_log.allocations)
        trace_log.allocations.append(Allocation(size_of(size), fqn, kind, self.phase, op, self.stream))
        trace_log.events.append(key)
        trace_log.event_fqns.append(fqn)
        return key

    def close(self) -> TraceLog:
        """Stop recording. Frees after this belong to the end of the dry run, not to the job."""
        self._closed = True
        if self.places is not None:
            self.places.host.take()
            self.trace_log.host = dict(self.places.host.most)
        if self.fault is not None:
            raise self.fault
        return self.trace_log

    def record_free(self, key: int | None) -> None:
        """Record that the allocation of this key is freed."""
        if self._closed or key is None:
            return
        trace_log = self.trace_log
        trace_log.events.append(~key)
        trace_log.event_fqns.append(self._site if self._site is not None else trace_log.allocations[key].fqn)

    def record_temporary(self, sizes: list[tuple[int, str]], fqn: str, op: str) -> None:
        """Record what a kernel allocates and frees within one call: (bytes, kind) each. The dispatcher sees none."""
        if not self.on_host:
            for key in [self.record_alloc(size, fqn, kind, op) for size, kind in sizes]:
                self.record_free(key)

    def register_existing(self, tensor: torch.Tensor, fqn: str, kind: str) -> None:
        """Record the allocation of a tensor that exists already: a parameter, a buffer, a batch."""
        storage = local_of(tensor).untyped_storage()
        if storage._cdata not in self._watched and storage.nbytes() and not self.on_host:
            self._watch(storage, fqn, kind, "place")
        self._owner.setdefault(storage._cdata, fqn)

    @property
    def images(self) -> Images | None:
        """The images that a vision-language model is shown."""
        return None if self.values is None else self.values.images

    def register_batch(self, batch: dict[str, torch.Tensor], stated: dict[str, torch.Tensor]) -> None:
        """Record a batch that is on the card now. ``stated`` has the values that the job states of it."""
        for name, tensor in batch.items():
            self.register_existing(tensor, "", "inputs")
            self.reclassify(tensor, "inputs")  # a tensor that was made on the card is recorded already
            if self.values is not None and name in stated:
                self.values.set_values(tensor, stated[name])

    def key_of(self, tensor: torch.Tensor) -> int | None:
        """The key of the allocation of ``tensor``; None where there is none."""
        watch = self._watched.get(local_of(tensor).untyped_storage()._cdata)
        return None if watch is None else watch.key

    def place_of(self, tensor: torch.Tensor) -> Place | None:
        """Where a tensor's storage lies; None: it is not known, or has no place."""
        watch = self._watched.get(tensor.untyped_storage()._cdata)
        return None if watch is None else watch.place

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor, which lies in pinned memory of the host from now on."""
        watch = self._watched.get(tensor.untyped_storage()._cdata)
        if watch is not None and watch.place == HOST and not watch.pinned:
            size = watch.size
            self._count_on_host(watch, 0)
            watch.pinned = True
            self._count_on_host(watch, size)
        return tensor

    def reclassify(self, tensor: torch.Tensor, kind: str, fqn: str | None = None) -> None:
        """Say what an allocation turned out to be: a gradient, an optimiser state, an input."""
        key = self.key_of(tensor)
        if key is None:
            return
        entry = self.trace_log.allocations[key]
        self.trace_log.allocations[key] = entry._replace(kind=kind, fqn=entry.fqn if fqn is None else fqn)

    def inherit_owner(self, tensor: torch.Tensor, owned: torch.Tensor) -> None:
        """Attribute ``tensor``, and what is computed from it outside modules, to the module of ``owned``."""
        owner = self._owner.get(local_of(owned).untyped_storage()._cdata, "")
        self._owner[local_of(tensor).untyped_storage()._cdata] = owner

    def record_resize(self, storage: torch.UntypedStorage) -> None:
        """Record that a storage was resized: what it held is freed, and what it holds now allocated, of the same kind
        and for the same module."""
        watch = self._watched.get(storage._cdata)
        if watch is None:
            if storage.nbytes() and not self.on_host:
                fqn = self.current_fqn
                self._watch(storage, fqn, self.kind_at(fqn), "resize_")
            return
        if watch.key is None:
            self._count_on_host(watch, storage.nbytes())
            return
        before = self.trace_log.allocations[watch.key]
        if not watch.freed:
            self.record_free(watch.key)
        watch.freed = not storage.nbytes()
        if not watch.freed:
            watch.key = self._append(storage.nbytes(), before.fqn, before.kind, "resize_")

    def _count_on_host(self, watch: _Watch, size: int) -> None:
        """What lies at another place takes ``size`` bytes from now on."""
        if watch.place == HOST:
            self.places.host.add("pinned" if watch.pinned else "pageable", size - watch.size, not self.step)
        watch.size = size

    def _watch(self, storage, fqn: str, kind: str, op: str, args=()) -> None:
        identity = storage._cdata
        watch = _Watch(storage, self._storage_freed)
        watch.id, watch.freed, watch.pinned = identity, False, False
        watch.place = 0 if self.places is None else self.places.place_for(args, fqn)
        watch.key, watch.size = None, 0
        if self.places is None or watch.place == self.places.here:
            watch.key = self._append(storage.nbytes(), fqn, kind, op)
        else:
            self._count_on_host(watch, storage.nbytes())
        self._watched[identity] = watch

    def _storage_freed(self, watch: _Watch) -> None:
        if self._watched.get(watch.id) is watch:
            del self._watched[watch.id]
            self._owner.pop(watch.id, None)
        if watch.key is None:
            self._count_on_host(watch, 0)
        elif not watch.freed:
            self.record_free(watch.key)

    # --- the dispatcher -------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.passed_on and any(kind in self.passed_on for kind in types):
            return NotImplemented
        try:
            if func in PARKING:
                result = self._pinned.run(self, func, args, kwargs or {})
                if result is not None:
                    return result
            if self.symbolic:
                with enable_python_dispatcher():
                    return self._run(func, args, kwargs or {})
            with nullcontext() if self.places is None else torch._C.DisableTorchFunction():
                if self.values is not None:  # in here a tensor's device is that of PyTorch
                    return self.values.propagate(func, args, kwargs or {}, self._run)
                return self._run(func, args, kwargs or {})
        except Exception as error:
            self._keep_if_ours(error)
            raise

    def _keep_if_ours(self, error: Exception) -> None:
        """Raise a fault of ours here and again at the end: a program may catch it, and Python takes a TypeError of an
        operator for a refusal of its operands."""
        from .diagnose import is_ours

        if is_ours(error):
            self.fault = error if isinstance(error, OurFault) else OurFault(error)
            raise self.fault from error

    def _run(self, func, args, kwargs):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return self._value(args[0])
        if func is torch.ops.aten._to_copy.default and is_fetched(args, kwargs):
            if reader() is None:
                raise DataDependent(_caller())
            return ones_for(args[0])
        if func is torch.ops.aten.equal.default and args[0].device.type == "meta":
            if reader() is None:
                raise DataDependent(_caller())
            return True
        if func is torch.ops.aten.copy_.default and is_kept_on_host(args):
            return args[0]
        current_fqn = self._current_fqn()
        if current_fqn == "":
            current_fqn = self._layer_read(args)
        self._site = current_fqn
        if self._stack or not self.in_backward:  # a reentrant checkpoint's recompute makes nodes too
            numbers, fqns = self._links
            numbers.append(_sequence_number())
            fqns.append(current_fqn or "")
        special = KERNELS.get(func)
        if special is not None:
            with self._elsewhere(args):
                return special(self, func, args, kwargs, current_fqn or "")
        out = func(*args, **kwargs)
        self.record_outputs(out, func, args, current_fqn)
        return out

    @contextmanager
    def _elsewhere(self, args):
        """What a kernel takes beside its outputs is not recorded where it runs on another card, or on the host."""
        if self.places is None or self.places.place_for(args) == self.places.here:
            yield
            return
        before, self._muted, self.library_workspaces = self.library_workspaces, True, self._workspaces_elsewhere
        try:
            yield
        finally:
            self._muted, self.library_workspaces = False, before

    def record_outputs(self, out, func, args, current_fqn: str | None) -> None:
        """Record the storages of ``out`` that are new."""
        if type(out) is torch.Tensor:
            storage = out.untyped_storage()
            if storage._cdata not in self._watched:
                self._record_new(storage, func, args, current_fqn, 0)
            return
        for index, leaf in enumerate(tree_leaves(out)):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._watched:
                    self._record_new(storage, func, args, current_fqn, index)

    def _record_new(self, storage, func, args, current_fqn, index: int) -> None:
        if not storage.nbytes() or storage.device.type != "meta" or self.on_host:
            return
        if current_fqn is None or self._site is None:
            current_fqn = self._owned_by(args, index)
            self._owner[storage._cdata] = current_fqn
            from_host = args and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu" and args[0].dim()
            self._watch(storage, current_fqn, "inputs" if from_host else self._kind, func.__name__, args)
            return
        self._watch(storage, current_fqn, self.kind_at(current_fqn), func.__name__, args)

    def _owned_by(self, args, index: int) -> str:
        """The fqn of an operator outside modules (optimiser, clipping): that of its parameter, gradient or state."""
        if not args:
            return ""
        first = args[0]
        if isinstance(first, (list, tuple)):
            first = first[index] if index < len(first) and len(first) > 1 else None
        if isinstance(first, torch.Tensor):
            return self._owner.get(first.untyped_storage()._cdata, "")
        return ""

    def _layer_read(self, args) -> str:
        """The module that an operator of the model itself belongs to: of a loop over what the layers returned, as that
        over the router's logits is, each turn belongs to the layer whose result it reads; else empty.

        Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/models/mixtral/modeling_mixtral.py
        ``load_balancing_loss_func``.
        """
        key = max((found for tensor in tensors_in(args) if (found := self.key_of(tensor)) is not None), default=None)
        fqn = "" if key is None else self.trace_log.allocations[key].fqn
        return fqn if any(map(str.isdecimal, fqn.split("."))) else ""

    @property
    def in_module(self) -> bool:
        """Whether a module is running."""
        return bool(self._stack)

    def kind_at(self, current_fqn: str) -> str:
        """The kind of a new allocation for ``current_fqn``."""
        if current_fqn in self.heads and self.phase in ("forward", "backward", FORWARD_OTHER_CHECKPOINTING):
            return "logits_and_loss"
        if self.in_backward and self._stack:
            return "activations"  # recomputed by a checkpoint
        return self._kind

    def _value(self, tensor: torch.Tensor):
        """The value of a tensor that the program reads on the host, where the job states it."""
        host_reads.check()
        frame = sys._getframe(2)
        while frame is not None:
            rule = host_reads.rule_for(frame)
            if rule is not None:
                return self._answer(rule.answer, frame, tensor)
            if not _is_plumbing(frame):
                break
            frame = frame.f_back
        name = reader()
        if name is None:
            raise DataDependent(_caller())
        return answer_to(name, tensor)

    def _answer(self, answer: bool | str, frame: FrameType, tensor: torch.Tensor):
        """What the job says of a value that the function of ``frame`` reads."""
        if isinstance(answer, bool):
            return answer
        if answer == "beams":
            return _read_by_beams(frame.f_locals, tensor, self.length)
        if answer == "generated":
            return frame.f_locals["length"] >= self.length
        return {"full": self.mask != "padded", "single": self.mask != "packed", "length": self.length}[answer]


def _read_by_beams(variables: Mapping[str, Any], tensor: torch.Tensor, length) -> bool | int:
    """What beam search reads: whether a beam is unfinished, as all are up to ``length``; then how long the result is.

    Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/generation/utils.py#L3369
    ``_beam_search``.
    """
    if tensor is variables.get("output_length"):
        return length
    if tensor is variables.get("max_generated_length"):
        return length - variables["decoder_prompt_len"]
    return variables["cur_len"] < length


_OURS = os.path.dirname(__file__)


def _is_plumbing(frame: FrameType) -> bool:
    """Whether a frame is PyTorch's or a trace's own, between a program and the value that it reads."""
    file = frame.f_code.co_filename
    return "/torch/" in file or file.startswith(_OURS)


def _caller() -> str:
    """The nearest frame outside torch: where the program asked for a value."""
    frame = sys._getframe(1)
    while frame is not None:
        if not _is_plumbing(frame):
            file = frame.f_code.co_filename
            return f"{file.rsplit('site-packages/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
