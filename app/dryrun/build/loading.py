"""Placing a model on the card, in a training script's order: from_pretrained, quantised as it loads,
prepare_model_for_kbit_training, get_peft_model."""

from __future__ import annotations

import peft
import torch

from ...errors import PlanError
from ...job import Job
from ...registry.trainers import TRAINERS
from ..observer import StepObserver
from ..tracker import MemoryTracker
from .adapters import adapt, magnitudes_entered, own_adapters
from .quantizers import Layout, quantize


class MetaWeights:
    """Weights on the meta device: entered in the tracker in the order in which a card would be asked for them.

    The probe has another with the same methods (``app/probe/weights.py``), which makes them on a card.
    """

    device = "meta"

    def quantized(
        self, layout: Layout, linear: torch.nn.Module, job: Job, path: str, tracker: MemoryTracker
    ) -> torch.nn.Module:
        """``linear`` in a quantised layout."""
        return layout.on_meta(linear, job, path, tracker)

    def allocate(self, model: torch.nn.Module, tracker: MemoryTracker) -> None:
        """Everything else, module by module: parameters, then buffers."""
        for path, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    tracker.register_existing(parameter, path, "weights")
            for buffer in module._buffers.values():
                if buffer is not None:
                    tracker.register_existing(buffer, path, "buffers")

    def adapted(self, model: torch.nn.Module, job: Job, task: str, tracker: MemoryTracker) -> torch.nn.Module:
        with magnitudes_entered(model, tracker):
            model = adapt(model, job, task, self.device)
        own_adapters(model, tracker)
        return model

    def cast_by_trl(self, model: torch.nn.Module, tracker: MemoryTracker) -> None:
        """``SFTTrainer.__init__`` of a quantised model: adapters in bf16, after the QLoRA paper."""
        tracker.mark("load", 0, "adapters")
        with tracker.watching(model):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_magnitude_vector" not in name:
                    parameter.data = parameter.data.to(torch.bfloat16)


def load(model: torch.nn.Module, job: Job, task: str, tracker: StepObserver, weights: MetaWeights) -> torch.nn.Module:
    """Place the ``weights`` and make the model ready: quantised layout, checkpointing, adapters, mode.

    ``job`` is resolved. In the order in which a loader that fills the card module by module asks for memory:
    what is quantised; then everything else; then what PEFT casts and adds. The cache is emptied before the first step.
    """
    tracker.mark("load", 0, "weights")
    if job.quantization is not None:
        quantize(model, job, tracker, weights)
    weights.allocate(model, tracker)
    model = _prepare(model, job, task, tracker, weights)
    tracker.empty_cache()
    if TRAINERS[job.trainer].casts_adapters and job.quantization is not None and job.method != "inference":
        weights.cast_by_trl(model, tracker)
    return model


def _prepare(
    model: torch.nn.Module, job: Job, task: str, tracker: StepObserver, weights: MetaWeights
) -> torch.nn.Module:
    checkpointing = job.gradient_checkpointing != "off"
    kwargs = {"use_reentrant": job.gradient_checkpointing == "reentrant"}
    if job.method == "inference":
        model.requires_grad_(False)
        if job.lora is not None:  # an adapter served beside its base
            model = weights.adapted(model, job, task, tracker)
        return model.eval()
    if checkpointing and not model.supports_gradient_checkpointing:
        raise PlanError(
            f"{type(model).__name__} does not support gradient checkpointing",
            "set gradient_checkpointing to off",
            "gradient_checkpointing",
        )
    if job.method == "full":
        model.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable(kwargs)
    else:
        if job.prepare_for_kbit_training:
            with tracker.watching(model):  # casts what is not quantised to fp32, one tensor at a time
                model = peft.prepare_model_for_kbit_training(
                    model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=kwargs
                )
            tracker.empty_cache()
        else:
            model.requires_grad_(False)
            if checkpointing:
                model.gradient_checkpointing_enable(kwargs)
                model.enable_input_require_grads()
        model = weights.adapted(model, job, task, tracker)
    return model.train()
