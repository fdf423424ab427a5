"""Memory that a kernel allocates beside its outputs: helpers that the kernel rules share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements of ``tensor``."""
    return tensor.numel() * tensor.element_size()


def run_and_record(tracker, func, args, kwargs, fqn: str):
    """The outputs of ``func``, recorded."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    return out


@contextmanager
def record_copies(tracker, tensors: Iterable[torch.Tensor], fqn: str, op: str) -> Iterator[None]:
    """Copies of ``tensors``, allocated when the context begins and freed in the same order when it ends."""
    copies = [tracker.record_alloc(tensor_bytes(t), fqn, "temporaries", op) for t in tensors]
    yield
    for key in copies:
        tracker.record_free(key)


def record_contiguous_copies(
    tracker, tensors: Iterable[torch.Tensor], fqn: str, op: str, layout=torch.contiguous_format
) -> AbstractContextManager[None]:
    """Copies of those ``tensors`` that are not contiguous in ``layout``, as long as the context lasts."""
    return record_copies(tracker, [t for t in tensors if not t.is_contiguous(memory_format=layout)], fqn, op)


def record_workspaces(tracker, sizes: Iterable[int], fqn: str, op: str) -> None:
    """Workspaces of ``sizes`` bytes that ``op`` allocates and frees within one call.

    A probe may have measured other sizes on this card (:class:`~vramplan.memory.kernel_facts.KernelFacts`).
    """
    measured = tracker.card.measured
    tracker.record_temporary([(measured.size(op, size), "kernel_workspace") for size in sizes], fqn, op)


def record_library_workspace(tracker, name: str, size: int) -> None:
    """A workspace that cuBLAS or cuBLASLt keeps: allocated at the first call, never freed.

    PyTorch keys it by handle and stream. A handle belongs to a thread: the main thread in forward, and the autograd
    engine's thread in backward.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/cuda/CublasHandlePool.cpp
    ``getCurrentCUDABlasHandle``.
    """
    key = ("backward" if tracker.in_backward else "forward", tracker.stream, name)
    if key not in tracker.library_workspaces:
        tracker.library_workspaces.add(key)
        tracker.record_alloc(size, "", "kernel_workspace", name)
