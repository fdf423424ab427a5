"""Where tensors lie, for a program that uses more than one card, or the host's memory beside it.

All of them are meta tensors; a storage's place is kept beside it. The tracker records the allocations of one card and
knows the place of every other storage. A program that asks for a tensor's device is told it, and what it moves becomes
a new storage there. Gradients travel back the way that activations came.

A tensor of the host has no values either: its bytes are counted (:class:`HostBytes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from .autocast import run_backward

if TYPE_CHECKING:
    from .tracker import MemoryTracker

Place = int | str
"""A card's number, :data:`HOST` or :data:`NOWHERE`."""
HOST = "cpu"
NOWHERE = "meta"
"""What a program itself puts on the meta device takes no memory."""
WITH_VALUES = 1 << 20
"""Bytes up to which a tensor keeps its values that a program makes without naming a device."""

_device_of = torch.Tensor.device.__get__  # type: ignore[attr-defined]
_MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
_MAKES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.empty_strided),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like),
    *(torch.arange, torch.randint, torch.eye, torch.linspace, torch.tril_indices, torch.triu_indices),
    *(torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full),
    torch.Tensor.new_empty_strided,
}
"""Functions that make a tensor of nothing, on the device that they are told."""


_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
"""Functions that make a tensor of values that the host has."""


class CardName(str):
    """The name of the dry run's device. It is the meta device, but not what a program calls so."""


class HostBytes:
    """What lies in the host's memory: bytes now, and at most, while the model is loaded and in the steps."""

    def __init__(self) -> None:
        self.now = {"pageable": 0, "pinned": 0}
        self.most = {"load": 0, "pageable": 0, "pinned": 0}

    def add(self, kind: str, size: int, loads: bool) -> None:
        """So many bytes more of a kind, or fewer; ``loads``: before the first step."""
        self.now[kind] += size
        if loads:
            self.most["load"] = max(self.most["load"], sum(self.now.values()))
        else:
            self.take()

    def take(self) -> None:
        """What lies there now is counted, too."""
        self.most |= {name: max(self.most[name], held) for name, held in self.now.items()}


class Places(TorchFunctionMode):
    """The places of a tracker's storages. It is entered around the program that runs.

    ``here``: the card whose allocations are recorded. ``cards``: how many a program sees; of several, a tensor's
    ``device`` names its card (``cuda:1``), of none it is the tracker's own (``meta``). ``home`` says where a module is
    loaded to, by its fqn.
    """

    def __init__(self, tracker: MemoryTracker, here: int = 0, cards: int = 0):
        super().__init__()
        self.tracker, self.here, self.cards = tracker, here, cards
        self.host = HostBytes()
        self.home: Callable[[str], Place] = lambda fqn: 0
        self._next: Place | None = None
        tracker.places, tracker.device = self, CardName(tracker.device)

    def place_for(self, args: Any, fqn: str = "") -> Place:
        """Where the outputs of an operator with these arguments lie; of none, what is the module's ``fqn``."""
        if self._next is not None:
            return self._next
        for tensor in tensors_in(args):
            place = self.tracker.place_of(tensor)
            if place is not None and (tensor.dim() or place != HOST):
                return place
        return 0 if args else self.home(fqn)

    @contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """What is made in the context lies at ``place``."""
        before, self._next = self._next, place
        try:
            yield
        finally:
            self._next = before

    def of(self, device: Any) -> Place:
        """The place that a program calls ``device``."""
        if isinstance(device, int):
            return device
        if type(device) is str and device == NOWHERE:
            return NOWHERE
        device = torch.device(device)
        return HOST if device.type == HOST else device.index or 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == _device_of:
            return self._device(args[0])
        if func is torch.Tensor.backward:
            with self:
                return run_backward(*args, **kwargs)
        if func in _MOVES:
            return self._moved(func, args[0], args[1:], kwargs)
        if func in _FROM_DATA and kwargs.get("device") is not None:
            made = func(*args, **{**kwargs, "device": None})
            return self._moved(torch.Tensor.to, made, (kwargs["device"],), {})
        if func in _MAKES or kwargs.get("device") is not None:
            return self._made(func, args, kwargs)
        if func is torch.Tensor.data_ptr and self.cards and self._place_of(args[0]) != NOWHERE:
            return args[0].untyped_storage()._cdata + args[0].storage_offset() * args[0].itemsize
        return func(*args, **kwargs)

    def _device(self, tensor: torch.Tensor) -> torch.device:
        device = _device_of(tensor)
        place = NOWHERE if device.type == HOST else self._place_of(tensor)
        if place == HOST:
            return torch.device(HOST)
        return torch.device("cuda", place) if self.cards and place != NOWHERE else device

    def _made(self, func: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
        """What a function makes of nothing."""
        device = kwargs.get("device")
        if device is None and args and isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)  # it lies where the one lies that it is like
        place = HOST if device is None else self.of(device)
        on_meta = {**kwargs, "device": "meta", "pin_memory": False}
        if device is None:
            with _disable_current_modes():
                small = func(*args, **on_meta).nbytes < WITH_VALUES
            if small:
                return func(*args, **kwargs)
        with self.at(place):
            made = func(*args, **on_meta)
        return self.tracker.pin(made) if kwargs.get("pin_memory") else made

    def _moved(self, func: Callable, tensor: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """What a call of ``Tensor.to`` and its like returns."""
        device, dtype = _target(func, args, kwargs, self._device)
        if device is None:
            return func(tensor, *args, **kwargs)
        place, before = self.of(device), self._place_of(tensor)
        if before == place and not kwargs.get("copy"):
            return tensor if dtype in (None, tensor.dtype) else tensor.to(dtype)
        return _Move.apply(tensor, self, place, dtype or tensor.dtype)

    def _place_of(self, tensor: torch.Tensor) -> Place:
        """Where a tensor lies, be it with values."""
        if _device_of(tensor).type == HOST:
            return HOST
        place = self.tracker.place_of(tensor)
        return NOWHERE if place is None else place


class _Move(torch.autograd.Function):
    """A tensor at another place. Its gradient goes back to where it came from."""

    @staticmethod
    def forward(ctx, tensor, places, place, dtype):
        ctx.places, ctx.place, ctx.dtype = places, places.place_for((tensor,)), tensor.dtype
        return _copied(places, tensor, place, dtype)

    @staticmethod
    def backward(ctx, gradient):
        return _copied(ctx.places, gradient, ctx.place, ctx.dtype), None, None, None


def _copied(places: Places, tensor: torch.Tensor, place: Place, dtype: torch.dtype) -> torch.Tensor:
    with places.at(place), torch._C.DisableTorchFunction():
        return torch.empty_like(tensor, dtype=dtype, device="meta")


def _target(func: Callable, args: tuple, kwargs: dict, device_of: Callable) -> tuple[Any, torch.dtype | None]:
    """The device and the dtype to which a call of :data:`_MOVES` takes its tensor; None: as they are."""
    if func is torch.Tensor.cpu:
        return HOST, None
    if func is torch.Tensor.cuda:
        return (args[0] if args and args[0] is not None else kwargs.get("device") or 0), None
    first = args[0] if args else kwargs.get("other")
    if isinstance(first, torch.Tensor):
        return device_of(first), first.dtype
    named = kwargs.get("device", first if isinstance(first, (str, int, torch.device)) else None)
    dtypes = [arg for arg in (*args, kwargs.get("dtype")) if isinstance(arg, torch.dtype)]
    return named, dtypes[0] if dtypes else None


def tensors_in(args: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments, in lists and tuples too."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors_in(arg)
