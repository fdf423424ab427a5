"""Whose step it is: the plain loop, written as people write it, run on the meta device under a tracker."""

from __future__ import annotations

import contextlib

import bitsandbytes as bnb
import torch

from ...errors import PlanError
from ...job import Job
from ...memory.events import TraceLog
from ...registry.optimizers import OPTIMIZERS
from ..autocast import Autocast
from ..build.loading import MetaWeights, load
from ..cuda.as_if_cuda import as_if_cuda
from ..cuda.card_facts import Card
from ..inputs import base_of, make_batch
from ..known_values import KnownValues
from ..observer import StepObserver
from ..sandbox import replaced
from ..token_loops import TOKENS_RUN, TokenLoops
from ..tracker import FORWARD_OTHER_CHECKPOINTING, MemoryTracker
from . import loop_of


@contextlib.contextmanager
def paged_states_elsewhere():
    """Paged optimiser state is managed memory (``cget_managed_ptr``), not the caching allocator's.

    bitsandbytes/functional.py ``get_paged``: the buffer is a CPU tensor over managed memory; here one of one element.
    """

    def get_paged(*shape, dtype=torch.float32, device=None):
        out = torch.zeros((), dtype=dtype).expand(shape)
        out.is_paged = True
        return out

    with (
        replaced(bnb.functional, "get_paged", get_paged),
        replaced(bnb.functional, "prefetch_tensor", lambda *args, **kwargs: None),
        replaced(bnb.functional, "fill", lambda *args, **kwargs: None),
        replaced(bnb.functional, "is_on_gpu", lambda tensors: True),
        replaced(torch.cuda, "synchronize", lambda *args: None),
    ):
        yield


def run_plain(tracker: StepObserver, model, job: Job, task: str, steps: int, other: bool = False) -> None:
    """Forward, backward, step, zero_grad: ``trainer: pytorch``; then, with ``other``, :data:`FORWARD_OTHER_CHECKPOINTING`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    tracker.mark("load", 0, "inputs")
    batch = make_batch(tracker, model, job, task)
    optimizer = OPTIMIZERS[job.optimizer].make(parameters)
    for step in range(1, steps + other + 1):
        for _ in range(job.batches_run):
            begin_forward(tracker, model, job, step, steps)
            with tracker.autocast.on() if tracker.autocast else contextlib.nullcontext():
                loss = model(**batch).loss
            if step > steps:
                break
            tracker.mark("backward", step, "activation_gradients")
            tracker.in_backward = True
            loss.backward()
            tracker.in_backward = False
            label_grads_and_state(tracker, parameters)
        else:
            tracker.mark("optimizer", step, "optimizer_temporaries")
            optimizer.step()
            label_grads_and_state(tracker, parameters, optimizer)
            optimizer.zero_grad(set_to_none=True)
            del loss
            tracker.mark("end", step, "temporaries")
    tracker.close()


def begin_forward(tracker: StepObserver, model, job: Job, step: int, steps: int) -> None:
    """Mark the forward pass of a step or, after the last of ``steps``, :data:`FORWARD_OTHER_CHECKPOINTING`: checkpointing off where the job
    has it on, on where it has it off."""
    if step <= steps:
        tracker.mark("forward", step, "activations")
        return
    tracker.mark(FORWARD_OTHER_CHECKPOINTING, steps, "activations")
    base = base_of(model)
    if job.gradient_checkpointing != "off":
        base.gradient_checkpointing_disable()
        for module in base.modules():  # PEFT asks for them once more: disable_input_require_grads knows the last only
            for number, hook in [*module._forward_hooks.items()]:
                if hook.__qualname__.startswith("PreTrainedModel.enable_input_require_grads"):
                    del module._forward_hooks[number]
    else:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        if job.method != "full":
            base.enable_input_require_grads()


def run_generate(tracker: StepObserver, model, job: Job, task: str, *_) -> None:
    """``model.generate``: prefill and ``new_tokens`` greedy steps with the model's own cache."""
    if task not in ("causal-lm", "image-text-to-text"):
        raise PlanError(f"generation is planned for causal models, not for {task}", "name task causal-lm", "task")
    model.config.use_cache = True
    tracker.mark("load", 0, "inputs")
    batch = make_batch(tracker, model, job, task)
    tracker.length = job.sequence_length + job.new_tokens
    tracker.forwards_left = job.new_tokens + 1
    tracker.mark("generate", 1, "activations")
    with torch.no_grad():
        out = model.generate(
            **batch,
            max_new_tokens=job.new_tokens,
            min_new_tokens=job.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    tracker.mark("end", 1, "temporaries")
    tracker.close()
    del out


def label_grads_and_state(tracker: StepObserver, parameters: list[torch.nn.Parameter], optimizer=None) -> None:
    """Say of what backward and the optimiser left that it is gradients and state."""
    for parameter in parameters:
        if parameter.grad is not None:
            tracker.reclassify(parameter.grad, "gradients")
            tracker.inherit_owner(parameter.grad, parameter)
    if optimizer is not None:
        for state in optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value) and value.device.type == tracker.device:
                    tracker.reclassify(value, "optimizer_state")


def dry_run(
    model,
    job: Job,
    task: str,
    card: Card,
    steps: int = 2,
    other: bool = False,
    values: KnownValues | None = None,
    tokens: int = TOKENS_RUN,
) -> TraceLog:
    """The books of placing the bare ``model`` and running ``steps`` steps of ``job``; with ``other``, of
    :data:`FORWARD_OTHER_CHECKPOINTING` behind them.

    With ``values`` those that the job states are followed. Loops over tokens are run for so many ``tokens``:
    :func:`~vramplan.dryrun.token_loops.unrolled` repeats them.
    """
    symbolic = isinstance(job.batch_size, torch.SymInt)
    tracker = MemoryTracker(card, job.attention_mask, job.sequence_length or 0, symbolic)
    if job.mixed_precision != "no":
        tracker.autocast = Autocast(torch.bfloat16 if job.mixed_precision == "bf16" else torch.float16)
    run = loop_of(job)
    with as_if_cuda(card), paged_states_elsewhere():
        model = load(model, job, task, tracker, MetaWeights())
        mode = tracker.autocast
        scans = TokenLoops(tracker, tokens)
        with (
            scans.shortened(model),
            tracker.watching(model),
            mode or contextlib.nullcontext(),
            mode.in_modules_of(model) if mode else contextlib.nullcontext(),
            tracker.track_values(values) if values else contextlib.nullcontext(),
        ):
            run(tracker, model, job, task, steps, other)
        return tracker.close()
