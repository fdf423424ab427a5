"""Reductions and cumulative sums."""

from __future__ import annotations

import torch

from ..symbols import sym_function
from .card_facts import Card
from .registry import kernel
from .temporaries import run_and_record, tensor_bytes

aten = torch.ops.aten

CHUNK = 65536
"""Elements of a chunk of the for-each kernels (``kChunkSize`` in MultiTensorApply.cuh)."""


def reduction_scratch(source, dims: list[int], card: Card, unrolled: int, sum_bytes: int) -> int:
    """Bytes of the buffer of a reduction of ``source`` over ``dims``.

    ``unrolled``: elements that a thread reads at a time; ``sum_bytes``: bytes of the number in which it accumulates.
    See :func:`vramplan.memory.reduction.scratch`.
    """
    order = [d for d in range(source.dim()) if d not in dims] + dims
    sizes_and_strides = [number for d in order for number in (source.shape[d], source.stride(d))]
    kept = source.dim() - len(dims)
    return sym_function("scratch", card.multiprocessors, unrolled, sum_bytes, kept, *sizes_and_strides)


def record_reduction(tracker, source, dims: list[int] | None, unrolled: int, sum_bytes: int, fqn: str) -> None:
    """The buffer and the semaphores of a reduction that is split over blocks, which meet in global memory.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/Reduce.cuh#L192
    ``global_memory_size``; ``gpu_reduce_kernel`` in the same file.
    Confirmed: H100, to the byte, see :func:`vramplan.memory.reduction.scratch`.
    """
    dims = [d % source.dim() for d in dims] if dims else [*range(source.dim())]
    scratch = reduction_scratch(source, dims, tracker.card, unrolled, sum_bytes)
    if scratch > 0:
        op = "gpu_reduce_kernel"
        scratch = tracker.card.measured.size(op, scratch)
        buffer, semaphores = (tracker.record_alloc(n, fqn, "kernel_workspace", op) for n in (scratch, 512))
        tracker.record_free(semaphores)
        tracker.record_free(buffer)


@kernel(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
def _sum(tracker, func, args, kwargs, fqn):
    """Sum and mean: 16-bit types are read eight at a time, others four.

    An input of another dtype than the result (a mask that is counted) is cast first, except 16-bit types that are
    accumulated in fp32.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/ReduceSumProdKernel.cu
    ``sum_kernel_cuda``;
    https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/ReduceMomentKernel.cu
    ``mean_kernel_cuda``;
    https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/ReduceOpsUtils.h#L185 ``make_reduction``.
    """
    source = args[0]
    out = run_and_record(tracker, func, args, kwargs, fqn)
    half = source.dtype in (torch.float16, torch.bfloat16)
    cast = [] if out.dtype in (source.dtype, *[torch.float32] * half) else [source.numel() * out.element_size()]
    keys = [tracker.record_alloc(size, fqn, "temporaries", "make_reduction") for size in cast]
    dims = args[1] if len(args) > 1 else None
    record_reduction(tracker, source, dims, 8 if half else 4, max(4, out.element_size()), fqn)
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
    """Other reductions, which read four elements at a time.

    What they accumulate in: a sum of squares; the moments of Welford's algorithm, or a value and its index (16 bytes);
    the input's own type.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/ReduceNormKernel.cu
    and ReduceMomentKernel.cu, ReduceMaxValuesKernel.cu, ReduceArgMaxKernel.cu, ReduceLogicKernel.cu beside it.
    Confirmed: H200 over 4096 rows of 2048; DoRA's norm of a transposed weight of 1600 × 6400 takes 81920512 bytes.
    """
    out = run_and_record(tracker, func, args, kwargs, fqn)
    name, source = func.overloadpacket.__name__, args[0]
    position = 2 if name == "linalg_vector_norm" else 1
    dims = args[position] if len(args) > position else None
    size = max(4, source.element_size())
    if name in ("var", "std", "var_mean", "max", "min", "argmax", "argmin"):
        size = 16
    elif name in ("amax", "amin", "any", "all"):
        size = source.element_size()
    record_reduction(tracker, source, [dims] if isinstance(dims, int) else dims, 4, size, fqn)
    return out


@kernel(aten.cumsum.default, aten.cumprod.default)
def _cumulated(tracker, func, args, kwargs, fqn):
    """Cumulative sum and product: an input of another dtype than the result is cast first.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/ReduceOps.cpp
    ``impl_func_cum_ops``.
    Confirmed: H200.
    """
    out = run_and_record(tracker, func, args, kwargs, fqn)
    if out.dtype != args[0].dtype:
        tracker.record_temporary([(tensor_bytes(out), "temporaries")], fqn, "impl_func_cum_ops")
    return out


@kernel(aten._foreach_norm.Scalar)
def _foreach_norm(tracker, func, args, kwargs, fqn):
    """The norms of a list of tensors: one fp32 partial result for each chunk.

    Every tensor gets as many chunks as the largest one has.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/ForeachReduceOp.cu
    ``foreach_tensor_norm_cuda``.
    Confirmed: 38 tensors, the largest of 136134656 elements: 315856 bytes.
    """
    tensors = args[0]
    chunks = max(-(-t.numel() // CHUNK) for t in tensors)
    size = tracker.card.measured.size("_foreach_norm", 4 * len(tensors) * chunks)
    partial = tracker.record_alloc(size, fqn, "kernel_workspace", "_foreach_norm")
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, None)
    tracker.record_free(partial)
    return out


@kernel(aten.bincount.default)
def _bincount(tracker, func, args, kwargs, fqn):
    """``bincount`` of numbers below ``minlength``. Before it counts, it asks for the least and for the largest number.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/SummaryOps.cu#L262
    ``_bincount_cuda_template``.
    Confirmed: H100, the rows ``A-kto`` of tests/measured/h100-post-training.jsonl, to the byte.
    """
    least = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
    out = torch.empty(least, dtype=torch.long, device="meta")
    tracker.record_temporary([(8, "temporaries"), (8, "temporaries")], fqn, "bincount")
    tracker.record_outputs(out, func, args, fqn)
    return out
