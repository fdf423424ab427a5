"""bitsandbytes' 8-bit layers: LLM.int8."""

from __future__ import annotations

import bitsandbytes as bnb
import torch

from .linear import shape_of


def int8(linear, path, tracker):
    """A Linear8bitLt with what ``Int8Params._quantize`` makes (bitsandbytes/nn/modules.py): the weight comes from the
    host as fp16 and is dropped; left are one fp32 scale a row and CB in int8. Measured event for event on an H100."""
    n, k = shape_of(linear)
    half = tracker.record_alloc(n * k * 2, path, "weights", "to")
    new = bnb.nn.Linear8bitLt(k, n, linear.bias is not None, has_fp16_weights=False, threshold=6.0, device="meta")
    if linear.bias is not None:
        new.bias = torch.nn.Parameter(linear.bias.data)
    weight = bnb.nn.Int8Params(
        torch.empty(n, k, dtype=torch.int8, device="meta"), requires_grad=False, has_fp16_weights=False
    )
    weight.CB = weight.data
    weight.SCB = torch.empty(n, dtype=torch.float32, device="meta")
    new.weight = weight
    tracker.register_existing(weight.SCB, path, "quantization_constants")
    tracker.register_existing(weight, path, "weights")
    tracker.record_free(half)
    return new
