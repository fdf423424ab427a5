"""Matrix products: cuBLAS, cuBLASLt and grouped products."""

from __future__ import annotations

import torch

from .registry import kernel
from .temporaries import record_copies, record_library_workspace, run_and_record

aten = torch.ops.aten


def matrices_copied(args) -> list[torch.Tensor]:
    """The operands of a product whose strides cuBLAS cannot take: PyTorch copies them for the call.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/Blas.cpp
    ``prepare_batch_matrix_for_cublas`` and ``prepare_matrix_for_cublas``.
    Confirmed: H200, ``baddbmm`` with PEFT's adapters of fused experts, whose ranks are not adjacent in memory.
    """
    return [matrix for matrix in args[-2:] if not _fits_cublas(matrix)]


def _fits_cublas(matrix: torch.Tensor) -> bool:
    if matrix.is_contiguous() or matrix.mT.is_contiguous():
        return True
    (rows, columns), (row_stride, column_stride) = matrix.shape[-2:], matrix.stride()[-2:]
    return (column_stride == 1 and row_stride >= columns) or (row_stride == 1 and column_stride >= rows)


@kernel(aten.mm.default, aten.mm.out, aten.bmm.default, aten.baddbmm.default, aten.addmm.default)
def _matmul(tracker, func, args, kwargs, fqn):
    """A matrix product: cuBLAS's workspace and, with a bias vector, cuBLASLt's, which has a cache of its own.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/Blas.cpp
    ``addmm_out_cuda_impl``.
    Confirmed: H100 and H200, see :attr:`~vramplan.dryrun.cuda.card_facts.Card.cublas_workspace`.
    """
    out = run_and_record(tracker, func, args, kwargs, fqn)
    with record_copies(tracker, matrices_copied(args), fqn, func.__name__):
        record_library_workspace(tracker, "cublas_workspace", tracker.card.cublas_workspace)
        if func is aten.addmm.default and args[0].dim() == 1:
            record_library_workspace(tracker, "cublaslt_workspace", tracker.card.cublaslt_workspace)
    return out


@kernel(aten._grouped_mm.default)
def _grouped_mm(tracker, func, args, kwargs, fqn):
    """A grouped product: CUTLASS on sm90 and sm100 in bf16, otherwise one cuBLAS product for each group.

    Shapes: [M, K] by [G, K, N], [G, M, K] by [K, N], or both 2-D with G offsets. G groups. The meta kernel refuses
    other dtypes than bf16, which the fallback takes.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/GroupedBlas.cpp
    ``_grouped_mm_cuda``.
    Confirmed: H100 with CUTLASS, 64 bytes a group for the arguments and 512 bytes a multiprocessor.
    """
    a, b = args[0], args[1]
    groups = b.shape[0] if b.dim() == 3 else a.shape[0] if a.dim() == 3 else args[2].shape[0]
    if a.dtype == torch.bfloat16:
        out = func(*args, **kwargs)
    else:
        rows, columns = a.shape[-2], b.shape[-1]
        out = a.new_empty((rows, columns) if a.dim() + b.dim() == 5 else (groups, rows, columns))
    tracker.record_outputs(out, func, args, fqn)
    if a.dtype == torch.bfloat16 and tracker.card.capability in ((9, 0), (10, 0), (10, 3)):
        sizes = [64 * groups, 512 * tracker.card.multiprocessors]
        tracker.record_temporary([(size, "kernel_workspace") for size in sizes], fqn, "bf16bf16_grouped_mm")
    else:
        record_library_workspace(tracker, "cublas_workspace", tracker.card.cublas_workspace)
    return out
