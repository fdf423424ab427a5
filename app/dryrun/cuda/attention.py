"""Scaled dot-product attention: which kernel runs, and what each kernel allocates.

Shapes: a query is [B, H, S, D], a key [B, K, T, D], a value [B, K, T, V]. B batch, H query heads, K key heads (fewer
than H in grouped attention), S query length, T key length, D and V head sizes of keys and values.
"""

from __future__ import annotations

import torch

from .card_facts import Card
from .registry import kernel
from .running import running
from .temporaries import record_workspaces, run_and_record, tensor_bytes

aten = torch.ops.aten

SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities whose multiprocessors have about 100 KiB of shared memory: GeForce and workstation cards."""


# --- which kernel runs --------------------------------------------------------------------------------------


def attention_case(query, key, value, mask, dropout_p: float) -> str:
    """What distinguishes one call of attention from another, in words. A probe asks the card once for each case."""
    size, value_size = query.shape[-1], value.shape[-1]
    words = [f"{query.dtype} heads of {size}".removeprefix("torch.")]
    words += [f"values of {value_size}"] * (size != value_size) + ["grouped"] * (key.shape[1] != query.shape[1])
    words += ["masked"] * (mask is not None) + ["dropout"] * (dropout_p > 0)
    words += ["no gradient"] * (not _needs_grad(query, key, value))
    return ", ".join(words)


def attention_backend(card: Card, query, key, value, mask, dropout_p: float, is_causal: bool, gqa: bool) -> str:
    """The attention kernel that PyTorch chooses: ``cudnn``, ``flash``, ``efficient`` or ``math``.

    What a probe measured on the card comes before what the sources say.
    """
    stated = _stated_backend(card, query, key, value, mask, dropout_p, is_causal, gqa)
    if not card.measured.attention:
        return stated
    return card.measured.backend(attention_case(query, key, value, mask, dropout_p), stated)


def _stated_backend(card: Card, query, key, value, mask, dropout_p: float, is_causal: bool, gqa: bool) -> str:
    """The attention kernel that the sources choose: the first of cuDNN, flash and efficient that accepts the call.

    ``check_last_dim_stride_equals_1_dense`` applies to the mask too.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
    ``select_sdp_backend`` and the filters of ``can_use_*_attention``.
    """
    dense = all(t.stride(-1) == 1 for t in (query, key, value, *([] if mask is None else [mask])))
    if not dense or query.dtype != key.dtype or query.dtype != value.dtype:
        return "math"
    same_heads = key.shape[1] == value.shape[1] == query.shape[1]
    grouped = same_heads or (gqa and query.shape[1] % key.shape[1] == 0)
    if grouped and _cudnn_accepts(card, query, key, value, mask):
        return "cudnn"
    square = not is_causal or query.shape[-2] == key.shape[-2]
    if grouped and square and mask is None and _flash_accepts(card, query, key, value, dropout_p):
        return "flash"
    # Grouped heads came with torch 2.14 (PR #191085).
    return "efficient" if same_heads and _efficient_accepts(card, query, value) else "math"


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _is_half(card: Card, dtype: torch.dtype) -> bool:
    """Whether the fused kernels take ``dtype`` as a 16-bit type: bfloat16 from sm80 on only."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and card.capability >= (8, 0))


def _cudnn_accepts(card: Card, query, key, value, mask) -> bool:
    size, value_size = query.shape[-1], value.shape[-1]
    return (
        card.prefers_cudnn_attention
        and _is_half(card, query.dtype)
        and key.shape[-2] != 1
        and size % 8 == 0
        and value_size % 8 == 0
        and _cudnn_takes_heads(card, size, value_size)
        and not (mask is not None and mask.requires_grad)
    )


def _cudnn_takes_heads(card: Card, size: int, value_size: int) -> bool:
    """Whether cuDNN has kernels for these head sizes: up to 128, on sm90 up to 256; 192 with values of 128 on sm100.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
    ``check_cudnn_tensor_shapes``.
    Confirmed: H100, heads of 256 run cuDNN.
    """
    limit = 256 if card.capability == (9, 0) else 128
    return (size <= limit and value_size <= limit) or (size == 192 and value_size == 128)


def _flash_accepts(card: Card, query, key, value, dropout_p: float) -> bool:
    """Whether flash attention takes the call: 16 bit, sm80 and later, heads up to 256.

    With gradients, cards of small shared memory refuse heads over 192 (over 224 with dropout only).
    """
    size, value_size = query.shape[-1], value.shape[-1]
    if not (_is_half(card, query.dtype) and card.capability >= (8, 0) and size == value_size <= 256):
        return False
    if _needs_grad(query, key, value) and card.capability in SMALL_SHARED_MEMORY:
        return not (192 < size <= 224 or (size > 224 and dropout_p > 0))
    return True


def _efficient_accepts(card: Card, query, value) -> bool:
    """Whether memory-efficient attention takes the call: heads in multiples of 16 bytes where tensor cores are used.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
    ``minimum_gemm_alignment``, and ``less_than_sm80_mem_efficient_dtypes``: half and float before sm80.
    """
    half = _is_half(card, query.dtype)
    alignment = (8 if half else 4) if card.capability >= (8, 0) or half else 1
    return (
        (half or query.dtype == torch.float32) and query.shape[-1] % alignment == 0 and value.shape[-1] % alignment == 0
    )


# --- the composite operator ---------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    """``torch.nn.functional.scaled_dot_product_attention`` as the card of the running trace runs it.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/attention.cpp
    the function of the same name.
    """
    backend = "math"
    if query.dim() == 4:
        backend = attention_backend(running.card, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _float_mask(attn_mask, query.dtype)
    grad = _needs_grad(query, key, value)
    if backend == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, attn_mask, grad, dropout_p, is_causal, False, scale=scale
        )[0]
    if backend == "flash":
        return _flash_attention(query, key, value, dropout_p, is_causal, scale)
    if backend == "efficient":
        if attn_mask is not None:
            attn_mask = _align_mask(attn_mask, query, key)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale
        )[0]
    running.in_math_attention = True
    try:
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
    finally:
        running.in_math_attention = False


def _float_mask(mask, dtype: torch.dtype):
    """``where(mask, 0, -inf)`` in ``dtype``, with two scalars beside it: ``convert_boolean_attn_mask``."""
    scalars = [torch.scalar_tensor(x, dtype=dtype, device="meta") for x in (0.0, float("-inf"))]
    return torch.where(mask, *scalars)


def _flash_attention(query, key, value, dropout_p: float, is_causal: bool, scale: float | None):
    """Flash attention: heads that are no multiple of 8 are padded, and the output is a slice."""
    size = query.shape[-1]
    if size % 8:
        scale = size**-0.5 if scale is None else scale
        query, key, value = (torch.nn.functional.pad(t, (0, 8 - size % 8)) for t in (query, key, value))
    out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return out[..., :size] if size % 8 else out


def _align_mask(mask, query, key):
    """``preprocess_mask``: a mask whose last dimension is no multiple of 8 is copied into one that is."""
    length = mask.shape[-1]
    if length % 8:
        mask = torch.nn.functional.pad(mask, (0, 8 - length % 8))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


# --- what the kernels allocate ------------------------------------------------------------------------------


@kernel(aten._scaled_dot_product_efficient_attention.default)
def _efficient_forward(tracker, func, args, kwargs, fqn):
    """Memory-efficient attention, forward. Seed and offset of dropout are on the host, not on the card.

    They are on the card only while a CUDA graph is captured ("Note [Seed and Offset Device]").

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/cuda/attention.cu
    ``_efficient_attention_forward``.
    Confirmed: neither is in the card's allocation history.
    """
    out = func(*args, **kwargs)
    tracker.record_outputs(out[:2], func, args, fqn)
    return out


@kernel(aten._scaled_dot_product_cudnn_attention.default)
def _cudnn_forward(tracker, func, args, kwargs, fqn):
    """cuDNN's attention, forward: a workspace of 256 bytes. The logsumexp is made where a gradient needs it.

    Seed and offset are allocated before the output.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cudnn/MHA.cpp
    ``run_cudnn_SDP_fprop``.
    Confirmed: in the card's allocation history.
    """
    out = func(*args, **kwargs)
    output, logsumexp, seed, offset = out[0], out[1], out[6], out[7]
    for tensor in (seed, offset, output, *([logsumexp] if args[4] else [])):
        tracker.record_outputs(tensor, func, args, fqn)
    tracker.record_temporary([(256, "kernel_workspace")], fqn, "run_cudnn_SDP_fprop")
    return out


@kernel(aten._scaled_dot_product_cudnn_attention_backward.default)
def _cudnn_backward(tracker, func, args, kwargs, fqn):
    """cuDNN's attention, backward: a workspace with dQ in fp32 and one fp32 number a row.

    With fewer key heads than query heads, also dK and dV of every query head.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cudnn/MHA.cpp
    ``run_cudnn_SDP_bprop``; cudnn-frontend, node/scaled_dot_product_flash_attention.h (``dQ_accum``, ``softmax_sum``).
    Confirmed: to the byte. B1 S512 H32 D64 K8: 8454400; B2 S1024 H16 D128 K16: 16908544; B4 S512 H32 D64 K4: 33816832;
    B4 S1024 H12 D64 K12: 12779776.
    """
    query, key = args[1], args[2]
    out = run_and_record(tracker, func, args, kwargs, fqn)
    batch, heads, length, size = query.shape
    workspace = query.numel() * 4 + batch * heads * length * 4 + 256
    if key.shape[1] != heads:
        workspace += 2 * batch * heads * key.shape[2] * size * query.element_size()
    record_workspaces(tracker, [workspace], fqn, "run_cudnn_SDP_bprop")
    return out


@kernel(aten._scaled_dot_product_flash_attention_backward.default)
def _flash_backward(tracker, func, args, kwargs, fqn):
    """Flash attention, backward: ``softmax_d``, ``dq_accum`` and, in grouped attention, expanded dK and dV.

    Source:
    https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp
    ``mha_bwd``.
    """
    query, key = args[1], args[2]
    out = run_and_record(tracker, func, args, kwargs, fqn)
    batch, heads, length, size = query.shape
    rows = -(-length // 128) * 128
    columns = -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64
    sizes = [batch * heads * rows * 4, batch * rows * heads * columns * 4]
    if key.shape[1] != heads:
        sizes += [batch * key.shape[2] * heads * size * query.element_size()] * 2
    record_workspaces(tracker, sizes, fqn, "mha_bwd")
    return out


@kernel(aten._scaled_dot_product_efficient_attention_backward.default)
def _efficient_backward(tracker, func, args, kwargs, fqn):
    """Memory-efficient attention, backward: ``delta`` and a workspace (:func:`efficient_workspace`).

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/cuda/attention_backward.cu
    ``_efficient_attention_backward``.
    Confirmed: H100, bf16 B2 H16 S512 D64 takes 4198400 bytes, fp32 B1 H4 S1024 D256 takes 4196352.
    """
    query, key = args[1], args[2]
    out = run_and_record(tracker, func, args, kwargs, fqn)
    delta = _record_delta(tracker, query, fqn)
    op = "_efficient_attention_backward"
    size = tracker.card.measured.size(op, efficient_workspace(tracker.card, query, key))
    workspace = tracker.record_alloc(size, fqn, "kernel_workspace", op)
    tracker.record_free(delta)
    tracker.record_free(workspace)
    return out


def _record_delta(tracker, query, fqn: str) -> int:
    """The allocation of ``delta``, one fp32 number for each row of the query.

    The kernels of 16-bit types compute it themselves. For fp32 PyTorch computes
    ``(grad_out * out).sum(-1).transpose(-2, -1).contiguous()`` before: one C++ expression, whose temporaries live to
    its end.

    Source:
    https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h#L271
    ``kKernelComputesDelta``.
    Confirmed: event for event with 12 heads. With one head the last step copies nothing.
    """
    batch, heads, length, _ = query.shape
    rows = batch * heads * length * 4
    if query.dtype != torch.float32:
        return tracker.record_alloc(rows, fqn, "kernel_workspace", "delta")
    temporaries = [tracker.record_alloc(tensor_bytes(query), fqn, "temporaries", "delta")]
    if heads > 1:
        temporaries.append(tracker.record_alloc(rows, fqn, "temporaries", "delta"))
    delta = tracker.record_alloc(rows, fqn, "kernel_workspace", "delta")
    for key in reversed(temporaries):
        tracker.record_free(key)
    return delta


def efficient_workspace(card: Card, query, key) -> int:
    """Bytes of the workspace of memory-efficient attention's backward.

    It holds a tile of dQ for each block of the query, and sums of dK and dV in fp32 where the output does not stay in
    registers (``kOutputInRF``). ``rows`` and ``columns`` are the kernel's block sizes (I and J), ``largest`` is the
    largest head that it takes: those of the first kernel that kernels/cutlassB.h names for this head size.

    Source:
    https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h#L886
    ``Params::workspace_size``.
    Confirmed: see :func:`_efficient_backward`.
    """
    batch, heads, length, size = query.shape
    half = query.dtype != torch.float32
    small = card.capability in SMALL_SHARED_MEMORY
    if size <= 64:
        rows, columns, largest = 64, 64, 64
    elif size <= 128:
        rows, columns, largest = (128, 128, 128) if half and not small else (64 if half else 128, 64, 128)
    else:
        rows, columns, largest = (64 if small else 128), 64, 65536
    tiles = -(-length // rows) * -(-size // columns)
    elements = tiles * (4 + rows * columns)  # a lock, a counter, padding, and the tile
    if half and largest > rows:  # not kOutputInRF
        splits = torch.sym_max(1, torch.sym_min(-(-key.shape[2] // columns), 200 // (batch * heads)))
        elements += 2 * splits * columns * (-(-size // rows) * rows)
    return batch * heads * -(-elements // 4) * 4 * 4
