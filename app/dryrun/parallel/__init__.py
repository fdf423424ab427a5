"""Many cards: what one rank of a job runs, a file a strategy.

A row of :mod:`vramplan.registry.strategies` names its :class:`RankStrategy` here. A dry run runs one rank.
Ranks that allocate alike are one :class:`RankClass`, planned once, so a plan costs the same on 2 cards as on 512.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...job import Job
from ...registry import load
from ...registry.strategies import STRATEGIES
from ..build.loading import MetaWeights
from ..tracker import MemoryTracker


@dataclass(frozen=True)
class RankClass:
    """Ranks that allocate alike: ``name`` says which they are in words, ``ranks`` are the first and the last of them.

    Their first is the one that is run.
    """

    name: str
    first: int
    last: int


class RankStrategy:
    """A way to spread a job over cards; the base class is that of one card, which changes nothing.

    One object serves one dry run of one ``rank`` of ``job`` (resolved).
    """

    steps = 2
    """How many steps are run: the last one is what the steps after it are, too."""
    repeats_layers = True
    """Whether what a layer does is what the layers like it do: else all are run."""

    def __init__(self, job: Job, rank: int = 0):
        self.job, self.rank = job, rank

    @contextmanager
    def environment(self, tracker: MemoryTracker) -> Iterator[None]:
        """What others' code finds while the whole dry run lasts: a process group, streams, a launcher's variables."""
        yield

    def weights(self, model: torch.nn.Module, tracker: MemoryTracker) -> MetaWeights:
        """Where the weights of the bare ``model`` come to lie while it is loaded."""
        return MetaWeights()

    def wrap(self, model: torch.nn.Module, tracker: MemoryTracker) -> torch.nn.Module:
        """The model that lies on the card as this rank's loop is given it. A hosted trainer wraps it by itself."""
        return model

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of a hosted trainer's config class that ask for this strategy."""
        return {}

    @property
    def trained_itemsize(self) -> int:
        """Bytes of one number of a weight that full training places."""
        return getattr(torch, self.job.dtype).itemsize

    def rank_classes(self, model: torch.nn.Module) -> list[RankClass]:
        """The classes of ranks of the bare ``model``, the one of rank 0 first; of one class the list may be empty."""
        return []

    def caveats(self, trained: int) -> list[str]:
        """Warnings about what the plan of ``trained`` parameters cannot know."""
        return []

    def host_bytes(self, model: torch.nn.Module) -> dict[str, int]:
        """Bytes of a node's memory, by name: ``load`` and ``pinned`` and ``pageable`` in training. Empty: none."""
        return {}


def strategy_of(job: Job, rank: int = 0) -> RankStrategy:
    """The strategy of a job (resolved), for one rank."""
    plan = STRATEGIES[job.strategy].plan
    made: Any = load(plan, __package__) if plan else RankStrategy
    return made(job, rank)
