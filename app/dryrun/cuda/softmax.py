"""Softmax and its relatives."""

from __future__ import annotations

import torch

from .registry import kernel
from .temporaries import run_and_record, tensor_bytes

aten = torch.ops.aten


def softmax_as(run):
    """``softmax`` or ``log_softmax`` over ``run``, the operator without a dtype argument.

    On CUDA one kernel goes from fp16 to fp32. Every other input is cast to ``dtype`` first.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/SoftMax.cpp
    ``softmax`` and ``log_softmax``.
    Confirmed: H200, eager attention in fp16 has one block of the scores' size less.
    """

    def softmax(source, dim, dtype=None):
        if source.dtype == torch.float16 and dtype == torch.float32:
            return run(source, dim, True)
        return run(source if dtype is None else source.to(dtype), dim, False)

    return softmax


@kernel(aten._safe_softmax.default)
def _safe_softmax(tracker, func, args, kwargs, fqn):
    """The softmax of math attention, where a row that is masked entirely gives zeros.

    Beside the output: one byte for each element, one for each row, and a scalar.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/attention.cpp
    ``_safe_softmax``.
    Confirmed: H100, in the allocation history after the softmax's output.
    """
    out = func(*args, **kwargs) if len(args) > 2 or kwargs else aten._softmax.default(*args, False)
    tracker.record_outputs(out, func, args, fqn)
    sizes = [out.numel(), out.numel() // out.shape[-1], 4]
    keys = [tracker.record_alloc(size, fqn, "temporaries", "_safe_softmax") for size in sizes]
    for key in reversed(keys):
        tracker.record_free(key)
    return out


@kernel(aten._softmax_backward_data.default)
def _softmax_backward(tracker, func, args, kwargs, fqn):
    """Softmax, backward: ``tmp = grad * output``, as large as the gradient.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/SoftMax.cu
    ``softmax_backward_cuda_out``.
    Confirmed: H100 with eager attention, one more block of the probabilities' size within the call.
    """
    out = run_and_record(tracker, func, args, kwargs, fqn)
    tracker.record_temporary([(tensor_bytes(args[0]), "temporaries")], fqn, "softmax_backward_cuda_out")
    return out


@kernel(aten.logsumexp.default)
def _logsumexp(tracker, func, args, kwargs, fqn):
    """``logsumexp``: the maxima, then the exponentials of all elements less their maximum.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/ReduceOps.cpp
    ``logsumexp_out_impl``.
    Confirmed: H200.
    """
    out = run_and_record(tracker, func, args, kwargs, fqn)
    sizes = [tensor_bytes(out), args[0].numel() * out.element_size()]
    tracker.record_temporary([(size, "temporaries") for size in sizes], fqn, "logsumexp")
    return out
