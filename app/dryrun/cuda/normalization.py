"""Layer normalisation."""

from __future__ import annotations

import torch

from .registry import kernel
from .temporaries import record_contiguous_copies

aten = torch.ops.aten


@kernel(aten.native_layer_norm.default)
def _layer_norm(tracker, func, args, kwargs, fqn):
    """``layer_norm_cuda`` (native/cuda/layer_norm_kernel.cu): ``expect_contiguous`` of the input. Measured on an H100:
    a copy within every call of an encoder whose states come transposed from a convolution. It makes a contiguous
    output, and mean and deviation of each row in the type that sums are kept in."""
    source, shape, weight = args[:3]
    with record_contiguous_copies(tracker, [source], fqn, "expect_contiguous"):
        if weight is None or tuple(weight.shape) != tuple(shape):
            out = func(*args, **kwargs)
        else:  # as PyTorch's function in Python says, which takes 0.3 ms
            rows = (*source.shape[: source.dim() - len(shape)], *(1 for _ in shape))
            kept = torch.promote_types(source.dtype, torch.float32)
            out = source.new_empty(source.shape), *(source.new_empty(rows, dtype=kept) for _ in range(2))
        tracker.record_outputs(out, func, args, fqn)
    return out


@kernel(aten.native_layer_norm_backward.default)
def _layer_norm_backward(tracker, func, args, kwargs, fqn):
    """``layer_norm_backward_cuda`` (the same file): gradient and input are made contiguous, and all three gradients are
    (LEGACY_CONTIGUOUS_MEMORY_FORMAT), however the input lay: measured on an H200 with a tower whose states lie so,
    where nothing is copied after it."""
    grad, source, weight, bias, wanted = args[0], args[1], args[5], args[6], args[7]
    with record_contiguous_copies(tracker, [grad, source], fqn, "expect_contiguous"):
        like = (source, weight, bias)
        out = tuple(t.new_empty(t.shape) if want and t is not None else None for t, want in zip(like, wanted))
        tracker.record_outputs(out, func, args, fqn)
    return out
