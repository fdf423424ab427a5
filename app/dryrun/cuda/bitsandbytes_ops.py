"""bitsandbytes' operators: 4-bit and 8-bit products, and the 8-bit optimisers."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import bitsandbytes  # noqa: F401  (registers the operators)
import torch

from ..sandbox import locked, replaced
from ..symbols import sym_predicate
from .as_on_card import BadValueOnCard, ErrorOnCard
from .card_facts import Card
from .registry import kernel
from .temporaries import record_library_workspace, run_and_record, tensor_bytes

bnb = torch.ops.bitsandbytes


@functools.cache
def bnb_cuda_ops():
    """``bitsandbytes.backends.cuda.ops``, for its own rules; it names one symbol that a CPU build of torch lacks."""
    missing = not hasattr(torch._C, "_cuda_getCurrentRawStream")
    with locked(), replaced(torch._C, "_cuda_getCurrentRawStream", None) if missing else nullcontext():
        import bitsandbytes.backends.cuda.ops as ops
    return ops


def gemm_4bit_is_fused(card: Card, dtype, rows: int, out_features: int, in_features: int, blocksize: int) -> bool:
    """Whether bitsandbytes multiplies packed weights in one kernel on this card, or dequantises them first.

    It calls bitsandbytes' own heuristic.

    Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/cuda/ops.py#L584
    ``_gemm_4bit_use_custom_cuda``.
    """
    ops = bnb_cuda_ops()

    def fused(rows, multiprocessors) -> bool:
        if rows > ops._gemm_4bit_custom_max_m or in_features % blocksize:
            return False
        with locked(), replaced(ops, "_gpu_dispatch_props", lambda index: (multiprocessors, *card.capability)):
            return ops._gemm_4bit_use_custom_cuda.__wrapped__(0, dtype, rows, out_features, in_features)

    return sym_predicate(
        (dtype, out_features, in_features, blocksize, card.capability), fused, rows, card.multiprocessors
    )


@kernel(bnb.gemm_4bit.default)
def _gemm_4bit(tracker, func, args, kwargs, fqn):
    """A product with a 4-bit weight: one fused kernel, or the weight dequantised and a linear layer.

    Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/cuda/ops.py#L934
    ``gemm_4bit``.
    """
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    a, shape = named["A"], named["shapeB"]
    if a.shape[-1] == shape[1]:
        out = a.new_empty((*a.shape[:-1], shape[0]))  # the same as bitsandbytes' fake, which is slower
    else:
        out = func(*args, **kwargs)  # refuses
    rows = a.numel() // a.shape[-1]
    if gemm_4bit_is_fused(tracker.card, a.dtype, rows, shape[0], a.shape[-1], named["blocksize"]):
        tracker.record_outputs(out, func, args, fqn)
        return out
    return _dequantized_linear(tracker, func, args, named, out, fqn)


def _dequantized_linear(tracker, func, args, named: dict, out, fqn: str):
    """The fallback: absmax in fp32 (twice if it is quantised too), the whole weight in the input's dtype, a linear.

    Autocast casts the arguments of the linear layer: bias, weight and input, in that order.

    Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/cuda/ops.py#L904
    ``_dequant_linear_fallback``.
    """
    a, shape, absmax_8bit, bias = named["A"], named["shapeB"], named.get("absmax_8bit"), named.get("bias")
    sizes = [] if absmax_8bit is None else [absmax_8bit.numel() * 4] * 2
    sizes.append(shape[0] * shape[1] * a.element_size())
    keys = [tracker.record_alloc(size, fqn, "dequantized_weights", "gemm_4bit") for size in sizes]
    casts = []
    low = tracker.autocast.dtype if tracker.autocast and tracker.autocast.active else a.dtype
    if low != a.dtype:
        counts = [*([] if bias is None else [bias.numel()]), shape[0] * shape[1], a.numel()]
        casts = [tracker.record_alloc(count * low.itemsize, fqn, "temporaries", "linear") for count in counts]
        out = out.new_empty(out.shape, dtype=low)
    tracker.record_outputs(out, func, args, fqn)
    record_library_workspace(tracker, "cublas_workspace", tracker.card.cublas_workspace)
    if bias is not None:
        record_library_workspace(tracker, "cublaslt_workspace", tracker.card.cublaslt_workspace)
    for key in (*reversed(casts), *keys):
        tracker.record_free(key)
    return out


@kernel(bnb.optimizer_update_8bit_blockwise.default, bnb.optimizer_update_32bit.default)
def _optimizer_update(tracker, func, args, kwargs, fqn):
    """An optimiser's update, which takes fewer than 2^31 elements: bitsandbytes passes their number as ``c_int32``.

    Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/cuda/ops.py#L1118
    ``_optimizer_update_8bit_blockwise_impl``.
    Confirmed: H200, a head of 256000 × 12288 ends in "invalid argument".
    """
    if args[1].numel() >= 1 << 31:
        raise ErrorOnCard(f"bitsandbytes' optimisers take tensors below 2^31 elements, not {args[1].numel()}")
    return func(*args, **kwargs)


@kernel(bnb.int8_vectorwise_quant.default)
def _int8_quant(tracker, func, args, kwargs, fqn):
    """LLM.int8's quantisation of an input: with a threshold, ``A.abs()`` and a mask to look for outliers.

    The number of outliers depends on the values. Here it is none, as for weights of a usual scale.

    Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/cuda/ops.py#L213
    ``int8_vectorwise_quant``.
    """
    a = args[0]
    stats = torch.empty(a.numel() // a.shape[-1], dtype=torch.float32, device="meta")
    out = torch.empty(a.shape, dtype=torch.int8, device="meta")
    tracker.record_outputs((stats, out), func, args, fqn)
    if (args[1] if len(args) > 1 else kwargs.get("threshold", 0.0)) == 0:
        return out, stats, None
    magnitude = tracker.record_alloc(tensor_bytes(a), fqn, "temporaries", "abs")
    mask = tracker.record_alloc(a.numel(), fqn, "temporaries", "outliers")
    tracker.record_free(magnitude)
    tracker.record_free(mask)
    return out, stats, torch.empty(0, dtype=torch.long, device="meta")


@kernel(bnb.int8_mixed_scaled_mm.default)
def _int8_mm(tracker, func, args, kwargs, fqn):
    """LLM.int8's product: in int32, dequantised to fp16, then cast to the input's dtype.

    Source:
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/default/ops.py#L64
    ``int8_mixed_scaled_mm``. The error is that of backends/cuda/ops.py, in the same words.
    """
    a, weight = args[0], args[2]
    if a.dim() not in (2, 3):
        raise BadValueOnCard("Only two or three dimensional matrices are supported for argument A")
    elements = a.numel() // a.shape[-1] * weight.shape[0]
    product = tracker.record_alloc(4 * elements, fqn, "dequantized_weights", "int8_linear_matmul")
    half = torch.empty(*a.shape[:-1], weight.shape[0], dtype=torch.float16, device="meta")
    tracker.record_outputs(half, func, args, fqn)
    out = half
    if a.dtype != torch.float16:
        out = torch.empty(half.shape, dtype=a.dtype, device="meta")
        tracker.record_outputs(out, func, args, fqn)
    del half
    tracker.record_free(product)
    return out, torch.empty(0, dtype=a.dtype, device="meta")


@kernel(bnb.dequantize_4bit.default, bnb.dequantize_blockwise.default)
def _dequantize(tracker, func, args, kwargs, fqn):
    """A dequantised weight, or a dequantised optimiser state."""
    out = run_and_record(tracker, func, args, kwargs, fqn)
    tracker.reclassify(out, "dequantized_weights")
    return out
