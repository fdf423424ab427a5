"""Convolution and pooling. Shapes: an input is [B, C, ...], a filter [O, C / groups, ...], an output [B, O, ...]."""

from __future__ import annotations

import torch

from .reductions import record_reduction
from .registry import kernel
from .temporaries import record_contiguous_copies, run_and_record, tensor_bytes

aten = torch.ops.aten

TRANSFORMED = 392
"""Pixels of height up to which cuDNN transforms an image of three channels in bf16 to NHWC. H200, cuDNN 9.19."""


def _layout(source, weight) -> torch.memory_format:
    """The memory format in which cuDNN computes: channels last if input or filter has it.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/ConvUtils.h#L329
    ``cudnn_conv_suggest_memory_format``.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(source.dim())
    if last and any(not t.is_contiguous() and t.is_contiguous(memory_format=last) for t in (source, weight)):
        return last
    return torch.contiguous_format


@kernel(aten.convolution.default)
def _convolution(tracker, func, args, kwargs, fqn):
    """Convolution: copies of an input and a filter in another memory format, and cuDNN's workspace.

    In half precision cuDNN's tensor-core kernels transform NCHW to NHWC in a workspace (:func:`_record_transform`).
    Images of three channels in bf16 are transformed up to a height of :data:`TRANSFORMED`. A filter as large as its
    input takes no workspace.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cudnn/ConvShared.cpp
    ``cudnn_convolution``.
    Confirmed: H200 with cuDNN 9.19, 36 convolutions of images of up to 384 pixels and 48 over time, to 131 bytes;
    [32, 3, 224, 224] by [1024, 3, 16, 16] takes 42729488. The limit of :data:`TRANSFORMED`: 812 cases.
    """
    source, weight = args[0], args[1]
    layout = _layout(source, weight)
    with record_contiguous_copies(tracker, [source], fqn, "contiguous", layout):
        out = run_and_record(tracker, func, args, kwargs, fqn)
        with record_contiguous_copies(tracker, [weight], fqn, "contiguous", layout):
            pass
        high = source.dim() == 4 and source.shape[1] == 3 and source.shape[2] > TRANSFORMED
        if source.dim() < 5 and out[0, 0].numel() > 1 and not (high and source.dtype == torch.bfloat16):
            _record_transform(tracker, source, weight, out, args[8], fqn)
    return out


def _record_transform(tracker, source, weight, out, groups: int, fqn: str) -> None:
    """The workspace in which cuDNN's tensor-core kernels keep input, filter and output in NHWC.

    Channels are padded to a multiple of 8. A tensor with one element a channel is the same in both formats.
    """
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
    """Convolution, backward: copies of gradient and input in cuDNN's format, and the workspaces of the gradients.

    The bias gradient is a sum of the output gradient as it came. The filter's gradient may also take partial sums,
    which are not modelled.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/Convolution.cpp
    ``convolution_backward``.
    """
    grad, source, weight, groups = args[0], args[1], args[2], args[9]
    with record_contiguous_copies(tracker, [grad, source], fqn, "contiguous", _layout(source, weight)):
        out = func(*args, **kwargs)
        for gradient in out[:2]:
            if gradient is not None:
                tracker.record_outputs(gradient, func, args, fqn)
                _record_transform(tracker, source, weight, grad, groups, fqn)
    if out[2] is not None:
        tracker.record_outputs(out[2], func, args, fqn)
        others = [d for d in range(grad.dim()) if d != 1]
        record_reduction(tracker, grad, others, 8 if grad.element_size() == 2 else 4, 4, fqn)
    return out


@kernel(aten.avg_pool2d_backward.default)
def _avg_pool2d_backward(tracker, func, args, kwargs, fqn):
    """Average pooling, backward: a copy of a gradient that is not contiguous.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/AveragePool2d.cu
    ``avg_pool2d_backward_out_cuda``.
    """
    out = run_and_record(tracker, func, args, kwargs, fqn)
    with record_contiguous_copies(tracker, args[:1], fqn, "contiguous"):
        return out
