"""PEFT's adapters on a model: what is added, and what the card holds while it is."""

from __future__ import annotations

import contextlib
import re
import warnings

import peft
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer

from ...errors import PlanError
from ...job import Job
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


def adapt(model: torch.nn.Module, job: Job, task: str, device: str) -> torch.nn.Module:
    """``peft.get_peft_model`` on ``device``, with PEFT's own refusal where it refuses."""
    lora = job.lora
    targets = lora.target_modules
    config = peft.LoraConfig(
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
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings()
    try:
        with warnings.catch_warnings(), _made_on_meta() if device == "meta" else contextlib.nullcontext():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, config, low_cpu_mem_usage=device == "meta")
    except Exception as error:
        raise_if_ours(error)
        saved = sorted({part for name, _ in linear for part in name.split(".")} & set(config.modules_to_save or ()))
        if job.quantization is not None and saved:  # quantised, and to be trained in full
            hint = f"leave what PEFT trains in full unquantised: quantization.skip_modules {saved}"
        else:
            refused = {*re.findall(r"'(\w+)'", str(error)), *(name for name, module in linear if module is head)}
            names = {name.rpartition(".")[2] for name, _ in linear} - refused
            some = f"some of {', '.join(sorted(name for name in names if not name.isdigit())[:16])}"
            hint = f"set lora.target_modules to {some if targets else f'all-linear, or {some}'}"
        raise PlanError(f"PEFT cannot adapt this model: {first_line(error)}", hint, "lora") from None
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.device.type != device:
                    moved = tensor.to(device)
                    store[name] = (
                        torch.nn.Parameter(moved, tensor.requires_grad) if store is module._parameters else moved
                    )
    return model


@contextlib.contextmanager
def _made_on_meta():
    """What PEFT makes is made on the meta device, of this thread alone."""
    with (
        torch.device("meta"),
        replaced(peft.tuners.tuners_utils, "init_empty_weights", empty_parameters),
        replaced(peft.peft_model, "init_empty_weights", empty_parameters),
    ):
        yield


def _moved_in(base: torch.nn.Module | torch.Tensor) -> torch.dtype:
    """The dtype in which PEFT moves an adapter of ``base``, a layer or a parameter of experts, to the card: the
    weight's, of a 4-bit one the dtype it computes in; an int8 one has none (``_move_adapter_to_device_of_base_layer``
    in peft/tuners/tuners_utils.py and lora/layer.py)."""
    if isinstance(base, torch.Tensor):
        return base.dtype
    _, dtype = BaseTunerLayer._get_base_layer_device_and_dtype(None, base)
    return dtype if dtype is not None and dtype.is_floating_point else torch.float32


@contextlib.contextmanager
def magnitudes_entered(model: torch.nn.Module, tracker: MemoryTracker):
    """Enter what DoRA computes on the card while it adapts: each weight's norm, and cuBLAS's workspace, which stays
    (peft/tuners/lora/dora.py ``DoraLinearLayer.update_layer``). Measured on an H100: 33554432 bytes more are placed."""
    paths = {id(module): name for name, module in model.named_modules()}
    original = DoraLinearLayer.update_layer

    def update_layer(self, *, base_layer, lora_A, lora_B, **kwargs):
        dtype = _moved_in(base_layer)
        with tracker.on_behalf_of(paths.get(id(base_layer), "")):
            original(self, base_layer=base_layer, lora_A=lora_A.to(dtype), lora_B=lora_B.to(dtype), **kwargs)

    with replaced(DoraLinearLayer, "update_layer", update_layer):
        yield


def own_adapters(model: torch.nn.Module, tracker: MemoryTracker) -> None:
    """Enter the adapters: moved to the card, then cast to fp32 in a second pass (peft/tuners/tuners_utils.py
    ``cast_adapter_dtype``; measured event for event)."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    moved_in = {}
    for layer in layers:
        dtype = _moved_in(layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer())
        adapters = (getattr(layer, name) for name in layer.adapter_layer_names)
        moved_in |= {id(parameter): dtype for adapter in adapters for parameter in adapter.parameters()}
    added, moved = [], []
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and tracker.key_of(parameter) is None:
                added.append((parameter, canonical_fqn(path)))
    for parameter, path in added:
        dtype = moved_in.get(id(parameter), parameter.dtype)
        cast = dtype.itemsize < parameter.dtype.itemsize
        moved.append(tracker.record_alloc(parameter.numel() * dtype.itemsize, path, "adapters", "to") if cast else None)
    for (parameter, path), key in zip(added, moved):
        tracker.register_existing(parameter, path, "adapters")
        if key is not None:
            tracker.record_free(key)
