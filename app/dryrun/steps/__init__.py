"""Whose steps are run: a plain loop, the trainers, generation; and what follows a training.

``dry_run`` runs a job's steps on the meta device. A trainer is a row of :mod:`vramplan.registry.trainers`, which names
its :class:`Loop` here; ``phases`` has what loops share.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ...job import Job
from ...registry import load
from ..observer import StepObserver

GENERATE = ".generate:run_generate"
"""The loop of a job that generates, whichever trainer it names."""


class Loop(Protocol):
    """A function that runs the steps of a job (resolved) on a model that lies on the card."""

    def __call__(
        self, observer: StepObserver, model: torch.nn.Module, job: Job, task: str, steps: int, other: bool = False, /
    ) -> None:
        """Run so many steps; then, with ``other``, one forward pass with checkpointing the other way round."""


def loop_of(job: Job) -> Loop:
    """The function that runs the job's steps."""
    return load(GENERATE if job.method == "inference" else job.whose.loop, __package__)
