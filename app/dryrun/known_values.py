"""Values on the meta device, for programs that ask: what the job states (ids, masks, image grids) and what follows.

Between the model and the tracker: a meta tensor whose values are known has a twin in memory, view for view; an operator
on known tensors runs on the twins too. So shapes and branches that hang on values are those of a card.
What no job can state is assumed: which experts a router's ``topk`` chooses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from .sandbox import replaced

LIMIT = 1 << 22
"""Elements beyond which values are not followed: masks of length × length, hidden states."""
FLOATS = 1 << 16
"""The same of floating point numbers: tables of sines, which no program asks."""
_MADE = frozenset("arange zeros ones full scalar_tensor _to_copy".split())
"""Operators that make a meta tensor of numbers, or of what is in memory."""
_INDEXED = frozenset("index index_put index_put_".split())
_LIKE = frozenset("zeros_like ones_like full_like new_zeros new_ones new_full".split())


@dataclass(frozen=True)
class Images:
    """The images of one sequence: what their processor makes of them, how many tokens each takes, and the token."""

    count: int
    tokens: int
    token: int
    inputs: dict[str, torch.Tensor]

    def ids(self, length: int) -> torch.Tensor:
        """The ids of one sequence: a token of text, the tokens of an image, and so on; text to the end."""
        out = torch.full((length,), 1 if self.token != 1 else 2)
        for number in range(self.count):
            start = 1 + number * (self.tokens + 1)
            out[start : start + self.tokens] = self.token
        return out

    def of(self, sequences: int) -> dict[str, torch.Tensor]:
        """The tensors of that many sequences; those of numbers on the meta device, which no tracker enters."""
        with _disable_current_modes():
            return {name: tensor.repeat(sequences, *[1] * (tensor.dim() - 1)) for name, tensor in self.inputs.items()}


class _Twin(weakref.ref):
    """A meta storage that lives, the storage in memory that holds its values, and whether they hang on a router."""

    __slots__ = ("id", "values", "chosen")


class KnownValues:
    """Follows known values (:meth:`~vramplan.dryrun.tracker.MemoryTracker.following`); ``routing`` is how tokens are taken to fall on
    experts (:class:`vramplan.job.Job`), ``images`` what the sequences show. ``routed`` tells afterwards whether what ran
    hangs on the experts that were chosen."""

    def __init__(self, routing: str, images: Images | None = None):
        self.routing = routing
        self.images = images
        self.depends_on_router = False
        self._twins: dict[int, _Twin] = {}

    def set_values(self, tensor: torch.Tensor, value: torch.Tensor, chosen: bool = False) -> None:
        """From here on ``tensor``, on the meta device, has these values; ``chosen``: they hang on a router."""
        if _is_large(tensor):
            return
        storage = tensor.untyped_storage()
        twin = _Twin(storage, self._forget)
        twin.id, twin.chosen = storage._cdata, chosen
        with _disable_current_modes():
            twin.values = torch.UntypedStorage(storage.nbytes())
            _view(twin.values, tensor).copy_(value)
        self._twins[twin.id] = twin

    def get(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The values of a meta tensor, where they are known."""
        twin = self._twin(tensor)
        return None if twin is None or _is_large(tensor) else _view(twin.values, tensor)

    def _twin(self, tensor: torch.Tensor) -> _Twin | None:
        return self._twins.get(tensor.untyped_storage()._cdata)

    def _forget(self, twin: _Twin) -> None:
        if self._twins.get(twin.id) is twin:
            del self._twins[twin.id]

    def propagate(self, func, args, kwargs, run: Callable):
        """``run(func, args, kwargs)``, and what it does to values."""
        name = func.overloadpacket.__name__
        known = self._all_known((*args, *kwargs.values()) if kwargs else args)
        if known or known is None and name in _MADE and str(kwargs.get("device")) == "meta":
            with suppress(NotImplementedError):  # some operators take other dtypes on a CPU
                return self._compute(func, args, kwargs, run)
        if name in _INDEXED and any(map(self._selects, args[1])):
            args = (args[0], [part for index in args[1] for part in self._positions(index, run)], *args[2:])
        out = run(func, args, kwargs)
        if _mutates(func):
            for written in _written(func, args, kwargs):
                self._twins.pop(written.untyped_storage()._cdata, None)
        elif name == "topk" and out[1].numel() <= LIMIT:
            self.set_values(out[1], self._chosen(args[0].shape, out[1].shape), True)
        elif name in _LIKE and not out.dtype.is_floating_point and out.numel() <= LIMIT:
            with _disable_current_modes():
                value = func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **_in_memory(kwargs))
            self.set_values(out, value)
        return out

    def _all_known(self, values) -> bool | None:
        """Whether the values of every tensor among ``values`` are known; None: there are none on the meta device."""
        found = None
        for value in values:
            if isinstance(value, torch.Tensor):
                if value.device.type == "meta":
                    if not self._knows(value):
                        return False
                    found = True
            elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float)):
                inner = self._all_known(value)
                if inner is False:
                    return False
                found = found or inner
        return found

    def _knows(self, tensor: torch.Tensor) -> bool:
        return not _is_large(tensor) and tensor.untyped_storage()._cdata in self._twins

    def _compute(self, func, args, kwargs, run: Callable):
        """Run an operator on values, unless all that it makes is too large, and on the meta tensors for what it
        allocates."""
        out = None
        if _shapes_tell(func) and kwargs.get("device") != torch.device("cpu"):
            out = run(func, args, kwargs)
            if all(_is_large(leaf) for leaf in tree_leaves(out)):
                return out
        try:
            with _disable_current_modes():
                values = tree_map_only(torch.Tensor, lambda t: self.get(t) if t.device.type == "meta" else t, args)
                result = func(*values, **_in_memory(tree_map_only(torch.Tensor, lambda t: self.get(t), kwargs)))
        except NotImplementedError:
            if out is None:
                raise
            return out
        chosen = any(self._depends_on_router(leaf) for leaf in tree_leaves((args, kwargs)))
        read = not isinstance(result, (torch.Tensor, tuple, list)) or kwargs.get("device") == torch.device("cpu")
        shaped_by_values = torch.Tag.dynamic_output_shape in func.tags
        self.depends_on_router |= chosen and (read or shaped_by_values)
        if read:
            return result
        if _mutates(func):
            for written in _written(func, args, kwargs):
                self._twins[written.untyped_storage()._cdata].chosen |= chosen
            return run(func, args, kwargs)
        if shaped_by_values:
            out = tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), result)
        elif out is None:
            out = run(func, args, kwargs)
        for meta, value in zip(tree_leaves(out), tree_leaves(result)):
            if isinstance(meta, torch.Tensor) and meta.untyped_storage()._cdata not in self._twins:
                self.set_values(meta, value, chosen)
        return out

    def _depends_on_router(self, leaf) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.device.type == "meta" and self._twin(leaf).chosen

    def _selects(self, index) -> bool:
        return index is not None and index.dtype == torch.bool and self._knows(index)

    def _positions(self, index, run: Callable) -> list:
        """The columns of ``nonzero`` of a known mask, as CUDA's ``index`` makes them of it; any other index itself."""
        if not self._selects(index):
            return [index]
        found = self.propagate(torch.ops.aten.nonzero.default, (index,), {}, run)
        return list(self.propagate(torch.ops.aten.unbind.int, (found, 1), {}, run))

    def _chosen(self, shape: torch.Size, chosen: torch.Size) -> torch.Tensor:
        """Which experts are taken to be chosen: each as often as the others, or by every token the same ones."""
        with _disable_current_modes():
            slots = torch.arange(chosen.numel()).view(chosen)
            if self.routing == "same":
                slots = torch.arange(chosen[-1]).expand(chosen)
            return slots % max(shape[-1], 1)


@contextmanager
def kept_in_memory():
    """Let ``torch.tensor`` go by way of memory: on the meta device it drops its data before any operator runs."""
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


def _view(storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    with _disable_current_modes():
        out = torch.empty(0, dtype=like.dtype)
        return out.set_(storage, like.storage_offset(), like.shape, like.stride())


def _in_memory(kwargs: dict) -> dict:
    return {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs


@lru_cache(maxsize=None)
def _mutates(func) -> bool:
    return func._schema.is_mutable


@lru_cache(maxsize=None)
def _shapes_tell(func) -> bool:
    """Whether what an operator makes are tensors, whose shapes hang on shapes alone."""
    kinds = {str(made.type) for made in func._schema.returns}
    return not _mutates(func) and torch.Tag.dynamic_output_shape not in func.tags and kinds == {"Tensor"}


def _written(func, args, kwargs):
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[place] if place < len(args) else None)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
