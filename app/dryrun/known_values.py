"""The values of some meta tensors, for programs that read values: ids, masks, image grids, and what they lead to.

The job states the values of its batch. Each of these meta tensors has a twin: a CPU storage of the same size that holds
the values. An operator whose arguments all have twins runs on the twins too, and its outputs get twins. So shapes and
branches that depend on values are the same as on a GPU.

One thing no job can state: which experts a router's ``topk`` chooses. That is assumed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from .sandbox import replaced

LIMIT = 1 << 22
"""Elements up to which a tensor has a twin. Larger are masks of length × length, and hidden states."""
FLOATS = 1 << 16
"""The same for floating point: larger are tables of sines, which no program reads."""
_MADE = frozenset("arange zeros ones full scalar_tensor _to_copy".split())
"""Operators that make a meta tensor of numbers, or from a CPU tensor."""
_INDEXED = frozenset("index index_put index_put_".split())
_LIKE = frozenset("zeros_like ones_like full_like new_zeros new_ones new_full".split())


@dataclass(frozen=True)
class Images:
    """The images of one sequence.

    ``count``: how many. ``tokens``: tokens that each of them takes. ``token``: the id of such a token. ``inputs``: the
    tensors that the image processor makes of them, by the name of the model's argument.
    """

    count: int
    tokens: int
    token: int
    inputs: dict[str, torch.Tensor]

    def ids(self, length: int) -> torch.Tensor:
        """The ids of one sequence: a token of text before each image, its tokens, and text to the end."""
        out = torch.full((length,), 1 if self.token != 1 else 2)
        for number in range(self.count):
            start = 1 + number * (self.tokens + 1)
            out[start : start + self.tokens] = self.token
        return out

    def of(self, sequences: int) -> dict[str, torch.Tensor]:
        """The inputs of a batch of ``sequences``. They are made outside the tracker."""
        with _disable_current_modes():
            return {name: tensor.repeat(sequences, *[1] * (tensor.dim() - 1)) for name, tensor in self.inputs.items()}


class _Twin(weakref.ref):
    """A weak reference to a meta storage, with its twin: the CPU storage ``values``.

    ``id``: the meta storage's address in C++. ``routed``: the values depend on the experts that a router chose.
    """

    __slots__ = ("id", "values", "routed")


class KnownValues:
    """The values that are known on the meta device; :meth:`~vramplan.dryrun.tracker.MemoryTracker.track_values`.

    ``routing``: how tokens are assumed to fall on experts (``Job.expert_routing``). ``images``: what the sequences
    show. ``depends_on_router`` is true afterwards if the program's shapes or branches depended on chosen experts.
    """

    def __init__(self, routing: str, images: Images | None = None):
        self.routing = routing
        self.images = images
        self.depends_on_router = False
        self._twins: dict[int, _Twin] = {}

    def set_values(self, tensor: torch.Tensor, value: torch.Tensor, routed: bool = False) -> None:
        """Give the meta tensor ``tensor`` these values. ``routed``: they depend on the experts that a router chose."""
        if _is_large(tensor):
            return
        storage = tensor.untyped_storage()
        twin = _Twin(storage, self._forget)
        twin.id, twin.routed = storage._cdata, routed
        with _disable_current_modes():
            twin.values = torch.UntypedStorage(storage.nbytes())
            _view(twin.values, tensor).copy_(value)
        self._twins[twin.id] = twin

    def drop_values(self, tensor: torch.Tensor) -> None:
        """Something unknown is written into the meta tensor ``tensor``."""
        self._twins.pop(tensor.untyped_storage()._cdata, None)

    def get(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The values of a meta tensor; None where they are unknown."""
        twin = self._twin(tensor)
        return None if twin is None or _is_large(tensor) else _view(twin.values, tensor)

    def _twin(self, tensor: torch.Tensor) -> _Twin | None:
        return self._twins.get(tensor.untyped_storage()._cdata)

    def _forget(self, twin: _Twin) -> None:
        if self._twins.get(twin.id) is twin:
            del self._twins[twin.id]

    def propagate(self, func, args, kwargs, run: Callable):
        """``run(func, args, kwargs)``, and the same on the twins where all arguments have one.

        ``_INDEXED``: a known boolean mask becomes its positions, as CUDA's kernel does. ``_LIKE``: the values of the
        first argument do not matter.
        """
        name = func.overloadpacket.__name__
        known = self._all_known((*args, *kwargs.values()) if kwargs else args)
        if known or (known is None and name in _MADE and str(kwargs.get("device")) == "meta"):
            with suppress(NotImplementedError):  # some operators take other dtypes on a CPU
                return self._compute(func, args, kwargs, run)
        if name in _INDEXED and any(map(self._selects, args[1])):
            args = (args[0], [part for index in args[1] for part in self._positions(index, run)], *args[2:])
        out = run(func, args, kwargs)
        if _mutates(func):
            for written in _written(func, args, kwargs):
                self._twins.pop(written.untyped_storage()._cdata, None)
        elif name == "topk" and out[1].numel() <= LIMIT:
            self.set_values(out[1], self._experts(args[0].shape, out[1].shape), True)
        elif name in _LIKE and not out.dtype.is_floating_point and out.numel() <= LIMIT:
            with _disable_current_modes():
                value = func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **_on_cpu(kwargs))
            self.set_values(out, value)
        return out

    def _all_known(self, values) -> bool | None:
        """Whether every meta tensor among ``values`` has a twin; None where there is no meta tensor."""
        known = None
        for value in values:
            if isinstance(value, torch.Tensor):
                if value.device.type == "meta":
                    if not self._knows(value):
                        return False
                    known = True
            elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
                inner = self._all_known(value)
                if inner is False:
                    return False
                known = known or inner
        return known

    def _knows(self, tensor: torch.Tensor) -> bool:
        return not _is_large(tensor) and tensor.untyped_storage()._cdata in self._twins

    def _compute(self, func, args, kwargs, run: Callable):
        """Run an operator on the twins, and on the meta tensors for what it allocates.

        It does not run on the twins if all its outputs are too large to have one.
        """
        out = None
        if _shapes_suffice(func) and kwargs.get("device") != torch.device("cpu"):
            out = run(func, args, kwargs)
            if all(_is_large(leaf) for leaf in tree_leaves(out)):
                return out
        try:
            with _disable_current_modes():
                values = tree_map_only(torch.Tensor, lambda t: self.get(t) if t.device.type == "meta" else t, args)
                result = func(*values, **_on_cpu(tree_map_only(torch.Tensor, lambda t: self.get(t), kwargs)))
        except NotImplementedError:
            if out is None:
                raise
            return out
        routed = any(self._is_routed(leaf) for leaf in tree_leaves((args, kwargs)))
        read = not isinstance(result, (torch.Tensor, tuple, list)) or kwargs.get("device") == torch.device("cpu")
        shaped_by_values = torch.Tag.dynamic_output_shape in func.tags
        self.depends_on_router |= routed and (read or shaped_by_values)
        if read:
            return result
        if _mutates(func):
            for written in _written(func, args, kwargs):
                self._twins[written.untyped_storage()._cdata].routed |= routed
            return run(func, args, kwargs)
        if shaped_by_values:
            out = tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), result)
        elif out is None:
            out = run(func, args, kwargs)
        for meta, value in zip(tree_leaves(out), tree_leaves(result), strict=True):
            if isinstance(meta, torch.Tensor) and meta.shape == value.shape and not self._knows(meta):
                self.set_values(meta, value, routed)
        return out

    def _is_routed(self, leaf) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.device.type == "meta" and self._twin(leaf).routed

    def _selects(self, index) -> bool:
        return index is not None and index.dtype == torch.bool and self._knows(index)

    def _positions(self, index, run: Callable) -> list:
        """The positions at which a known mask is true, one tensor a dimension; any other index as it is."""
        if not self._selects(index):
            return [index]
        positions = self.propagate(torch.ops.aten.nonzero.default, (index,), {}, run)
        return list(self.propagate(torch.ops.aten.unbind.int, (positions, 1), {}, run))

    def _experts(self, scores: torch.Size, shape: torch.Size) -> torch.Tensor:
        """The experts that a router is assumed to choose: each equally often, or the same ones for every token.

        ``scores``: [tokens, experts]. ``shape`` of the result: [tokens, experts for each token].
        """
        with _disable_current_modes():
            slots = torch.arange(shape.numel()).view(shape)
            if self.routing == "same":
                slots = torch.arange(shape[-1]).expand(shape)
            return slots % max(scores[-1], 1)


@contextmanager
def kept_in_memory():
    """``torch.tensor`` makes a CPU tensor first. On the meta device it drops its data before any operator runs."""
    make = torch.tensor

    def tensor(data, *args, **kwargs):
        if str(kwargs.get("device")) != "meta":
            return make(data, *args, **kwargs)
        data = tree_map_only(torch.Tensor, lambda t: t.item() if t.dim() == 0 else t, data)
        return make(data, *args, **{**kwargs, "device": "cpu"}).to("meta")

    with replaced(torch, "tensor", tensor):
        yield


def _is_large(tensor: torch.Tensor) -> bool:
    return tensor.numel() > (FLOATS if tensor.dtype.is_floating_point else LIMIT)


def _view(storage: torch.UntypedStorage, tensor: torch.Tensor) -> torch.Tensor:
    """A view of ``storage`` with offset, shape and strides of ``tensor``."""
    with _disable_current_modes():
        out = torch.empty(0, dtype=tensor.dtype)
        return out.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _on_cpu(kwargs: dict) -> dict:
    return {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs


@cache
def _mutates(func) -> bool:
    return func._schema.is_mutable


@cache
def _shapes_suffice(func) -> bool:
    """Whether an operator's outputs are tensors whose shapes depend on shapes alone."""
    kinds = {str(output.type) for output in func._schema.returns}
    return not _mutates(func) and torch.Tag.dynamic_output_shape not in func.tags and kinds == {"Tensor"}


def _written(func, args, kwargs):
    """The tensors among the arguments that an operator writes into."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[position] if position < len(args) else None)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
