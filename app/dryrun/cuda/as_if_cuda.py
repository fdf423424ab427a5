"""What a trace changes of PyTorch, so that meta tensors are treated as CUDA tensors."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch

from .. import sandbox
from .attention import scaled_dot_product_attention
from .card_facts import Card
from .elementwise import dropout
from .running import running
from .softmax import softmax_as

aten = torch.ops.aten

sandbox.AUTOGRAD_META.update(
    {
        "scaled_dot_product_attention": scaled_dot_product_attention,
        "dropout": dropout,
        "softmax.int": softmax_as(aten._softmax),
        "log_softmax.int": softmax_as(aten._log_softmax),
    }
)

_OPTIMIZERS = ("torch.utils._foreach_utils", *(f"torch.optim.{name}" for name in ("optimizer", "adam", "adamw", "sgd")))
_DEVICE_LISTS = ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices")


@contextmanager
def as_if_cuda(card: Card) -> Iterator[None]:
    """PyTorch takes the same paths for meta tensors as for CUDA tensors on ``card``, while the context lasts.

    ``torch.optim`` chooses its for-each and fused kernels by device type. A function that looks whether autocast is
    enabled does so for the tensor's device type.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/utils/_foreach_utils.py#L8
    ``_get_foreach_kernels_supported_devices``.
    """
    before = running.card
    with ExitStack() as undo:
        for holder, name, value in _values():
            undo.enter_context(sandbox.replaced(holder, name, value))
        try:
            running.card = card
            yield
        finally:
            running.card = before


def _values() -> Iterator[tuple]:
    """The names that are replaced, with their values."""
    for module in map(importlib.import_module, _OPTIMIZERS):
        for name in _DEVICE_LISTS:
            if hasattr(module, name):
                yield module, name, lambda: ["cuda", "meta"]
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        ask = getattr(torch, name)
        yield torch, name, lambda device="cuda", ask=ask: ask("cuda" if device == "meta" else device)
    autocast = torch.autocast
    yield (
        torch,
        "autocast",
        lambda device_type, *args, **kwargs: (
            nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)
        ),
    )
