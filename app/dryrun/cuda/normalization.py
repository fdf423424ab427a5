"""Layer normalisation."""

from __future__ import annotations

import torch

from .registry import kernel
from .temporaries import record_contiguous_copies

aten = torch.ops.aten


@kernel(aten.native_layer_norm.default)
def _layer_norm(tracker, func, args, kwargs, fqn):
    """Layer norm: a copy of an input that is not contiguous; a contiguous output; mean and deviation of each row.

    Mean and deviation are of the type in which sums are accumulated: fp32 for 16-bit inputs.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/layer_norm_kernel.cu
    ``layer_norm_cuda``.
    Confirmed: H100, a copy in each call of an encoder whose states come transposed from a convolution.
    """
    source, shape, weight = args[:3]
    with record_contiguous_copies(tracker, [source], fqn, "expect_contiguous"):
        if weight is None or tuple(weight.shape) != tuple(shape):
            out = func(*args, **kwargs)
        else:  # the same shapes as the meta kernel, which is written in Python and takes 0.3 ms
            rows = (*source.shape[: source.dim() - len(shape)], *(1 for _ in shape))
            kept = torch.promote_types(source.dtype, torch.float32)
            out = source.new_empty(source.shape), *(source.new_empty(rows, dtype=kept) for _ in range(2))
        tracker.record_outputs(out, func, args, fqn)
    return out


@kernel(aten.native_layer_norm_backward.default)
def _layer_norm_backward(tracker, func, args, kwargs, fqn):
    """Layer norm, backward: copies of gradient and input that are not contiguous; three contiguous gradients.

    The gradients are contiguous whatever the input's strides are (``LEGACY_CONTIGUOUS_MEMORY_FORMAT``).

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/layer_norm_kernel.cu
    ``layer_norm_backward_cuda``.
    Confirmed: H200, a tower whose states are transposed: nothing is copied after its layer norm.
    """
    grad, source, weight, bias, needed = args[0], args[1], args[5], args[6], args[7]
    with record_contiguous_copies(tracker, [grad, source], fqn, "expect_contiguous"):
        inputs = (source, weight, bias)
        out = tuple(
            t.new_empty(t.shape) if need and t is not None else None for t, need in zip(inputs, needed, strict=True)
        )
        tracker.record_outputs(out, func, args, fqn)
    return out
