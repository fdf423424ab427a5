"""The registry of kernel rules: which function records what an operator allocates on a GPU.

To add a rule, write a handler in the file of its subject, with the decorator :func:`kernel`, and its test. A new file
of rules also needs a line in this package's ``__init__``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..tracker import MemoryTracker

Handler = Callable[["MemoryTracker", torch._ops.OpOverload, tuple, dict, str], Any]
"""``handler(tracker, func, args, kwargs, fqn)`` records what ``func`` allocates for the module ``fqn``, and returns its
outputs."""

KERNELS: dict[torch._ops.OpOverload, Handler] = {}
"""The handler of each operator that allocates more on a GPU, or other memory, than its outputs on the meta device."""


def kernel(*overloads: torch._ops.OpOverload) -> Callable[[Handler], Handler]:
    """A decorator that registers a handler for these operators. Each operator has one handler."""

    def register(handler: Handler) -> Handler:
        for overload in overloads:
            if overload in KERNELS:
                raise ValueError(f"{overload} has a handler already: {KERNELS[overload].__name__}")
            KERNELS[overload] = handler
        return handler

    return register
