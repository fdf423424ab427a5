"""``cuda`` as the dry card: for a script, tensors of the tracker lie on ``cuda:0``, and what it asks of
``torch.cuda`` is answered from the books.

Two function modes do it. :class:`DryCard` turns the device ``cuda`` into the meta device on the way in, and tells of a
meta tensor the device on which it lies on the way out. :class:`OpenAutocast` casts as CUDA's autocast does wherever
``torch.autocast`` is on.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ..dryrun.autocast import Autocast
from ..dryrun.sandbox import replaced
from ..errors import PlanError
from .script_tracker import ScriptTracker

CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
_DEVICE, _IS_CUDA = torch.Tensor.device, torch.Tensor.is_cuda
_MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}


class DryCard(TorchFunctionMode):
    """The mode in which ``cuda`` is the card of ``tracker``."""

    def __init__(self, tracker: ScriptTracker):
        super().__init__()
        self.tracker = tracker

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        descriptor = getattr(func, "__self__", None)
        if descriptor is _DEVICE:
            return self._device_of(args[0])
        if descriptor is _IS_CUDA:
            return self._device_of(args[0]).type == "cuda"
        if func is torch.device:
            return self._device(*args, **kwargs)
        if func is torch._C._nn._parse_to:
            return func(*args, **kwargs)
        if func in _MOVES:
            return self._moved(func, *args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return args[0]
        on_host = str(kwargs.get("device")) == "meta"
        args = tuple(map(self._here, args))
        if type(kwargs.get("device")) is int:
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        kwargs = {name: self._here(value) for name, value in kwargs.items()}
        with self.tracker.making_on_host() if on_host else contextlib.nullcontext():
            return func(*args, **kwargs)

    def _device_of(self, tensor: torch.Tensor) -> torch.device:
        device = tensor.device  # here this mode is off
        if device.type != "meta":
            return device
        return CUDA if self.tracker.is_on_card(tensor) else CPU

    def _device(self, kind: Any, index: int | None = None) -> torch.device:
        """``torch.device(…)``. A number alone is a card."""
        if type(kind) is int:
            kind, index = "cuda", kind
        return torch.device(kind) if index is None else torch.device(kind, index)

    def _here(self, value: Any) -> Any:
        """A device ``cuda`` as the meta device, anything else as it is."""
        if isinstance(value, torch.device) or (type(value) is str and value.startswith("cuda")):
            device = torch.device(value)
            if device.type == "cuda":
                self._check(device.index)
                return META
        return value

    def _check(self, index: int | None) -> None:
        if index:
            raise PlanError(
                f"the script asks for cuda:{index} at {self.tracker.line()}: one card is planned",
                "plan many cards with vramplan estimate --strategy",
            )

    def _moved(self, func: Callable, tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """``Tensor.to``, ``cuda`` and ``cpu``."""
        if func is torch.Tensor.cpu:
            device, dtype, rest = CPU, None, {}
        elif func is torch.Tensor.cuda:
            device, dtype, rest = CUDA, None, {}
        else:
            device, dtype, rest = self._destination(args, kwargs)
        at = self._device_of(tensor)
        rest |= {} if dtype is None else {"dtype": dtype}
        if device is None or device.type == at.type:
            return tensor.to(**rest) if rest else tensor
        if device.type == "cuda":
            self._check(device.index)
            if tensor.device.type == "cpu":
                return tensor.to(META, **rest)
            tensor = tensor.to(**rest) if rest else tensor
            self.tracker.place(tensor)
            return tensor
        return tensor.to(device, **rest)

    def _destination(self, args, kwargs) -> tuple[torch.device | None, torch.dtype | None, dict]:
        """What ``Tensor.to`` is asked for: a device, a dtype, and the rest."""
        rest = {"copy": True} if kwargs.pop("copy", False) else {}
        if (args and isinstance(args[0], torch.Tensor)) or isinstance(kwargs.get("other"), torch.Tensor):
            other = args[0] if args else kwargs["other"]
            return self._device_of(other), other.dtype, rest
        if args and type(args[0]) is int:
            args = (torch.device("cuda", args[0]), *args[1:])
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        return device, dtype, rest | ({} if layout is None else {"memory_format": layout})


class OpenAutocast(Autocast):
    """Autocast on the dry card, as far as ``torch.autocast`` has switched it on."""

    def __init__(self) -> None:
        super().__init__(torch.bfloat16)

    @property
    def active(self) -> bool:
        """Whether arguments are cast now."""
        if not torch._C._is_autocast_available("cuda") or not torch._C.is_autocast_enabled("cuda"):
            return False
        self.dtype = torch._C.get_autocast_dtype("cuda")
        return True

    def forget(self) -> None:
        """The outermost autocast has ended."""
        self._cache.clear()

    def _backward(self, loss, gradient=None, retain_graph=None, create_graph=False, inputs=None):
        torch.autograd.backward(loss, gradient, retain_graph, create_graph, inputs=inputs)


class DryStream(contextlib.AbstractContextManager[Any]):
    """A stream or an event of the dry card: what it waits for has happened. All are the default one."""

    cuda_stream = stream_id = device_index = 0
    device = CUDA

    def __init__(self, *_, **__):
        pass

    def __exit__(self, *_):
        return None

    def is_capturing(self) -> bool:
        """False: nothing is captured here."""
        return False

    def query(self) -> bool:
        """Whether it has happened: it has."""
        return True

    def elapsed_time(self, _) -> float:
        """Milliseconds between two events: none pass here."""
        return 0.0

    def record_event(self, event=None):
        """The event that is recorded."""
        return event or DryStream()

    def _nothing(self, *_, **__) -> None:
        """A dry stream has nothing to do."""

    record = wait = synchronize = wait_stream = wait_event = _nothing


@contextlib.contextmanager
def dry_card(tracker: ScriptTracker, name: str, total: int, capability: tuple[int, int]) -> Iterator[None]:
    """While the context lasts, ``cuda`` is a card called ``name`` with ``total`` bytes."""
    autocast, mode = OpenAutocast(), DryCard(tracker)
    with contextlib.ExitStack() as undo:
        undo.enter_context(replaced(torch.autograd, "_engine_run_backward", _backward_of(tracker, mode, autocast)))
        for holder, attribute, value in _names(tracker, autocast, name, total, capability):
            undo.enter_context(replaced(holder, attribute, value))
        undo.callback(register_optimizer_step_pre_hook(tracker.before_optimizer).remove)
        undo.callback(register_optimizer_step_post_hook(tracker.after_optimizer).remove)
        undo.enter_context(tracker.track_values(tracker.values))
        undo.enter_context(mode)
        undo.enter_context(autocast)
        undo.enter_context(tracker)
        yield


def _names(tracker: ScriptTracker, autocast: OpenAutocast, name: str, total: int, capability: tuple[int, int]):
    """The names of PyTorch that are replaced, with their values."""
    yield torch.nn.Module, "__call__", _call_of(tracker)
    yield torch, "clear_autocast_cache", autocast.forget
    yield (
        torch.utils.checkpoint,
        "_allowed_determinism_checks_to_fns",
        {
            **torch.utils.checkpoint._allowed_determinism_checks_to_fns,
            "default": lambda tensor: (tensor.shape, tensor.dtype),  # the device is told in Python alone
        },
    )
    yield (
        torch,
        "compile",
        _refuse(tracker, "torch.compile", "switch it off: what a compiled step needs is not modelled"),
    )
    yield torch, "Generator", lambda device="cpu": torch._C.Generator("cpu")
    yield (
        torch.distributed,
        "init_process_group",
        _refuse(tracker, "torch.distributed", "plan many cards with vramplan estimate --strategy"),
    )
    yield torch.utils.data.DataLoader, "__init__", _loader()
    yield torch.__future__, "get_swap_module_params_on_conversion", _brings_values
    yield torch.storage.UntypedStorage, "data_ptr", _address()
    for attribute, value in _cuda(tracker, name, total, capability).items():
        yield torch.cuda, attribute, value
    yield torch.accelerator, "is_available", lambda: True
    yield torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda")
    yield torch.accelerator, "device_count", lambda: 1
    yield torch.accelerator, "current_device_index", lambda: 0
    yield torch.accelerator, "current_stream", DryStream
    yield torch.accelerator, "synchronize", lambda *_: None


def _call_of(tracker: ScriptTracker) -> Callable:
    original = torch.nn.Module.__call__
    return lambda module, *args, **kwargs: tracker.called(module, original, *args, **kwargs)


def _backward_of(tracker: ScriptTracker, mode: DryCard, autocast: OpenAutocast) -> Callable:
    """The engine's run. What runs in it finds the card and autocast, which PyTorch has switched off on the way."""
    original = torch.autograd._engine_run_backward

    def run(*args, **kwargs):
        on = _get_current_function_mode_stack()
        with contextlib.ExitStack() as undo:
            for one in (mode, autocast):
                if one not in on:
                    undo.enter_context(one)
            return tracker.backward(lambda: original(*args, **kwargs))

    return run


def _refuse(tracker: ScriptTracker, what: str, hint: str) -> Callable:
    def refuse(*_, **__):
        raise PlanError(f"the script calls {what} at {tracker.line()}: {tracker.line().text}", hint)

    return refuse


def _brings_values() -> bool:
    """Whether the module whose ``_apply`` asks has parameters with values: they stay the same objects when they come to
    the card, as on a real one, so tied ones stay tied. PyTorch swaps them then."""
    module = sys._getframe(2).f_locals.get("self")
    with torch._C.DisableTorchFunction():
        return isinstance(module, torch.nn.Module) and any(
            parameter is not None and parameter.device.type == "cpu" for parameter in module._parameters.values()
        )


def _loader() -> Callable:
    """A loader of data that starts no process and pins no memory: neither takes anything of the card."""
    original = torch.utils.data.DataLoader.__init__

    def make(loader, *args, **kwargs):
        beside = {"num_workers": 0, "pin_memory": False, "prefetch_factor": None, "persistent_workers": False}
        original(loader, *args[:2], **_named(args[2:]) | kwargs | beside)

    return make


def _named(args: tuple) -> dict[str, Any]:
    """The arguments of a DataLoader from the third on, by name."""
    names = ("shuffle", "sampler", "batch_sampler", "num_workers", "collate_fn", "pin_memory", "drop_last")
    return dict(zip(names, args, strict=False))


def _address() -> Callable:
    original = torch.storage.UntypedStorage.data_ptr
    return lambda storage: storage._cdata if storage.device.type == "meta" else original(storage)


def _cuda(tracker: ScriptTracker, name: str, total: int, capability: tuple[int, int]) -> dict[str, Any]:
    """What ``torch.cuda`` answers."""
    properties = types.SimpleNamespace(
        name=name,
        total_memory=total,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=int(tracker.card.multiprocessors),
        gcnArchName="",
    )

    def nothing(*_, **__):
        return None

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: name,
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: capability >= (8, 0),
        "mem_get_info": lambda *_: (total - tracker.allocated, total),
        "memory_allocated": lambda *_: tracker.allocated,
        "memory_reserved": lambda *_: tracker.allocated,
        "max_memory_allocated": lambda *_: tracker.most_allocated,
        "max_memory_reserved": lambda *_: tracker.most_allocated,
        "empty_cache": tracker.empty_cache,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "initial_seed": lambda: 0,
        **dict.fromkeys(("current_stream", "default_stream", "stream", "Stream", "Event"), DryStream),
        "is_current_stream_capturing": lambda: False,
        "_exchange_device": lambda *_: 0,
        "_maybe_exchange_device": lambda *_: 0,
        "_get_device_index": lambda *_, **__: 0,
    }
    silent = (
        *("set_device", "synchronize", "manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state", "init"),
        *("set_rng_state_all", "_lazy_init", "reset_peak_memory_stats", "reset_max_memory_allocated", "ipc_collect"),
        *("reset_max_memory_cached", "set_per_process_memory_fraction"),
    )
    return {**dict.fromkeys(silent, nothing), **answers}
