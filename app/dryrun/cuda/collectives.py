"""Functional collectives of ``torch.distributed``, as they are on a card."""

from __future__ import annotations

import torch
import torch.distributed._functional_collectives

from .registry import kernel


@kernel(torch.ops._c10d_functional.wait_tensor.default)
def wait_tensor(tracker, func, args, kwargs, fqn):
    """The tensor itself: the meta device's kernel makes a new one.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/csrc/distributed/c10d/Functional.cpp ``wait_tensor``.
    """
    return args[0]
