"""bitsandbytes' 4-bit layers: NF4 and FP4."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState

from .linear import shape_of


def four_bit(linear, quantization, dtype, path, tracker):
    """A Linear4bit with the tensors that ``quantize_4bit`` makes (bitsandbytes/functional.py; blocks of 64 and 256).

    Entered in its order: absmax, the packed weight, the code; nested: the offset, absmax less its mean, the second
    absmax, absmax in 8 bits and a code of its own. Measured event for event on an H100.
    """
    n, k = shape_of(linear)
    blocks = -(-n * k // 64)
    meta = {"device": "meta"}
    new = bnb.nn.Linear4bit(
        k,
        n,
        linear.bias is not None,
        compute_dtype=getattr(torch, quantization.compute_dtype),
        compress_statistics=quantization.double_quant,
        quant_type=quantization.type,
        device="meta",
    )
    if linear.bias is not None:
        new.bias = torch.nn.Parameter(linear.bias.data)
    nested = {}
    if quantization.double_quant:
        nested["state2"] = QuantState(
            absmax=torch.empty(-(-blocks // 256), **meta),
            code=torch.empty(256, **meta),
            blocksize=256,
            dtype=torch.float32,
        )
        nested["offset"] = torch.empty((), **meta)
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, **meta),
        shape=torch.Size((n, k)),
        code=torch.empty(16, **meta),
        blocksize=64,
        quant_type=quantization.type,
        dtype=dtype,
        **nested,
    )
    new.weight = bnb.nn.Params4bit(
        torch.empty(((n * k + 1) // 2, 1), dtype=torch.uint8, **meta),
        requires_grad=False,
        quant_state=state,
        quant_type=quantization.type,
        compress_statistics=quantization.double_quant,
        bnb_quantized=True,
        module=new,
    )
    new.quant_state = state
    absmax = tracker.record_alloc(blocks * 4, path, "quantization_constants", "quantize_4bit") if nested else None
    if not nested:
        tracker.register_existing(state.absmax, path, "quantization_constants")
    tracker.register_existing(new.weight, path, "weights")
    tracker.register_existing(state.code, path, "quantization_constants")
    if nested:
        tracker.register_existing(state.offset, path, "quantization_constants")
        centred = tracker.record_alloc(blocks * 4, path, "quantization_constants", "quantize_4bit")
        for tensor in (state.state2.absmax, state.absmax, state.state2.code):
            tracker.register_existing(tensor, path, "quantization_constants")
        tracker.record_free(centred)
        tracker.record_free(absmax)
    return new
