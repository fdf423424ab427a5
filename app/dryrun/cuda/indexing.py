"""Indexing, masks and embeddings.

The values of a mask are unknown on the meta device, unless :mod:`vramplan.dryrun.known_values` has them. An unknown
mask is assumed all-true, as for labels none of which is ignored.
"""

from __future__ import annotations

import math

import torch

from .registry import kernel
from .temporaries import record_contiguous_copies, run_and_record

aten = torch.ops.aten

SORTED_FROM = 3072
"""Indices up to which one kernel adds an embedding's gradient. More indices are sorted first."""
ROWS_PER_THREAD = 10
"""``NROWS_PER_THREAD`` of EmbeddingBackwardKernel.cu."""
INT64 = 8
"""Bytes of an index."""


@kernel(aten.embedding_dense_backward.default)
def _embedding_backward(tracker, func, args, kwargs, fqn):
    """The gradient of an embedding. Up to 3072 indices, one kernel adds into the zeroed gradient.

    More indices are sorted first: ``sorted_indices``, ``orig_indices`` and what they are sorted from, all int64. Then
    ``embedding_backward_cuda_kernel`` allocates where segments of equal indices start, and ``grad_weight_per_segment``
    in fp32, with a row for each of at most numel / NROWS_PER_THREAD + min(numel, num_weights) partial segments.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/Embedding.cu
    ``embedding_dense_backward_cuda``;
    https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu
    Confirmed: H100 and H200, 4505 rows of 768 for 4096 indices, 2617 rows of 1024 for 3136 indices into 2304. cub's
    own storage, under 100 KiB, is left out.
    """
    grad, count = args[0], args[1].numel()
    if count <= SORTED_FROM:
        return run_and_record(tracker, func, args, kwargs, fqn)
    keys = [tracker.record_alloc(INT64 * count, fqn, "kernel_workspace", "embedding_sort") for _ in range(2)]
    tracker.record_temporary([(INT64 * count, "kernel_workspace")], fqn, "arange")
    out = run_and_record(tracker, func, args, kwargs, fqn)
    op = "embedding_backward_cuda_kernel"
    keys.append(tracker.record_alloc(INT64 * count, fqn, "kernel_workspace", op))
    tracker.record_temporary([(INT64 * count, "kernel_workspace")], fqn, "unique_by_key")
    segments = torch.sym_min(count, args[2])
    rows = count // ROWS_PER_THREAD + segments
    sizes = [INT64 * segments, INT64 * segments, INT64 * rows, rows * grad.shape[-1] * 4]
    tracker.record_temporary([(size, "kernel_workspace") for size in sizes], fqn, op)
    for key in keys:
        tracker.record_free(key)
    return out


@kernel(aten.index.Tensor)
def _index(tracker, func, args, kwargs, fqn):
    """Indexing. A boolean mask is turned into positions first (``nonzero``); the output has one row for each.

    A mask of ``tracker.shifted`` elements selects ``tracker.labelled`` rows: TRL's collator ignores the first label of
    each packed sequence. Any other mask is assumed all-true.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/Nonzero.cu
    ``nonzero_cuda``; https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py#L87
    ``DataCollatorForLanguageModeling``.
    Confirmed: H200, 248 of 255 labels are left of eight packed sequences of 32.
    """
    source, indices = args
    mask = indices[0] if indices else None
    if mask is None or mask.dtype != torch.bool or source.device.type != "meta":
        return run_and_record(tracker, func, args, kwargs, fqn)
    rows = tracker.labelled if tracker.labelled and mask.numel() == tracker.shifted else mask.numel()
    positions = tracker.record_alloc(INT64 * rows * mask.dim(), fqn, "temporaries", "nonzero")
    out = source.new_empty((rows, *source.shape[mask.dim() :]))
    tracker.record_outputs(out, func, args, fqn)
    tracker.record_free(positions)
    return out


@kernel(aten.nonzero.default)
def _nonzero(tracker, func, args, kwargs, fqn):
    """``nonzero`` of a condition that is assumed all-true."""
    if args[0].device.type != "meta":
        return func(*args, **kwargs)
    out = torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device="meta")
    tracker.record_outputs(out, func, args, fqn)
    return out


@kernel(aten.masked_scatter.default)
def _masked_scatter(tracker, func, args, kwargs, fqn):
    """``masked_scatter``: an int64 prefix sum as large as the output, and a contiguous copy of an expanded mask.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/IndexKernel.cpp
    ``masked_scatter__cuda``.
    Confirmed: H200, freed in the opposite order.
    """
    out = run_and_record(tracker, func, args, kwargs, fqn)
    whole = args[1].shape == out.shape and args[1].is_contiguous()
    sizes = [INT64 * out.numel(), *([] if whole else [out.numel()])]
    keys = [tracker.record_alloc(size, fqn, "kernel_workspace", "masked_scatter__cuda") for size in sizes]
    for key in reversed(keys):
        tracker.record_free(key)
    return out


@kernel(aten.masked_scatter_backward.default)
def _masked_scatter_backward(tracker, func, args, kwargs, fqn):
    """``masked_scatter``, backward: ``grad.masked_select(mask)``, that is a contiguous mask, its positions, a gather.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/TensorAdvancedIndexing.cpp
    ``masked_scatter_backward_symint``.
    """
    grad, mask, sizes = args
    count = math.prod(sizes)
    with record_contiguous_copies(tracker, [mask.expand(grad.shape)], fqn, "contiguous"):
        positions = tracker.record_alloc(INT64 * grad.dim() * count, fqn, "temporaries", "nonzero")
    out = grad.new_empty(sizes)
    tracker.record_outputs(out, func, args, fqn)
    tracker.record_free(positions)
    return out


@kernel(aten.isin.Tensor_Tensor)
def _isin(tracker, func, args, kwargs, fqn):
    """``isin`` of few test elements: every comparison, one byte each, then whether any of them holds.

    Many test elements are sorted instead; no model asks for that.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/TensorCompare.cu
    ``isin_default_kernel_gpu``.
    """
    out = run_and_record(tracker, func, args, kwargs, fqn)
    equal = tracker.record_alloc(args[0].numel() * args[1].numel(), fqn, "temporaries", "isin")
    tracker.record_temporary([(args[0].numel(), "temporaries")], fqn, "isin")
    tracker.record_free(equal)
    return out
