"""Softmax and its relatives."""

from __future__ import annotations

import torch

from .registry import kernel
from .temporaries import tensor_bytes

aten = torch.ops.aten


def softmax_as(run):
    """``softmax`` and ``log_softmax`` (native/SoftMax.cpp): of fp16 into fp32 on CUDA in one kernel; anything else is
    cast first. Measured on an H200: eager attention in fp16 has one block of the scores' size less."""

    def softmax(source, dim, dtype=None):
        if source.dtype == torch.float16 and dtype == torch.float32:
            return run(source, dim, True)
        return run(source if dtype is None else source.to(dtype), dim, False)

    return softmax


@kernel(aten._safe_softmax.default)
def _safe_softmax(tracker, func, args, kwargs, fqn):
    """``_safe_softmax`` (native/transformers/attention.cpp): which rows are hidden whole, then the softmax in place.

    Measured on an H100 after the softmax's output: one byte an element, one a row, and a scalar.
    """
    out = func(*args, **kwargs) if len(args) > 2 or kwargs else aten._softmax.default(*args, False)
    tracker.record_outputs(out, func, args, fqn)
    hidden = [out.numel(), out.numel() // out.shape[-1], 4]
    keys = [tracker.record_alloc(size, fqn, "temporaries", "_safe_softmax") for size in hidden]
    for key in reversed(keys):
        tracker.record_free(key)
    return out


@kernel(aten._softmax_backward_data.default)
def _softmax_backward(tracker, func, args, kwargs, fqn):
    """``softmax_backward_cuda_out`` (native/cuda/SoftMax.cu): ``tmp = grad * output``, as large as the gradient.

    Measured on an H100 with eager attention: one more block of the probabilities' size within the call.
    """
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    tracker.record_temporary([(tensor_bytes(args[0]), "temporaries")], fqn, "softmax_backward_cuda_out")
    return out


@kernel(aten.logsumexp.default)
def _logsumexp(tracker, func, args, kwargs, fqn):
    """``logsumexp_out_impl`` (native/ReduceOps.cpp): the maxima, then all that is left of them. Measured on an H200."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    sizes = [tensor_bytes(out), args[0].numel() * out.element_size()]
    tracker.record_temporary([(size, "temporaries") for size in sizes], fqn, "logsumexp")
    return out
