"""Reductions and cumulative sums."""

from __future__ import annotations

import torch

from ..symbols import called
from .card_facts import Card
from .registry import kernel
from .temporaries import tensor_bytes

aten = torch.ops.aten


@kernel(aten._foreach_norm.Scalar)
def _foreach_norm(tracker, func, args, kwargs, fqn):
    """``foreach_tensor_norm_cuda`` (native/cuda/ForeachReduceOp.cu): a partial result a chunk of 65536 elements, for
    every tensor as many as the largest has. Measured: 38 tensors, the largest of 136134656: 315856 bytes."""
    tensors = args[0]
    chunks = max(-(-t.numel() // 65536) for t in tensors)
    size = tracker.card.measured.size("_foreach_norm", 4 * len(tensors) * chunks)
    partial = tracker.record_alloc(size, fqn, "kernel_workspace", "_foreach_norm")
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, None)
    tracker.record_free(partial)
    return out


@kernel(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
def _sum(tracker, func, args, kwargs, fqn):
    """``sum_kernel_cuda`` and ``mean_kernel_cuda`` (native/cuda/ReduceSumProdKernel.cu, ReduceMomentKernel.cu): eight
    numbers of 16 bit at a time. ``make_reduction`` (native/ReduceOpsUtils.h) casts first what is not of the result's
    dtype (a mask that is counted), but for 16 bit that are added up in fp32."""
    source, out = args[0], func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    low = source.dtype in (torch.float16, torch.bfloat16)
    cast = [] if out.dtype in (source.dtype, *[torch.float32] * low) else [source.numel() * out.element_size()]
    keys = [tracker.record_alloc(size, fqn, "temporaries", "make_reduction") for size in cast]
    record_reduction(
        tracker, source, args[1] if len(args) > 1 else None, 8 if low else 4, max(4, out.element_size()), fqn
    )
    for key in keys:
        tracker.record_free(key)
    return out


@kernel(
    aten.linalg_vector_norm.default,
    *(aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.prod.dim_int),
    *(aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default),
    *(aten.any.dim, aten.any.default, aten.all.dim, aten.all.default),
)
def _reduced(tracker, func, args, kwargs, fqn):
    """Other reductions (native/cuda/ReduceNormKernel.cu, ReduceMomentKernel.cu, Reduce*Kernel.cu), four elements at a
    time. What they meet in: a sum of squares, the moments of Welford's algorithm, a value and its place, a truth.
    Measured on an H200 over 4096 rows of 2048; DoRA's norm of a transposed weight of 1600 × 6400 takes 81920512."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    name, source = func.overloadpacket.__name__, args[0]
    at = 2 if name == "linalg_vector_norm" else 1
    dims = args[at] if len(args) > at else None
    size = max(4, source.element_size())
    if name in ("var", "std", "var_mean", "max", "min", "argmax", "argmin"):
        size = 16
    elif name in ("amax", "amin", "any", "all"):
        size = source.element_size()
    record_reduction(tracker, source, [dims] if isinstance(dims, int) else dims, 4, size, fqn)
    return out


@kernel(aten.cumsum.default, aten.cumprod.default)
def _cumulated(tracker, func, args, kwargs, fqn):
    """``impl_func_cum_ops`` (native/ReduceOps.cpp) casts what is not of the result's dtype. Measured on an H200."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    if out.dtype != args[0].dtype:
        tracker.record_temporary([(tensor_bytes(out), "temporaries")], fqn, "impl_func_cum_ops")
    return out


def record_reduction(tracker, source, dims: list[int] | None, unrolled: int, sum_bytes: int, fqn) -> None:
    """``gpu_reduce_kernel`` (native/cuda/Reduce.cuh): a reduction split over blocks meets in global memory."""
    dims = [d % source.dim() for d in dims] if dims else [*range(source.dim())]
    scratch = reduction_scratch(source, dims, tracker.card, unrolled, sum_bytes)
    if scratch > 0:
        scratch = tracker.card.measured.size("gpu_reduce_kernel", scratch)
        buffer, semaphores = (
            tracker.record_alloc(n, fqn, "kernel_workspace", "gpu_reduce_kernel") for n in (scratch, 512)
        )
        tracker.record_free(semaphores)
        tracker.record_free(buffer)


def reduction_scratch(source, dims: list[int], card: Card, unrolled: int, sum_bytes: int) -> int:
    """Bytes of the buffer of a reduction of ``source`` over ``dims`` (:func:`vramplan.memory.reduction.scratch`)."""
    order = [d for d in range(source.dim()) if d not in dims] + dims
    lies = [number for d in order for number in (source.shape[d], source.stride(d))]
    return called("scratch", card.multiprocessors, unrolled, sum_bytes, source.dim() - len(dims), *lies)
