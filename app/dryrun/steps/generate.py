"""Generation: a prompt is read, then tokens are made one by one."""

from __future__ import annotations

import difflib
from typing import Any

import torch
import transformers

from ...errors import PlanError
from ...job import Job
from ..inputs import make_batch
from ..observer import StepObserver


def run_generate(observer: StepObserver, model: torch.nn.Module, job: Job, task: str, *_: int) -> None:
    """The :class:`~vramplan.dryrun.steps.Loop` of ``method: inference``: ``model.generate`` with its cache, greedily
    unless the job's ``generation_args`` say otherwise.

    The prompt has ``sequence_length`` tokens, and exactly ``new_tokens`` follow. Raises :class:`PlanError`.
    """
    if task not in ("causal-lm", "image-text-to-text"):
        raise PlanError(f"generation is planned for causal models, not for {task}", "name task causal-lm", "task")
    arguments = _arguments(job)
    model.config.use_cache = True
    observer.mark("load", 0, "inputs")
    batch = make_batch(observer, model, job, task)
    observer.length = job.sequence_length + job.new_tokens
    observer.forwards_left = job.new_tokens + 1
    observer.mark("generate", 1, "activations")
    with torch.no_grad():
        out = model.generate(
            **batch,
            max_new_tokens=job.new_tokens,
            min_new_tokens=job.new_tokens,
            pad_token_id=0,
            **{"do_sample": False, **arguments},
        )
    observer.mark("end", 1, "temporaries")
    observer.close()
    del out


SAMPLING = frozenset({"do_sample", "temperature", "top_k", "top_p", "min_p"})
"""Arguments of ``generate()`` that are planned. All others are refused."""


def _arguments(job: Job) -> dict[str, Any]:
    """The job's ``generation_args``. Raises :class:`PlanError` for what is not planned."""
    known = [*transformers.GenerationConfig().to_dict(), "assistant_model", "custom_generate"]
    for name in job.generation_args.keys() - SAMPLING:
        if name in known:
            raise PlanError(f"generation with {name} is not modelled", f"leave {name} out", "generation_args")
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "see transformers.GenerationConfig"
        raise PlanError(f"generate() has no argument {name!r}", hint, "generation_args")
    return job.generation_args
