"""Elementwise operators: fills, dropout, activations, and the update of the loss scale."""

from __future__ import annotations

import math

import torch

from .as_on_card import ErrorOnCard
from .registry import kernel
from .temporaries import run_and_record

aten = torch.ops.aten


def dropout(x, p, train):
    """``torch.dropout``, on CUDA ``native_dropout``: the output, and a mask of one byte for each element.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/Dropout.cpp
    ``dropout`` and ``is_fused_kernel_acceptable``.
    """
    if train and 0 < p < 1 and x.numel():
        return torch.native_dropout(x, p, True)[0]
    if not train or p == 0:
        return x
    return x * torch.empty_like(x).fill_(0 if p == 1 else 1)


@kernel(aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.fill_.Scalar)
def _fill(tracker, func, args, kwargs, fqn):
    """A fill, which refuses a number that overflows the tensor's dtype. The meta device does not check that.

    Models that mask with the lowest number of another dtype fail here, as they do on a GPU.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/c10/util/TypeCast.h#L198
    ``checked_convert``.
    """
    value, dtype = args[-1], args[0].dtype
    if dtype.is_floating_point and isinstance(value, (int, float)) and math.isfinite(value):
        if abs(value) > torch.finfo(dtype).max:
            raise ErrorOnCard(f"value cannot be converted to type {dtype} without overflow")
    return run_and_record(tracker, func, args, kwargs, fqn)


@kernel(aten.native_dropout.default)
def _native_dropout(tracker, func, args, kwargs, fqn):
    """Dropout: the mask is allocated before the output.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/Dropout.cu
    ``dropout_cuda``.
    Confirmed: in every allocation history.
    """
    out, mask = func(*args, **kwargs)
    tracker.record_outputs(mask, func, args, fqn)
    tracker.record_outputs(out, func, args, fqn)
    return out, mask


@kernel(aten.log_sigmoid_forward.default)
def _log_sigmoid(tracker, func, args, kwargs, fqn):
    """``logsigmoid``: on CUDA its second output, ``buffer``, has no elements.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/ActivationLogSigmoidKernel.cu
    ``log_sigmoid_forward_cuda``.
    """
    out = torch.empty_like(args[0])
    tracker.record_outputs(out, func, args, fqn)
    return out, args[0].new_empty(0)


@kernel(aten._amp_update_scale_.default)
def _update_scale(tracker, func, args, kwargs, fqn):
    """``GradScaler.update``: it writes into its first argument. The meta device has no kernel for it.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/AmpKernels.cu
    ``_amp_update_scale_cuda_``.
    """
    return args[0]
