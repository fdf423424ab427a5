"""The plain training loop, as people write it."""

from __future__ import annotations

import contextlib

import torch

from ...job import Job
from ...registry.optimizers import optimizers_for
from ..inputs import make_batch
from ..observer import StepObserver
from .phases import begin_forward, gradients_kept_apart, label_grads_and_state


def run_plain(
    observer: StepObserver, model: torch.nn.Module, job: Job, task: str, steps: int, other: bool = False
) -> None:
    """The :class:`~vramplan.dryrun.steps.Loop` of ``trainer: pytorch``: forward, backward, step, zero_grad."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    observer.mark("load", 0, "inputs")
    batch = make_batch(observer, model, job, task)
    optimizers = optimizers_for(job.optimizer, model)
    for step in range(1, steps + other + 1):
        for number in range(job.batches_run):
            begin_forward(observer, model, job, step, steps)
            with gradients_kept_apart(model, number < job.batches_run - 1):
                with observer.autocast.on() if observer.autocast else contextlib.nullcontext():
                    loss = model(**batch).loss
                if step > steps:
                    break
                observer.mark("backward", step, "activation_gradients")
                observer.in_backward = True
                loss.backward()
                observer.in_backward = False
            label_grads_and_state(observer, parameters)
        else:
            observer.mark("optimizer", step, "optimizer_temporaries")
            for optimizer in optimizers:
                optimizer.step()
                label_grads_and_state(observer, parameters, optimizer)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            del loss
            observer.mark("end", step, "temporaries")
    observer.close()
