"""The linear layer that a quantiser takes."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D


def shape_of(linear: torch.nn.Module) -> tuple[int, int]:
    """Rows and columns of the weight as bitsandbytes keeps it: GPT-2's Conv1D is transposed."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)
