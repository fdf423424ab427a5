"""Matrix products: cuBLAS, cuBLASLt and grouped products."""

from __future__ import annotations

import torch

from .registry import kernel
from .temporaries import record_copies, record_library_workspace

aten = torch.ops.aten


def matrices_copied(args) -> list:
    """The operands of a product that cuBLAS cannot take as they lie: ``prepare_batch_matrix_for_cublas`` and
    ``prepare_matrix_for_cublas`` (native/cuda/Blas.cpp) make contiguous ones of them for as long as the call lasts.

    Measured on an H200: ``baddbmm`` with PEFT's adapters of fused experts, whose ranks lie apart.
    """

    def fits(matrix) -> bool:
        if matrix.is_contiguous() or matrix.mT.is_contiguous():
            return True
        (rows, columns), (down, across) = matrix.shape[-2:], matrix.stride()[-2:]
        return across == 1 and down >= columns or down == 1 and across >= rows

    return [matrix for matrix in args[-2:] if not fits(matrix)]


@kernel(aten.mm.default, aten.mm.out, aten.bmm.default, aten.baddbmm.default, aten.addmm.default)
def _matmul(tracker, func, args, kwargs, fqn):
    """``addmm_out_cuda_impl`` (native/cuda/Blas.cpp): a vector bias goes through cuBLASLt, which has its own cache."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    with record_copies(tracker, matrices_copied(args), fqn, func.__name__):
        record_library_workspace(tracker, "cublas_workspace", tracker.card.cublas_workspace)
        if func is aten.addmm.default and args[0].dim() == 1:
            record_library_workspace(tracker, "cublaslt_workspace", tracker.card.cublaslt_workspace)
    return out


@kernel(aten._grouped_mm.default)
def _grouped_mm(tracker, func, args, kwargs, fqn):
    """``_grouped_mm_cuda`` (native/cuda/GroupedBlas.cpp): CUTLASS on sm90 and sm100 in bf16, else a product a group.

    The meta kernel refuses what the fallback takes. Measured on an H100 with CUTLASS: 64 bytes a group for the
    arguments and 512 a multiprocessor.
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
