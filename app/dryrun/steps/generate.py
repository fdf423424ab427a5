"""Generation: a prompt is read, then tokens are made one by one."""

from __future__ import annotations

import torch

from ...errors import PlanError
from ...job import Job
from ..inputs import make_batch
from ..observer import StepObserver


def run_generate(observer: StepObserver, model: torch.nn.Module, job: Job, task: str, *_: int) -> None:
    """The :class:`~vramplan.dryrun.steps.Loop` of ``method: inference``: ``model.generate``, greedily, with its cache.

    The prompt has ``sequence_length`` tokens, and exactly ``new_tokens`` follow. Raises :class:`PlanError`.
    """
    if task not in ("causal-lm", "image-text-to-text"):
        raise PlanError(f"generation is planned for causal models, not for {task}", "name task causal-lm", "task")
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
            do_sample=False,
            pad_token_id=0,
        )
    observer.mark("end", 1, "temporaries")
    observer.close()
    del out
