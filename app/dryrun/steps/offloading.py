"""Activations that are offloaded to the host: what TRL's own code for it asks of a card.

The host's copy is one number, however large the activation (:class:`~vramplan.dryrun.host_copies.PinnedMemory`).
Streams do nothing: whose pool a block is from does not change what is allocated.

Source: https://github.com/huggingface/trl/blob/v1.16.0/trl/models/activation_offloading.py#L83 ``OffloadActivations``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..observer import StepObserver
from ..sandbox import replaced


class _Stream:
    """A stream that everything waits for already."""

    def record_event(self) -> _Stream:
        return self

    def wait(self, *args) -> None:
        """There is nothing to wait for."""

    wait_event = wait_stream = synchronize = wait


class _DeviceModule:
    """``torch.cuda``, as far as offloading asks it."""

    Stream = _Stream

    def __init__(self, observer: StepObserver):
        self.empty_cache = observer.empty_cache
        self._current = _Stream()

    def current_stream(self) -> _Stream:
        return self._current

    def stream(self, stream: _Stream):
        return contextlib.nullcontext()


@contextlib.contextmanager
def streams_and_addresses(observer: StepObserver) -> Iterator[None]:
    """While the context lasts, the observer's device has streams, and its storages differ in where they lie."""
    device = _DeviceModule(observer)
    accelerator, address = torch.accelerator.current_accelerator, torch.UntypedStorage.data_ptr

    def current_accelerator(**asked):
        """An optimiser asks whether there is one that captures a graph: as before."""
        return accelerator(**asked) if asked else torch.device(observer.device)

    def data_ptr(storage) -> int:
        """Storages without memory all lie at 0: they are told apart by their own identity."""
        return storage._cdata if storage.device.type == observer.device else address(storage)

    with (
        replaced(torch.accelerator, "current_accelerator", current_accelerator),
        replaced(torch, "get_device_module", lambda *args: device),
        replaced(torch.UntypedStorage, "data_ptr", data_ptr),
    ):
        yield
