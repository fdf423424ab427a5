"""Patches that make PyTorch treat meta tensors as CUDA tensors."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch

from .attention import scaled_dot_product_attention
from .card_facts import Card
from .elementwise import dropout
from .running import running
from .softmax import softmax_as

aten = torch.ops.aten


_library = torch.library.Library("aten", "IMPL")


_library.impl("scaled_dot_product_attention", scaled_dot_product_attention, "AutogradMeta")


_library.impl("dropout", dropout, "AutogradMeta")


_library.impl("softmax.int", softmax_as(aten._softmax), "AutogradMeta")


_library.impl("log_softmax.int", softmax_as(aten._log_softmax), "AutogradMeta")


@contextmanager
def as_if_cuda(card: Card):
    """Let PyTorch take the paths on meta tensors that it takes on CUDA ones.

    ``torch.optim`` chooses its for-each and fused kernels by device type
    (``torch/utils/_foreach_utils.py``, ``_get_foreach_kernels_supported_devices``); who asks whether autocast is on
    asks for the tensor's device type.
    """
    import importlib

    import torch.utils._foreach_utils as foreach

    names = ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices")
    modules = [
        foreach,
        *(importlib.import_module(f"torch.optim.{name}") for name in ("optimizer", "adam", "adamw", "sgd")),
    ]
    saved = [(module, name, getattr(module, name)) for module in modules for name in names if hasattr(module, name)]
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        function = getattr(torch, name)
        saved.append((torch, name, function))
        setattr(torch, name, lambda device="cuda", ask=function: ask("cuda" if device == "meta" else device))
    autocast = torch.autocast
    saved.append((torch, "autocast", autocast))
    torch.autocast = lambda device_type, *args, **kwargs: (
        nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)
    )
    before = running.card
    running.card = card
    try:
        for module, name, _ in saved:
            if module is not torch:
                setattr(module, name, lambda: ["cuda", "meta"])
        yield
    finally:
        running.card = before
        for module, name, function in saved:
            setattr(module, name, function)
