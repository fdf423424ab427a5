"""Rows of random data on the host, in the shape of a job's batch, for a trainer that runs on a card."""

from __future__ import annotations

import torch

from ...job import Job
from ..inputs import make_batch
from ..observer import StepObserver


class _OnHost:
    """The observer of a batch that is made on the host."""

    device = "cpu"

    def __init__(self, observer: StepObserver):
        self.register_batch = observer.register_batch
        self.images, self.values = observer.images, observer.values


class HostRows(torch.utils.data.Dataset):
    """``count`` rows. A sequence's images may be many rows of a tensor: they stay together, and a batch is rows one
    after the other, or side by side along dimension 1 where they are packed."""

    def __init__(self, observer: StepObserver, model, job: Job, task: str, count: int):
        self.batch = make_batch(_OnHost(observer), model, job, task)
        self.count, self.size, self.dim = count, job.batch_size, int(job.packed)

    def first(self, count: int) -> torch.utils.data.Dataset:
        """So many of such rows."""
        return torch.utils.data.Subset(self, [number % self.count for number in range(count)])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor.chunk(self.size, self.dim)[index % self.size] for name, tensor in self.batch.items()}

    def collated(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A batch of ``rows``."""
        return {name: torch.cat([row[name] for row in rows], self.dim) for name in rows[0]}
