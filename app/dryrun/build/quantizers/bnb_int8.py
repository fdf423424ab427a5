"""bitsandbytes' 8-bit layers: LLM.int8."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
import transformers

from ....job import Job
from ...tracker import MemoryTracker
from .bnb_linear import BitsAndBytes, shape_of

OUTLIER_THRESHOLD = 6.0
"""Columns with a value of this size and more are multiplied in 16 bits (``llm_int8_threshold``'s default)."""


class Int8(BitsAndBytes):
    """``Linear8bitLt`` with what ``Int8Params._quantize`` makes: CB, an int8 weight, and SCB, a float32 scale a row.

    The weight comes from the host as float16, and is dropped when it is quantised.
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/nn/modules.py#L737 ``_quantize``.
    Measured on an H100, event for event.
    """

    packed = bnb.nn.Int8Params

    def packed_on_meta(self, linear: torch.nn.Module, job: Job, path: str, tracker: MemoryTracker) -> torch.nn.Module:
        """The layer with an int8 weight and its scales, without values."""
        rows, columns = shape_of(linear)
        half = tracker.record_alloc(rows * columns * 2, path, "weights", "to")
        new = _empty_layer(linear)
        if linear.bias is not None:
            new.bias = torch.nn.Parameter(linear.bias.data)
        values = torch.empty(rows, columns, dtype=torch.int8, device="meta")
        new.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)
        new.weight.CB = new.weight.data
        new.weight.SCB = torch.empty(rows, dtype=torch.float32, device="meta")
        tracker.register_existing(new.weight.SCB, path, "quantization_constants")
        tracker.register_existing(new.weight, path, "weights")
        tracker.record_free(half)
        return new

    def on_card(self, linear: torch.nn.Module, job: Job, weight: torch.Tensor) -> torch.nn.Module:
        """The layer that bitsandbytes makes of ``weight``: it quantises what comes from the host."""
        new = _empty_layer(linear)
        packed = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        new.weight = packed.to(weight.device)
        if linear.bias is not None:
            new.bias = linear.bias
        return new

    def mark(self, model: transformers.PreTrainedModel) -> None:
        """Say that it is loaded in 8 bits."""
        super().mark(model)
        model.is_loaded_in_8bit = True


def _empty_layer(linear: torch.nn.Module) -> bnb.nn.Linear8bitLt:
    """A ``Linear8bitLt`` in the place of ``linear``, its weight not made yet."""
    rows, columns = shape_of(linear)
    bias, threshold = linear.bias is not None, OUTLIER_THRESHOLD
    return bnb.nn.Linear8bitLt(columns, rows, bias, has_fp16_weights=False, threshold=threshold, device="meta")
