"""Indexing, masks and embeddings."""

from __future__ import annotations

import torch

from .registry import kernel
from .temporaries import record_contiguous_copies

aten = torch.ops.aten


@kernel(aten.embedding_dense_backward.default)
def _embedding_backward(tracker, func, args, kwargs, fqn):
    """``embedding_dense_backward_cuda`` (native/cuda/Embedding.cu): beyond 3072 indices they are sorted first.

    Below, one kernel adds into the zeroed weight gradient. Above, ``sorted_indices``, ``orig_indices`` and what they
    are sorted from (int64); then ``embedding_backward_cuda_kernel`` (EmbeddingBackwardKernel.cu): where segments of
    equal indices start, and in the accumulation type ``grad_weight_per_segment``, a row for each of the
    ``max_partial_segment`` = numel / NROWS_PER_THREAD + min(numel, num_weights). Measured on H100 and H200: 4505 rows
    of 768 for 4096 indices, 2617 of 1024 for 3136 into 2304; beside these cub's own storage, under 100 KiB.
    """
    grad, indices = args[0], args[1]
    count = indices.numel()
    if count <= 3072:
        out = func(*args, **kwargs)
        tracker.record_outputs(out, func, args, fqn)
        return out
    keys = [tracker.record_alloc(8 * count, fqn, "kernel_workspace", "embedding_sort") for _ in range(2)]
    tracker.record_temporary([(8 * count, "kernel_workspace")], fqn, "arange")
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    op = "embedding_backward_cuda_kernel"
    keys.append(tracker.record_alloc(8 * count, fqn, "kernel_workspace", op))
    tracker.record_temporary([(8 * count, "kernel_workspace")], fqn, "unique_by_key")
    segments = torch.sym_min(count, args[2])
    rows = count // 10 + segments
    sizes = [8 * segments, 8 * segments, 8 * rows, rows * grad.shape[-1] * 4]
    tracker.record_temporary([(size, "kernel_workspace") for size in sizes], fqn, op)
    for key in keys:
        tracker.record_free(key)
    return out


@kernel(aten.index.Tensor)
def _index(tracker, func, args, kwargs, fqn):
    """``index`` by a boolean mask: ``nonzero`` first (native/cuda/Nonzero.cu), then as many rows as it is true for.

    A mask's values are unknown; here it is true everywhere, as for labels none of which is ignored, but for the first
    of each packed sequence, which TRL's collator ignores (DataCollatorForLanguageModeling; measured on an H200: 248 of
    255 are left of eight sequences of 32).
    """
    source, indices = args
    mask = indices[0] if indices else None
    if mask is None or mask.dtype != torch.bool or source.device.type != "meta":
        out = func(*args, **kwargs)
        tracker.record_outputs(out, func, args, fqn)
        return out
    rows = tracker.labelled if tracker.labelled and mask.numel() == tracker.shifted else mask.numel()
    positions = tracker.record_alloc(8 * rows * mask.dim(), fqn, "temporaries", "nonzero")
    out = source.new_empty((rows, *source.shape[mask.dim() :]))
    tracker.record_outputs(out, func, args, fqn)
    tracker.record_free(positions)
    return out


@kernel(aten.nonzero.default)
def _nonzero(tracker, func, args, kwargs, fqn):
    """``nonzero`` of a condition that holds everywhere, as for labels none of which is ignored."""
    if args[0].device.type != "meta":
        return func(*args, **kwargs)
    out = torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device="meta")
    tracker.record_outputs(out, func, args, fqn)
    return out


@kernel(aten.masked_scatter.default)
def _masked_scatter(tracker, func, args, kwargs, fqn):
    """``masked_scatter__cuda`` (native/cuda/IndexKernel.cpp): an int64 prefix sum as large as the output, and the
    expanded mask made contiguous, given back in the opposite order (measured on an H200)."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    whole = args[1].shape == out.shape and args[1].is_contiguous()
    sizes = [8 * out.numel(), *([] if whole else [out.numel()])]
    for key in reversed(
        [tracker.record_alloc(size, fqn, "kernel_workspace", "masked_scatter__cuda") for size in sizes]
    ):
        tracker.record_free(key)
    return out


@kernel(aten.masked_scatter_backward.default)
def _masked_scatter_backward(tracker, func, args, kwargs, fqn):
    """``grad.masked_select(mask)`` (TensorAdvancedIndexing.cpp) by ``index``: the expanded mask, made
    contiguous, and its ``nonzero`` first."""
    grad, mask, sizes = args
    count = 1
    for size in sizes:
        count *= size
    whole = mask.expand(grad.shape)
    with record_contiguous_copies(tracker, [whole], fqn, "contiguous"):
        positions = tracker.record_alloc(8 * grad.dim() * count, fqn, "temporaries", "nonzero")
    out = grad.new_empty(sizes)
    tracker.record_outputs(out, func, args, fqn)
    tracker.record_free(positions)
    return out


@kernel(aten.isin.Tensor_Tensor)
def _isin(tracker, func, args, kwargs, fqn):
    """``isin_default_kernel_gpu`` (native/cuda/TensorCompare.cu) of few test elements: all comparisons, then whether
    any holds. Of many they are sorted, which no model asks for."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    equal = tracker.record_alloc(args[0].numel() * args[1].numel(), fqn, "temporaries", "isin")
    tracker.record_temporary([(args[0].numel(), "temporaries")], fqn, "isin")
    tracker.record_free(equal)
    return out
