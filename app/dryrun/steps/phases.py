"""What the loops share: marking a forward pass, and naming what a backward pass and an optimiser leave behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from ...job import Job
from ..inputs import base_of
from ..observer import StepObserver
from ..tracker import FORWARD_OTHER_CHECKPOINTING


def begin_forward(observer: StepObserver, model: torch.nn.Module, job: Job, step: int, steps: int) -> None:
    """Mark the forward pass of ``step``. After the last of ``steps`` it is the pass with checkpointing the other way
    round: off where the job has it on, on where the job has it off."""
    if step <= steps:
        observer.mark("forward", step, "activations")
        return
    observer.mark(FORWARD_OTHER_CHECKPOINTING, steps, "activations")
    base = base_of(model)
    if job.gradient_checkpointing == "off":
        base.gradient_checkpointing_enable({"use_reentrant": False})
        if job.method != "full":
            base.enable_input_require_grads()
    else:
        base.gradient_checkpointing_disable()
        _remove_input_hooks(base)


def _remove_input_hooks(base: torch.nn.Module) -> None:
    """Remove every hook that makes an embedding's output require a gradient.

    PEFT registers it once more than transformers, whose ``disable_input_require_grads`` knows the last one only.

    Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/modeling_utils.py#L2134
    ``enable_input_require_grads``.
    """
    for module in base.modules():
        for number, hook in [*module._forward_hooks.items()]:
            if hook.__qualname__.startswith("PreTrainedModel.enable_input_require_grads"):
                del module._forward_hooks[number]


@contextlib.contextmanager
def gradients_kept_apart(model: torch.nn.Module, apart: bool) -> Iterator[None]:
    """While the context lasts, the ranks of a wrapped model do not reduce their gradients, if ``apart``: there are more
    batches to accumulate. A model that is not wrapped has no ranks."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(not apart)
    with model.no_sync() if apart and hasattr(model, "no_sync") else contextlib.nullcontext():  # DDP
        yield


def label_grads_and_state(
    observer: StepObserver, parameters: Iterable[torch.nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Tell the observer which tensors are gradients of ``parameters``, and which are state of ``optimizer``."""
    for parameter in parameters:
        if parameter.grad is not None:
            observer.reclassify(parameter.grad, "gradients")
            observer.inherit_owner(parameter.grad, parameter)
    if optimizer is None:
        return
    for state in optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value) and (value.device.type != "cpu" or observer.device == "cpu"):
                observer.reclassify(value, "optimizer_state")
