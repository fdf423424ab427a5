"""A job's steps on the meta device, under a tracker: what :func:`vramplan.dryrun.trace.trace` runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import bitsandbytes as bnb
import torch

from ...job import Job
from ...memory.events import TraceLog
from ...registry.optimizers import JOIN, optimizer_of
from ..autocast import Autocast
from ..build.loading import load
from ..cuda.as_if_cuda import as_if_cuda
from ..cuda.card_facts import Card
from ..cuda.flex_attention import compiled_flex_attention
from ..known_values import KnownValues
from ..parallel import strategy_of
from ..sandbox import replaced
from ..token_loops import TOKENS_RUN, TokenLoops
from ..tracker import MemoryTracker
from . import empty_triton, loop_of

PARAM_NORM = 7
"""The position of the argument ``param_norm`` of bitsandbytes' ``optimizer_update_32bit``."""


def dry_run(
    model: torch.nn.Module,
    job: Job,
    task: str,
    card: Card,
    steps: int = 2,
    other: bool = False,
    values: KnownValues | None = None,
    tokens: int = TOKENS_RUN,
    rank: int = 0,
) -> TraceLog:
    """The log of a ``rank`` that places the bare ``model`` on ``card`` and runs ``steps`` steps of ``job`` (resolved).

    ``other``: then one forward pass with checkpointing the other way round (``FORWARD_OTHER_CHECKPOINTING`` of
    :mod:`vramplan.dryrun.tracker`). ``values``: the values that the job states, which are followed. ``tokens``: how
    often a loop over tokens is run; :func:`~vramplan.dryrun.token_loops.repeat_tokens` repeats it.
    """
    tracker, strategy = _tracker(job, card), strategy_of(job, rank)
    with (
        as_if_cuda(card),
        paged_states_elsewhere(),
        _kernels_of(job),
        _attention_of(job),
        strategy.environment(tracker),
    ):
        model = load(model, job, task, tracker, strategy.weights(model, tracker))
        mode = tracker.autocast
        scans = TokenLoops(tracker, tokens)
        with (
            scans.shortened(model),
            tracker.watching(model),
            mode or contextlib.nullcontext(),
            mode.in_modules_of(model) if mode else contextlib.nullcontext(),
            tracker.track_values(values) if values else contextlib.nullcontext(),
        ):
            loop_of(job)(tracker, strategy.wrap(model, tracker), job, task, steps, other)
        return tracker.close()


def _tracker(job: Job, card: Card) -> MemoryTracker:
    """The tracker of a job, with its autocast."""
    is_symbolic = isinstance(job.batch_size, torch.SymInt)
    tracker = MemoryTracker(card, job.attention_mask, job.sequence_length or 0, is_symbolic)
    if job.mixed_precision != "no":
        tracker.autocast = Autocast(torch.bfloat16 if job.mixed_precision == "bf16" else torch.float16)
    return tracker


def _kernels_of(job: Job) -> contextlib.AbstractContextManager[None]:
    """Triton, for an optimiser that runs kernels of it on a card."""
    named = () if job.method == "inference" else job.optimizer.split(JOIN)
    return empty_triton.installed() if any(optimizer_of(name).on_triton for name in named) else contextlib.nullcontext()


def _attention_of(job: Job) -> contextlib.AbstractContextManager[None]:
    """Flex attention as it is on a card, for a job that names it."""
    return compiled_flex_attention() if job.attention == "flex_attention" else contextlib.nullcontext()


@contextlib.contextmanager
def paged_states_elsewhere() -> Iterator[None]:
    """Paged optimiser state takes nothing of the card's allocator: it is managed memory (``cget_managed_ptr``).

    bitsandbytes makes a CPU tensor over that memory. Here it is one number, expanded to the shape.

    Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/functional.py#L91
    ``get_paged``. GaLore's AdamW in 8 bit has it take a norm, which is read on the host.
    """
    update = torch.ops.bitsandbytes.optimizer_update_32bit

    def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: object = None) -> torch.Tensor:
        out = torch.zeros((), dtype=dtype).expand(shape)
        out.is_paged = True
        return out

    def update_32bit(*args):
        return update(*(1.0 if at == PARAM_NORM and torch.is_tensor(value) else value for at, value in enumerate(args)))

    update_32bit.default = update.default  # its kernels are registered by overload
    with (
        replaced(torch.ops.bitsandbytes, "optimizer_update_32bit", update_32bit),
        replaced(bnb.functional, "get_paged", get_paged),
        replaced(bnb.functional, "prefetch_tensor", lambda *args, **kwargs: None),
        replaced(bnb.functional, "fill", lambda *args, **kwargs: None),
        replaced(bnb.functional, "is_on_gpu", lambda tensors: True),
        replaced(torch.cuda, "synchronize", lambda *args: None),
    ):
        yield
