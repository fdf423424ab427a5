"""PEFT's adapters on a model: how they are added, and what the card holds meanwhile."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer

from ...errors import PlanError
from ...job import Job, Lora
from ..diagnose import raise_if_ours
from ..sandbox import replaced
from ..tracker import MemoryTracker, canonical_fqn
from .model import empty_parameters
from .model_config import first_line

PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "image-text-to-text": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}
"""PEFT's ``task_type`` by the job's task. Other tasks have none: the generic ``PeftModel`` wraps them."""
NAMES_SHOWN = 16
"""Names of modules that a hint lists at most."""


def adapt(model: torch.nn.Module, job: Job, task: str, device: str) -> torch.nn.Module:
    """The model with the adapters of ``job.lora``, as ``peft.get_peft_model`` adds them, on ``device``.

    Raises :class:`PlanError` with PEFT's own words where it refuses.
    """
    config = _peft_config(job.lora, task)
    on_meta = device == "meta"
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings()
    try:
        with warnings.catch_warnings(), _made_on_meta() if on_meta else contextlib.nullcontext():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    except Exception as error:
        raise_if_ours(error)
        outputs = {name for name, module in linear if module is head}
        hint = _hint(job, config, [name for name, _ in linear], outputs, error)
        raise PlanError(f"PEFT cannot adapt this model: {first_line(error)}", hint, "lora") from None
    _move(model, device)
    return model


def _peft_config(lora: Lora, task: str) -> peft.LoraConfig:
    targets = lora.target_modules
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        bias="none",
        task_type=PEFT_TASKS.get(task),
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        modules_to_save=list(lora.modules_to_save) or None,
    )


def _hint(job: Job, config: peft.LoraConfig, linear: list[str], outputs: set[str], error: Exception) -> str:
    """What to change so that PEFT takes the job. ``linear``: paths of the linear layers, ``outputs``: of the heads.

    PEFT has added to ``config.modules_to_save`` what it trains in full for the task.
    """
    saved = sorted({part for name in linear for part in name.split(".")} & set(config.modules_to_save or ()))
    if job.quantization is not None and saved:  # quantised, and to be trained in full
        return f"leave what PEFT trains in full unquantised: quantization.skip_modules {saved}"
    names = {name.rpartition(".")[2] for name in linear} - {*re.findall(r"'(\w+)'", str(error)), *outputs}
    some = f"some of {', '.join(sorted(name for name in names if not name.isdigit())[:NAMES_SHOWN])}"
    return f"set lora.target_modules to {some if job.lora.target_modules else f'all-linear, or {some}'}"


def _move(model: torch.nn.Module, device: str) -> None:
    """Move to ``device`` what PEFT made elsewhere."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != device:
                module._parameters[name] = torch.nn.Parameter(parameter.to(device), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != device:
                module._buffers[name] = buffer.to(device)


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


@contextlib.contextmanager
def dora_norms_recorded(model: torch.nn.Module, tracker: MemoryTracker) -> Iterator[None]:
    """While adapters are added: what DoRA computes on the card is recorded for the module that it adapts.

    That is the norm of each weight, and cuBLAS's workspace, which stays: on an H100, 33554432 bytes more are placed.

    Source: https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/dora.py#L101 ``update_layer``.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    original = DoraLinearLayer.update_layer

    def update_layer(
        self: DoraLinearLayer, *, base_layer: Any, lora_A: torch.Tensor, lora_B: torch.Tensor, **kwargs: Any
    ) -> None:
        dtype = _dtype_on_arrival(base_layer)
        with tracker.on_behalf_of(paths.get(id(base_layer), "")):
            original(self, base_layer=base_layer, lora_A=lora_A.to(dtype), lora_B=lora_B.to(dtype), **kwargs)

    with replaced(DoraLinearLayer, "update_layer", update_layer):
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


def _dtypes_on_arrival(model: torch.nn.Module) -> dict[int, torch.dtype]:
    """By the id of an adapter's parameter, the dtype in which it is moved to the card."""
    found = {}
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        dtype = _dtype_on_arrival(layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer())
        adapters = (getattr(layer, name) for name in layer.adapter_layer_names)
        found |= {id(parameter): dtype for adapter in adapters for parameter in adapter.parameters()}
    return found


def _unrecorded(model: torch.nn.Module, tracker: MemoryTracker) -> list[tuple[torch.nn.Parameter, str]]:
    """The parameters that are trained and not on the card yet, with their modules' names."""
    return [
        (parameter, canonical_fqn(path))
        for path, module in model.named_modules()
        for parameter in module._parameters.values()
        if parameter is not None and parameter.requires_grad and tracker.key_of(parameter) is None
    ]
