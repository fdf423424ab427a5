"""A process group that exists in one process: any number of ranks, of which one is run.

PyTorch's own ``fake`` backend: collectives return at once, and take nothing. Its tensors may lie on the meta device,
whose streams are those of the tracker.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from ...errors import OurFault
from ..cuda.streams import streams_of
from ..sandbox import changed, environment, replaced
from ..tracker import MemoryTracker


class _Group:
    """The change of PyTorch's state that makes the default process group: ``size`` ranks, of which this is ``rank``."""

    def __init__(self, size: int, rank: int):
        self.size, self.rank = size, rank

    def apply(self) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized():
            raise OurFault("a process group is left from before")
        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.size)

    def undo(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def process_group(size: int, rank: int, nodes: int, tracker: MemoryTracker) -> Iterator[None]:
    """While the context lasts, this process is ``rank`` of ``size``, as torchrun would have started it, and the meta
    device has streams."""
    local = size // nodes
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }
    streams = streams_of(tracker)
    with (
        environment(**variables),
        warnings.catch_warnings(action="ignore", category=FutureWarning),  # torch's own, of names of its collectives
        replaced(sys, "excepthook", sys.excepthook),  # PyTorch sets one that names the rank
        changed(_Group(size, rank)),
        replaced(torch, "meta", streams),
        replaced(torch.accelerator, "current_stream", streams.current_stream),
        resizing_recorded(tracker),
        dtensors_passed_on(tracker),
    ):
        yield


@contextmanager
def dtensors_passed_on(tracker: MemoryTracker) -> Iterator[None]:
    """What is recorded of a DTensor's operator is what it runs on its local tensors, and not what it runs on fake ones
    to know its result's shape."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def unrecorded(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return propagate(*args, **kwargs)

    tracker.passed_on = (DTensor,)
    with replaced(ShardingPropagator, "_propagate_tensor_meta_non_cached", unrecorded):
        yield


@contextmanager
def resizing_recorded(tracker: MemoryTracker) -> Iterator[None]:
    """``UntypedStorage.resize_`` is recorded: it runs without an operator."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int):
        resize(storage, size)
        tracker.record_resize(storage)
        return storage

    with replaced(torch.UntypedStorage, "resize_", resize_):
        yield
