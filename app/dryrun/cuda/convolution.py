"""Convolution and pooling."""

from __future__ import annotations

import torch

from .reductions import record_reduction
from .registry import kernel
from .temporaries import record_contiguous_copies, tensor_bytes

aten = torch.ops.aten


def _layout(source, weight) -> torch.memory_format:
    """``cudnn_conv_suggest_memory_format`` (native/ConvUtils.h): channels last where input or filter lies so."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(source.dim())
    if last and any(not t.is_contiguous() and t.is_contiguous(memory_format=last) for t in (source, weight)):
        return last
    return torch.contiguous_format


TRANSFORMED = 392


"""Pixels up to which cuDNN 9.19 turns an image of three channels in bf16 into NHWC on an H200."""


@kernel(aten.convolution.default)
def _convolution(tracker, func, args, kwargs, fqn):
    """``cudnn_convolution`` (native/cudnn/ConvShared.cpp) copies an input and a filter that do not lie as it computes.

    For half precision cuDNN's tensor-core kernels transform in a workspace. Measured on an H200 with cuDNN 9.19: 36
    convolutions of images of up to 384 pixels and 48 over time, to 131 bytes; [32, 3, 224, 224] by [1024, 3, 16, 16]
    takes 42729488. Of images of three channels in bf16 those of up to :data:`TRANSFORMED` pixels in height do, in 812
    cases; a filter as large as its input takes none.
    """
    source, weight = args[0], args[1]
    layout = _layout(source, weight)
    with record_contiguous_copies(tracker, [source], fqn, "contiguous", layout):
        out = func(*args, **kwargs)
        tracker.record_outputs(out, func, args, fqn)
        with record_contiguous_copies(tracker, [weight], fqn, "contiguous", layout):
            pass
        high = source.dim() == 4 and source.shape[1] == 3 and source.shape[2] > TRANSFORMED
        if source.dim() < 5 and out[0, 0].numel() > 1 and not (high and source.dtype == torch.bfloat16):
            _transformed(tracker, source, weight, out, args[8], fqn)
    return out


def _transformed(tracker, source, weight, out, groups: int, fqn) -> None:
    """The workspace in which cuDNN's tensor-core kernels of half precision turn NCHW into NHWC: input, filter and
    output, with their channels padded to 8; what has one element a channel lies so already."""
    half = source.dtype in (torch.float16, torch.bfloat16) and tracker.card.capability >= (8, 0)
    if groups > 1 or not half or not source.is_contiguous():
        return
    size = 16
    for tensor in (source, weight, out):
        if tensor[0, 0].numel() > 1:
            size += tensor_bytes(tensor) // tensor.shape[1] * (-(-tensor.shape[1] // 8) * 8)
    tracker.record_temporary([(size, "kernel_workspace")], fqn, "run_conv_plan")


@kernel(aten.convolution_backward.default)
def _convolution_backward(tracker, func, args, kwargs, fqn):
    """``convolution_backward`` (native/Convolution.cpp): cuDNN is given gradient and input as it computes; the bias
    gradient is a sum of the gradient as it came. The gradients of input and filter transform as forward does; that of
    the filter may take partial sums beside it, which are not modelled."""
    grad, source, weight, groups = args[0], args[1], args[2], args[9]
    with record_contiguous_copies(tracker, [grad, source], fqn, "contiguous", _layout(source, weight)):
        out = func(*args, **kwargs)
        for gradient in out[:2]:
            if gradient is not None:
                tracker.record_outputs(gradient, func, args, fqn)
                _transformed(tracker, source, weight, grad, groups, fqn)
    if out[2] is not None:
        tracker.record_outputs(out[2], func, args, fqn)
        others = [d for d in range(grad.dim()) if d != 1]
        record_reduction(tracker, grad, others, 8 if grad.element_size() == 2 else 4, 4, fqn)
    return out


@kernel(aten.avg_pool2d_backward.default)
def _avg_pool2d_backward(tracker, func, args, kwargs, fqn):
    """``avg_pool2d_backward_out_cuda`` (native/cuda/AveragePool2d.cu) makes the gradient contiguous."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    with record_contiguous_copies(tracker, args[:1], fqn, "contiguous"):
        return out
