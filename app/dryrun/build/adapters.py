"""PEFT's adapters on a model: how they are added, and what the card holds meanwhile."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer

from ...errors import PlanError
from ...job import Job
from ..diagnose import raise_if_ours
from ..sandbox import replaced
from ..tracker import MemoryTracker, canonical_fqn
from .model import empty_parameters
from .model_config import first_line
from .peft_config import casts_to_float32, config_of

NAMES_SHOWN = 16
"""Names of modules that a hint lists at most."""


def adapt(model: torch.nn.Module, job: Job, task: str, device: str) -> torch.nn.Module:
    """The model with the job's adapters on ``device``, as ``peft.get_peft_model`` adds them.

    What PEFT moves to the card it wraps anew: AdaLoRA's ranks are trained there. So only LoRA begins on the meta
    device.

    Raises :class:`PlanError` with PEFT's own words where it refuses.
    """
    config = config_of(job, task)
    on_meta = device == "meta"
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings()
    try:
        with (
            warnings.catch_warnings(),
            _made_on_meta() if on_meta and job.adapter is None else contextlib.nullcontext(),
        ):
            warnings.simplefilter("ignore")
            casts = casts_to_float32(job)
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=casts, low_cpu_mem_usage=on_meta)
    except Exception as error:
        raise_if_ours(error)
        outputs = {name for name, module in linear if module is head}
        hint = _hint(job, config, [name for name, _ in linear], outputs, error)
        field = "lora" if job.adapter is None else "adapter"
        raise PlanError(f"PEFT cannot adapt this model: {first_line(error)}", hint, field) from None
    _move(model, device)
    if not casts:
        _leave_as_arrived(model)
    return model


def _hint(job: Job, config: peft.PeftConfig, linear: list[str], outputs: set[str], error: Exception) -> str:
    """What to change so that PEFT takes the job. ``linear``: paths of the linear layers, ``outputs``: of the heads.

    PEFT has added to ``config.modules_to_save`` what it trains in full for the task.
    """
    trained_in_full = set(getattr(config, "modules_to_save", None) or ())
    saved = sorted({part for name in linear for part in name.split(".")} & trained_in_full)
    if job.quantization is not None and saved:  # quantised, and to be trained in full
        return f"leave what PEFT trains in full unquantised: quantization.skip_modules {saved}"
    names = {name.rpartition(".")[2] for name in linear} - {*re.findall(r"'(\w+)'", str(error)), *outputs}
    some = f"some of {', '.join(sorted(name for name in names if not name.isdigit())[:NAMES_SHOWN])}"
    field = "lora" if job.adapter is None else "adapter"
    return (
        f"set {field}.target_modules to {some if getattr(config, 'target_modules', None) else f'all-linear, or {some}'}"
    )


def _move(model: torch.nn.Module, device: str) -> None:
    """Move to ``device`` what PEFT made elsewhere."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != device:
                module._parameters[name] = torch.nn.Parameter(parameter.to(device), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != device:
                module._buffers[name] = buffer.to(device)


def _leave_as_arrived(model: torch.nn.Module) -> None:
    """Give the adapters the dtype in which they arrive at the card: nobody casts them to float32."""
    arrival = _dtypes_on_arrival(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(arrival.get(id(parameter), parameter.dtype))


@contextlib.contextmanager
def _made_on_meta() -> Iterator[None]:
    """What PEFT makes is made on the meta device, in this thread alone."""
    with (
        torch.device("meta"),
        replaced(peft.tuners.tuners_utils, "init_empty_weights", empty_parameters),
        replaced(peft.peft_model, "init_empty_weights", empty_parameters),
    ):
        yield


def _dtype_on_arrival(base: torch.nn.Module | torch.Tensor) -> torch.dtype:
    """The dtype in which PEFT moves the adapter of ``base``, a layer or a parameter of experts, to the card.

    It is the weight's; of a 4-bit weight, the dtype that it computes in. An int8 weight has none: the adapter's own,
    float32.

    Source: https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/tuners_utils.py#L2168
    ``_move_adapter_to_device_of_base_layer``.
    """
    if isinstance(base, torch.Tensor):
        return base.dtype
    _, dtype = BaseTunerLayer._get_base_layer_device_and_dtype(None, base)
    return dtype if dtype is not None and dtype.is_floating_point else torch.float32


COMPUTED = ("pissa_init", "olora_init", "corda_init", "eva_init", "orthogonal_init", "lora_ga_init", "loftq_init")
"""Methods of a LoRA layer that compute its first weights from those of its base, on the card."""


@contextlib.contextmanager
def initialisation_recorded(model: torch.nn.Module, tracker: MemoryTracker) -> Iterator[None]:
    """While adapters are added: what the card computes for them is recorded for the module that they adapt.

    That is DoRA's norm of each weight, what PiSSA and its like compute, and cuBLAS's workspace, which stays: on an
    H100, with DoRA and with PiSSA, 33554432 bytes more are placed.

    Source: https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/dora.py#L101 ``update_layer``;
    https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/layer.py ``pissa_init``.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    original = DoraLinearLayer.update_layer

    def update_layer(
        self: DoraLinearLayer, *, base_layer: Any, lora_A: torch.Tensor, lora_B: torch.Tensor, **kwargs: Any
    ) -> None:
        dtype = _dtype_on_arrival(base_layer)
        with tracker.on_behalf_of(paths.get(id(base_layer), "")):
            original(self, base_layer=base_layer, lora_A=lora_A.to(dtype), lora_B=lora_B.to(dtype), **kwargs)

    def recorded(method: Callable[..., Any]) -> Callable[..., Any]:
        def compute(self: LoraLayer, *args: Any, **kwargs: Any) -> Any:
            with tracker.on_behalf_of(paths.get(id(self.get_base_layer()), "")), torch.device("meta"):
                return method(self, *args, **kwargs)

        return compute

    with contextlib.ExitStack() as undo:
        undo.enter_context(replaced(DoraLinearLayer, "update_layer", update_layer))
        for name in COMPUTED:
            if hasattr(LoraLayer, name):
                undo.enter_context(replaced(LoraLayer, name, recorded(getattr(LoraLayer, name))))
        yield


def record_adapters(model: torch.nn.Module, tracker: MemoryTracker) -> None:
    """Record the adapters: all are moved to the card, then all are cast to float32, one after the other.

    Source: https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/tuners_utils.py#L2705
    ``cast_adapter_dtype``.
    Measured on an H100, event for event.
    """
    arrival = _dtypes_on_arrival(model)
    arrived = []
    for parameter, path in _unrecorded(model, tracker):
        dtype = arrival.get(id(parameter), parameter.dtype)
        size, is_cast = parameter.numel() * dtype.itemsize, dtype.itemsize < parameter.dtype.itemsize
        arrived.append((parameter, path, tracker.record_alloc(size, path, "adapters", "to") if is_cast else None))
    for parameter, path, before in arrived:
        tracker.register_existing(parameter, path, "adapters")
        if before is not None:
            tracker.record_free(before)
    for path, module in model.named_modules():
        for buffer in module._buffers.values():
            if buffer is not None:
                tracker.register_existing(buffer, canonical_fqn(path), "buffers")


def _dtypes_on_arrival(model: torch.nn.Module) -> dict[int, torch.dtype]:
    """By the id of an adapter's parameter, the dtype in which it is moved to the card."""
    found = {}
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        dtype = _dtype_on_arrival(layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer())
        adapters = (getattr(layer, name, None) for name in layer.adapter_layer_names)
        modules = (adapter for adapter in adapters if isinstance(adapter, torch.nn.Module))
        found |= {id(parameter): dtype for adapter in modules for parameter in adapter.parameters()}
    return found


def _unrecorded(model: torch.nn.Module, tracker: MemoryTracker) -> list[tuple[torch.nn.Parameter, str]]:
    """The parameters that are not on the card yet, with their modules' names."""
    return [
        (parameter, canonical_fqn(path))
        for path, module in model.named_modules()
        for parameter in module._parameters.values()
        if parameter is not None and tracker.key_of(parameter) is None
    ]
