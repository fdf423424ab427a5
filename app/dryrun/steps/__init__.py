"""Whose step is run: a plain loop, the trainers, generation; and what follows a training.

A trainer is a row of :mod:`vramplan.registry.trainers`, which names its :class:`Loop` here.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ...job import Job
from ...registry import load
from ...registry.trainers import TRAINERS
from ..observer import StepObserver

GENERATE = ".plain:run_generate"
"""The loop of a job that generates, whichever trainer it names."""


class Loop(Protocol):
    """A function that runs the steps of a job on a model that lies on the card."""

    def __call__(
        self, observer: StepObserver, model: torch.nn.Module, job: Job, task: str, steps: int, other: bool = False
    ) -> None:
        """Run so many steps; then, with ``other``, :data:`~vramplan.dryrun.tracker.FORWARD_OTHER_CHECKPOINTING`."""


def loop_of(job: Job) -> Loop:
    """The function that runs the job's steps."""
    return load(GENERATE if job.method == "inference" else TRAINERS[job.trainer].loop, __package__)
