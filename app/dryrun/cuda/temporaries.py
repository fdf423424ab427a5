"""Memory that a kernel takes beside its outputs: helpers that the kernel rules share."""

from __future__ import annotations

from contextlib import contextmanager

import torch


def tensor_bytes(tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def record_copies(tracker, tensors, fqn, op: str):
    """While a kernel runs, the copies that it makes of ``tensors``."""
    copies = [tracker.record_alloc(tensor_bytes(t), fqn, "temporaries", op) for t in tensors]
    yield
    for key in copies:
        tracker.record_free(key)


def record_contiguous_copies(tracker, tensors, fqn, op: str, layout=torch.contiguous_format):
    """While a kernel runs, the copies that it makes of ``tensors`` that are not contiguous in its ``layout``."""
    return record_copies(tracker, [t for t in tensors if not t.is_contiguous(memory_format=layout)], fqn, op)


def record_workspaces(tracker, sizes: list[int], fqn, op: str) -> None:
    """What the kernel of ``op`` takes and gives back within its call."""
    measured = tracker.card.measured
    tracker.record_temporary([(measured.size(op, size), "kernel_workspace") for size in sizes], fqn, op)


def record_library_workspace(tracker, name: str, size: int) -> None:
    thread = "backward" if tracker.in_backward else "forward"
    if (thread, name) not in tracker._workspace_threads:
        tracker._workspace_threads.add((thread, name))
        tracker.record_alloc(size, "", "kernel_workspace", name)
