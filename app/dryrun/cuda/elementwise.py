"""Elementwise operators: fills, dropout, activations."""

from __future__ import annotations

import math

import torch

from .registry import kernel

aten = torch.ops.aten


def dropout(x, p, train):
    """``at::dropout`` on CUDA is ``native_dropout``: the output and a mask of one byte an element (Dropout.cpp)."""
    if train and 0 < p < 1 and x.numel():
        return torch.native_dropout(x, p, True)[0]
    if not train or p == 0:
        return x
    return x * torch.empty_like(x).fill_(0 if p == 1 else 1)


@kernel(aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.fill_.Scalar)
def _filled(tracker, func, args, kwargs, fqn):
    """The value must be one of the tensor's dtype (``checked_convert``, c10/util/TypeCast.h): the meta device does not
    ask. Models that mask with the lowest number of another dtype break there."""
    value, dtype = args[-1], args[0].dtype
    if dtype.is_floating_point and isinstance(value, (int, float)) and math.isfinite(value):
        if abs(value) > torch.finfo(dtype).max:
            raise RuntimeError(f"value cannot be converted to type {dtype} without overflow")
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    return out


@kernel(aten.native_dropout.default)
def _native_dropout(tracker, func, args, kwargs, fqn):
    """``dropout_cuda`` (native/cuda/Dropout.cu): the mask is made before the output. Measured in every history."""
    out, mask = func(*args, **kwargs)
    tracker.record_outputs(mask, func, args, fqn)
    tracker.record_outputs(out, func, args, fqn)
    return out, mask


@kernel(aten._amp_update_scale_.default)
def _update_scale(tracker, func, args, kwargs, fqn):
    """``_amp_update_scale_cuda_`` (native/cuda/AmpKernels.cu) writes where it was told; it has no meta kernel."""
    return args[0]


@kernel(aten.log_sigmoid_forward.default)
def _log_sigmoid(tracker, func, args, kwargs, fqn):
    """``log_sigmoid_forward_cuda`` (native/cuda/ActivationLogSigmoidKernel.cu): its buffer is of no elements."""
    out = torch.empty_like(args[0])
    tracker.record_outputs(out, func, args, fqn)
    return out, args[0].new_empty(0)
