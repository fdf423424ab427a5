"""DeepSpeed's accelerator of the meta device: the one object through which DeepSpeed reaches a card.

What it does not answer itself, ``CUDA_Accelerator`` of DeepSpeed 0.19.8 does (``deepspeed/accelerator``).
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from ..tracker import MemoryTracker

ENOUGH = 1 << 50
"""Bytes of the card, for DeepSpeed takes another way where a copy of the weights does not fit beside them."""


class CompiledKernels:
    """A builder of compiled kernels that update tensors in place: whatever they are called, they allocate nothing."""

    def load(self, *args: Any, **kwargs: Any) -> CompiledKernels:
        """The kernels."""
        return self

    def __getattr__(self, name: str) -> Any:
        return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """It has no effect on memory."""


def _none_taken(*args: Any, **kwargs: Any) -> int:
    """What is taken is logged, and decides nothing."""
    return 0


def _of_dtype(dtype: torch.dtype) -> property:
    """A class of tensors of this dtype, which is called with their values."""
    return property(lambda self: lambda data: torch.tensor(data, dtype=dtype).to(self.tracker.device))


class MetaAccelerator(CUDA_Accelerator):
    """CUDA's accelerator, whose device is the tracker's and whose streams are those of the dry run."""

    def __init__(self, tracker: MemoryTracker):
        self.tracker, self.streams = tracker, torch.meta  # type: ignore[attr-defined]
        super().__init__()

    _init_pynvml = set_device = synchronize = manual_seed = manual_seed_all = lazy_call = _nothing
    range_push = range_pop = reset_peak_memory_stats = reset_max_memory_allocated = reset_max_memory_cached = _nothing
    memory_allocated = max_memory_allocated = memory_cached = max_memory_cached = _none_taken
    memory_reserved = max_memory_reserved = _none_taken
    ByteTensor, FloatTensor = _of_dtype(torch.uint8), _of_dtype(torch.float32)
    IntTensor, LongTensor = _of_dtype(torch.int32), _of_dtype(torch.int64)
    Stream = property(lambda self: self.streams.Stream)
    Event = property(lambda self: self.streams.Event)

    def device_name(self, device_index: Any = None) -> str:
        """The name of the device, whichever card is meant."""
        return self.tracker.device

    current_device = current_device_name = device_name

    def device(self, device_index: Any = None) -> torch.device:
        """The device."""
        return torch.device("meta")

    def device_count(self) -> int:
        """One a process."""
        return 1

    def is_available(self) -> bool:
        """It is there."""
        return True

    is_bf16_supported = is_fp16_supported = is_available

    def is_triton_supported(self) -> bool:
        """Kernels of Triton are not modelled here."""
        return False

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies on the card."""
        return tensor.device.type == "meta"

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        """The tensor, which is pinned from now on."""
        return self.tracker.pin(tensor)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """What is asked about has been pinned."""
        return True

    def create_op_builder(self, class_name: str) -> CompiledKernels:
        """A builder that compiles nothing."""
        return CompiledKernels()

    def get_op_builder(self, class_name: str) -> type[CompiledKernels]:
        """Its class."""
        return CompiledKernels

    def communication_backend_name(self) -> str:
        """PyTorch's own process group without peers."""
        return "fake"

    def empty_cache(self) -> None:
        """The cache is emptied."""
        self.tracker.empty_cache()

    def total_memory(self, device_index: Any = None) -> int:
        """The card's memory."""
        return ENOUGH

    available_memory = total_memory

    def memory_stats(self, device_index: Any = None) -> dict[str, int]:
        """What is logged."""
        return {"active.all.current": 0, "num_alloc_retries": 0}

    def stream(self, stream: Any) -> Any:
        """A context in which ``stream`` is current."""
        return self.streams.stream(stream)

    def current_stream(self, device_index: Any = None) -> Any:
        """The stream that is current."""
        return self.streams.current_stream()

    def default_stream(self, device_index: Any = None) -> Any:
        """The stream with which a program begins."""
        return self.streams.default_stream()
