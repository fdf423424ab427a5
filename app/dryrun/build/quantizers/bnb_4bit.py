"""bitsandbytes' 4-bit layers: NF4 and FP4, with double quantisation or without."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from bitsandbytes.functional import QuantState

from ....job import Job, Quantization
from ...tracker import MemoryTracker
from .bnb_linear import BitsAndBytes, shape_of

BLOCK = 64
"""Elements of a weight that share one scale (absmax)."""
NESTED_BLOCK = 256
"""Scales that share one second scale, with double quantisation."""


class FourBit(BitsAndBytes):
    """``Linear4bit`` with the tensors that ``quantize_4bit`` makes.

    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/functional.py#L884
    ``quantize_4bit``.
    Measured on an H100, event for event.
    """

    packed = bnb.nn.Params4bit

    def packed_on_meta(self, linear: torch.nn.Module, job: Job, path: str, tracker: MemoryTracker) -> torch.nn.Module:
        """The layer with a packed weight and its quantisation state, without values."""
        state = _quant_state(shape_of(linear), job.quantization, getattr(torch, job.dtype))
        new = _empty_layer(linear, job)
        (rows, columns), storage = shape_of(linear), _storage(job)
        new.weight = bnb.nn.Params4bit(
            torch.empty(((rows * columns + 1) // (2 * storage.itemsize), 1), dtype=storage, device="meta"),
            requires_grad=False,
            quant_state=state,
            bnb_quantized=True,
            module=new,
            **_options(job),
        )
        new.quant_state = state
        if linear.bias is not None:
            new.bias = torch.nn.Parameter(linear.bias.data)
        _record(new.weight, state, path, tracker)
        return new

    def on_card(self, linear: torch.nn.Module, job: Job, weight: torch.Tensor) -> torch.nn.Module:
        """The layer that bitsandbytes makes of ``weight``."""
        new = _empty_layer(linear, job)
        packed = bnb.nn.Params4bit(weight, requires_grad=False, module=new, **_options(job))
        new.weight = packed.to(weight.device)
        if linear.bias is not None:
            new.bias = linear.bias
        return new

    def mark(self, model: transformers.PreTrainedModel) -> None:
        """Say that it is loaded in 4 bits."""
        super().mark(model)
        model.is_loaded_in_4bit = True


def _options(job: Job) -> dict[str, Any]:
    quantization = job.quantization
    return {
        "compress_statistics": quantization.double_quant,
        "quant_type": quantization.type,
        "quant_storage": _storage(job),
    }


def _storage(job: Job) -> torch.dtype:
    """The dtype of packed weights (``bnb_4bit_quant_storage``). FSDP shards those of a floating dtype only, so people
    who shard set that of the model.

    Source: https://huggingface.co/docs/bitsandbytes/main/en/fsdp_qlora
    """
    return getattr(torch, job.dtype) if job.strategy == "fsdp2" else torch.uint8


def _empty_layer(linear: torch.nn.Module, job: Job) -> bnb.nn.Linear4bit:
    """A ``Linear4bit`` in the place of ``linear``, its weight not made yet."""
    rows, columns = shape_of(linear)
    compute = getattr(torch, job.quantization.compute_dtype)
    bias = linear.bias is not None
    return bnb.nn.Linear4bit(columns, rows, bias, compute_dtype=compute, device="meta", **_options(job))


def _quant_state(shape: tuple[int, int], quantization: Quantization, dtype: torch.dtype) -> QuantState:
    """What undoes the quantisation of a weight of this shape: a scale a block, and the code's 16 values.

    With double quantisation the scales are 8-bit numbers, with a mean (``offset``) and a state of their own.
    """
    meta = {"device": "meta"}
    blocks = -(-shape[0] * shape[1] // BLOCK)
    nested: dict[str, Any] = {}
    if quantization.double_quant:
        absmax = torch.empty(-(-blocks // NESTED_BLOCK), **meta)
        code = torch.empty(256, **meta)
        nested["state2"] = QuantState(absmax=absmax, code=code, blocksize=NESTED_BLOCK, dtype=torch.float32)
        nested["offset"] = torch.empty((), **meta)
    return QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, **meta),
        shape=torch.Size(shape),
        code=torch.empty(16, **meta),
        blocksize=BLOCK,
        quant_type=quantization.type,
        dtype=dtype,
        **nested,
    )


def _record(weight: torch.Tensor, state: QuantState, path: str, tracker: MemoryTracker) -> None:
    """Record the tensors in the order in which ``quantize_4bit`` asks for them.

    Scales, packed weight, code. With double quantisation the scales are float32 first and dropped in the end; then
    come their mean, the scales less the mean (dropped), the second scales, the scales in 8 bits, and a second code.
    """
    constants = "quantization_constants"
    if not state.nested:
        for tensor, kind in ((state.absmax, constants), (weight, "weights"), (state.code, constants)):
            tracker.register_existing(tensor, path, kind)
        return
    size = 4 * state.absmax.numel()
    scales = tracker.record_alloc(size, path, constants, "quantize_4bit")
    for tensor, kind in ((weight, "weights"), (state.code, constants), (state.offset, constants)):
        tracker.register_existing(tensor, path, kind)
    centred = tracker.record_alloc(size, path, constants, "quantize_4bit")
    for tensor in (state.state2.absmax, state.absmax, state.state2.code):
        tracker.register_existing(tensor, path, constants)
    tracker.record_free(centred)
    tracker.record_free(scales)
