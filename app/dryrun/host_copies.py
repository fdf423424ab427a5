"""What a program takes from the meta device to the host, and back: metrics of trainers, offloaded activations.

A meta tensor has no values. Trainers, accelerate and some optimizers read a few all the same: whether a loss is a
number, the sum of a count, for their log. What they read changes no allocation, so they are told ones. A model that
reads a value is not told anything: :class:`~vramplan.dryrun.tracker.DataDependent`.
"""

from __future__ import annotations

import os
import sys

import torch

from .known_values import KnownValues

aten = torch.ops.aten

READERS = (
    *("/transformers/trainer", "/trl/trainer/", "/trl/experimental/", "/accelerate/"),
    *("/optimi/", "/grokadamw/", "/lomo_optim/", "/schedulefree/", "/galore_torch/", "/apollo_torch/"),
    *("/liger_kernel/", "/transformers/utils/generic", "/deepspeed/"),
    "/bitsandbytes/functional",  # the offset of nested constants, for a state dict
)
"""Parts of the paths of the packages that read values for their log, or for a step that allocates the same anyhow."""
ANSWERS = {
    "Trainer._run_epoch": False,
    "DeepSpeedZeroOptimizer.has_overflow": False,
    "DeepSpeedZeroOptimizer_Stage3.has_overflow": False,
    "is_invalid_grad_norm": False,
}
"""What is told of a boolean that is not true: "is the loss no number?", "is a gradient?"."""
PARKING = frozenset(
    {
        aten.empty_like.default,
        aten.empty.memory_format,
        aten.copy_.default,
        aten._to_copy.default,
        aten.record_stream.default,
    }
)
"""Operators that may copy a tensor to pinned memory of the host, or fetch it back."""


_OURS = os.path.dirname(__file__)


def reader() -> str | None:
    """The qualified name of the nearest function outside torch and this package, if it is one of :data:`READERS`."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and not file.startswith(_OURS):
            return frame.f_code.co_qualname if any(part in file for part in READERS) else None
        frame = frame.f_back
    return None


def answer_to(name: str, tensor: torch.Tensor) -> bool | int | float:
    """The value that the function ``name`` is told of a tensor of one element."""
    if name in ANSWERS:
        return ANSWERS[name]
    return tensor.dtype == torch.bool or (1.0 if tensor.dtype.is_floating_point else 1)


def is_fetched(args, kwargs) -> bool:
    """Whether ``aten._to_copy`` takes a tensor without values to the host."""
    return str(kwargs.get("device")) == "cpu" and args[0].device.type == "meta"


def is_kept_on_host(args) -> bool:
    """Whether ``aten.copy_`` writes a tensor without values into one of the host, which keeps its own."""
    return args[0].device.type == "cpu" and args[1].device.type == "meta"


def ones_for(tensor: torch.Tensor) -> torch.Tensor:
    """Ones on the host, in the shape of ``tensor``: no special token, and true where asked. It is one number."""
    return torch.ones((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)


class PinnedMemory:
    """Tensors that are copied to pinned memory of the host and fetched back. A copy is one number, with the shape.

    Source: https://github.com/huggingface/trl/blob/v1.16.0/trl/models/activation_offloading.py#L200 ``pack_tensor``.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def run(self, tracker, func, args, kwargs) -> torch.Tensor | None:
        """The result of an operator of :data:`PARKING` that concerns a pinned copy; None: it concerns none."""
        if func is aten.record_stream.default:
            return args[0]
        if func in (aten.empty_like.default, aten.empty.memory_format):
            return self._allocated(args[0], kwargs) if kwargs.get("pin_memory") else None
        copy = args[0]
        if copy.device.type != "cpu" or copy.untyped_storage()._cdata not in self._copies:
            return None
        return self._filled(copy, args[1], tracker.values) if func is aten.copy_.default else self._back(tracker, args)

    def _allocated(self, like, kwargs) -> torch.Tensor:
        dtype, shape = (like.dtype, like.shape) if isinstance(like, torch.Tensor) else (kwargs["dtype"], like)
        copy = torch.empty((), dtype=dtype, device="cpu")
        self._copies[copy.untyped_storage()._cdata] = copy, None
        return copy.expand(shape)

    def _filled(self, copy: torch.Tensor, source: torch.Tensor, values: KnownValues | None) -> torch.Tensor:
        identity = copy.untyped_storage()._cdata
        known = None if values is None else values.get(source)
        self._copies[identity] = self._copies[identity][0], None if known is None else known.clone()
        return copy

    def _back(self, tracker, args) -> torch.Tensor:
        copy = args[0]
        back = torch.empty(copy.shape, dtype=copy.dtype, device=tracker.device)
        tracker.record_outputs(back, aten._to_copy.default, args, tracker.current_fqn or None)
        known = self._copies.pop(copy.untyped_storage()._cdata)[1]
        if known is not None:
            tracker.values.set_values(back, known)
        return back
