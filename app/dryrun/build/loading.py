"""Placing a model on the card and making it ready for its first step.

The order is that of a training script: ``from_pretrained`` (quantised layers first),
``prepare_model_for_kbit_training``, ``get_peft_model``, the trainer's own casts.
"""

from __future__ import annotations

from typing import Any, Protocol

import peft
import torch

from ...errors import PlanError
from ...job import Job
from ..observer import StepObserver
from ..tracker import MemoryTracker
from .adapters import adapt, initialisation_recorded, record_adapters
from .quantizers import Layout, quantize


class Weights(Protocol):
    """Where the weights of a model come to lie: on the meta device, or on a card (``app/probe/weights.py``).

    ``observer`` is who observes a step there: a :class:`~vramplan.dryrun.observer.StepObserver` of that device.
    """

    def quantized(self, layout: Layout, linear: torch.nn.Module, job: Job, path: str, observer: Any) -> torch.nn.Module:
        """The layer ``linear`` of the module ``path``, in a quantised layout."""

    def allocate(self, model: torch.nn.Module, observer: Any) -> None:
        """Place what is not quantised: parameters and buffers, module by module."""

    def adapted(self, model: torch.nn.Module, job: Job, task: str, observer: Any) -> torch.nn.Module:
        """The model with the job's adapters."""


class MetaWeights:
    """Weights on the meta device, recorded in the order in which a card is asked for them."""

    def quantized(
        self, layout: Layout, linear: torch.nn.Module, job: Job, path: str, observer: MemoryTracker
    ) -> torch.nn.Module:
        """The layer in a quantised layout, without values."""
        return layout.on_meta(linear, job, path, observer)

    def allocate(self, model: torch.nn.Module, observer: MemoryTracker) -> None:
        """Record every parameter and buffer that is not recorded yet."""
        for path, module in model.named_modules():
            for store, kind in ((module._parameters, "weights"), (module._buffers, "buffers")):
                for tensor in store.values():
                    if tensor is not None:
                        observer.register_existing(tensor, path, kind)

    def adapted(self, model: torch.nn.Module, job: Job, task: str, observer: MemoryTracker) -> torch.nn.Module:
        """The model with adapters, which are recorded."""
        with initialisation_recorded(model, observer):
            model = adapt(model, job, task, "meta")
        record_adapters(model, observer)
        return model


def load(model: torch.nn.Module, job: Job, task: str, observer: StepObserver, weights: Weights) -> torch.nn.Module:
    """The bare ``model`` placed and ready for the first step of ``job`` (resolved).

    Memory is asked for as by a loader that fills the card module by module: what is quantised, everything else, what
    PEFT casts and adds. The cache is emptied before the first step. Raises :class:`PlanError`.
    """
    observer.mark("load", 0, "weights")
    if job.quantization is not None:
        quantize(model, job, observer, weights)
    weights.allocate(model, observer)
    model = _prepared(model, job, task, observer, weights)
    observer.empty_cache()
    return model


def _prepared(model: torch.nn.Module, job: Job, task: str, observer: StepObserver, weights: Weights) -> torch.nn.Module:
    """The model with the job's adapters, what is trained marked as such, checkpointing switched on, in its mode."""
    if job.method == "inference":
        if job.prepare_for_kbit_training:
            model = _prepared_for_kbit_training(model, job, observer)
        else:
            model.requires_grad_(False)
        # An adapter may be served beside its base.
        if job.lora is not None or job.adapter is not None:
            model = weights.adapted(model, job, task, observer)
        return model.eval()
    if job.gradient_checkpointing != "off" and not model.supports_gradient_checkpointing:
        raise PlanError(
            f"{type(model).__name__} does not support gradient checkpointing",
            "set gradient_checkpointing to off",
            "gradient_checkpointing",
        )
    if job.method == "full":
        model.requires_grad_(True)
        _enable_checkpointing(model, job)
        return model.train()
    if job.prepare_for_kbit_training:
        model = _prepared_for_kbit_training(model, job, observer)
    else:
        model.requires_grad_(False)
        if job.gradient_checkpointing != "off":
            _enable_checkpointing(model, job)
            model.enable_input_require_grads()
    return weights.adapted(model, job, task, observer).train()


def _enable_checkpointing(model: torch.nn.Module, job: Job) -> None:
    """Switch gradient checkpointing on where the job has it on, unless the trainer does so itself."""
    if job.gradient_checkpointing != "off" and not job.whose.hosted:
        model.gradient_checkpointing_enable({"use_reentrant": job.gradient_checkpointing == "reentrant"})


def _prepared_for_kbit_training(model: torch.nn.Module, job: Job, observer: StepObserver) -> torch.nn.Module:
    """PEFT's preparation of a quantised model: what is not quantised is cast to float32, one tensor at a time.

    Source: https://github.com/huggingface/peft/blob/v0.21.0/src/peft/utils/other.py#L158
    ``prepare_model_for_kbit_training``.
    """
    with observer.watching(model):
        model = peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=job.gradient_checkpointing != "off",
            gradient_checkpointing_kwargs={"use_reentrant": job.gradient_checkpointing == "reentrant"},
        )
    observer.empty_cache()
    return model
