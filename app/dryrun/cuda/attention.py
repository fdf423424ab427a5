"""Scaled dot-product attention: which kernel runs, and what each kernel allocates."""

from __future__ import annotations

import torch

from .card_facts import Card
from .registry import kernel
from .running import running
from .temporaries import record_workspaces, tensor_bytes

aten = torch.ops.aten


def attention_case(query, key, value, mask, dropout_p: float) -> str:
    """What of a call a card is asked about when it is probed, in words."""
    size, value_size = query.shape[-1], value.shape[-1]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    words = [f"{query.dtype} heads of {size}".removeprefix("torch.")]
    words += [f"values of {value_size}"] * (size != value_size) + ["grouped"] * (key.shape[1] != query.shape[1])
    words += ["masked"] * (mask is not None) + ["dropout"] * (dropout_p > 0) + ["no gradient"] * (not grad)
    return ", ".join(words)


def attention_backend(card: Card, query, key, value, mask, dropout_p: float, is_causal: bool, gqa: bool) -> str:
    """Which of ``cudnn``, ``flash``, ``efficient`` and ``math`` runs: as a probe found the card to choose, else as the
    sources say."""
    stated = _stated_backend(card, query, key, value, mask, dropout_p, is_causal, gqa)
    if not card.measured.attention:
        return stated
    return card.measured.backend(attention_case(query, key, value, mask, dropout_p), stated)


def _stated_backend(card: Card, query, key, value, mask, dropout_p: float, is_causal: bool, gqa: bool) -> str:
    """Which of them PyTorch runs: ``select_sdp_backend`` in
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, with the filters of ``can_use_*_attention``."""
    half = query.dtype == torch.float16 or query.dtype == torch.bfloat16 and card.capability >= (8, 0)
    head, value_head = query.shape[-1], value.shape[-1]
    same_heads = key.shape[1] == value.shape[1] == query.shape[1]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    # check_last_dim_stride_equals_1_dense: the mask's too
    strides = all(t.stride(-1) == 1 for t in (query, key, value, *([] if mask is None else [mask])))
    if not strides or query.dtype != key.dtype or query.dtype != value.dtype:
        return "math"
    grouped = same_heads or (gqa and query.shape[1] % key.shape[1] == 0)
    if (
        card.prefers_cudnn_attention
        and half
        and grouped
        and key.shape[-2] != 1
        and head % 8 == 0
        and value_head % 8 == 0
        and _cudnn_takes_heads(card, head, value_head)
        and not (mask is not None and mask.requires_grad)
    ):
        return "cudnn"
    square = not is_causal or query.shape[-2] == key.shape[-2]
    refused = grad and card.capability in ((8, 6), (8, 9), (12, 0), (12, 1))
    refused = refused and (192 < head <= 224 or head > 224 and dropout_p > 0)
    if half and card.capability >= (8, 0) and mask is None and head == value_head <= 256 and grouped and square:
        if not refused:
            return "flash"
    # minimum_gemm_alignment: 16 bytes with tensor cores. Grouped heads came with torch 2.14 (PR #191085). Before sm80
    # less_than_sm80_mem_efficient_dtypes are half and float.
    alignment = (8 if half else 4) if card.capability >= (8, 0) or half else 1
    if (half or query.dtype == torch.float32) and same_heads and head % alignment == 0 and value_head % alignment == 0:
        return "efficient"
    return "math"


def _cudnn_takes_heads(card: Card, head: int, value_head: int) -> bool:
    """``check_cudnn_tensor_shapes``: up to 128, on sm90 up to 256 (measured on an H100: heads of 256 run cuDNN), 192
    with values of 128 on sm100."""
    limit = 256 if card.capability == (9, 0) else 128
    return (head <= limit and value_head <= limit) or (head == 192 and value_head == 128)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    """``scaled_dot_product_attention`` as the card in use would run it (attention.cpp, the same name)."""
    backend = "math"
    if query.dim() == 4:
        backend = attention_backend(running.card, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # convert_boolean_attn_mask (attention.cpp): where(mask, 0, -inf) in the query's dtype, two scalars beside it
        scalars = [torch.scalar_tensor(x, dtype=query.dtype, device="meta") for x in (0.0, float("-inf"))]
        attn_mask = torch.where(attn_mask, *scalars)
        del scalars
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if backend == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, attn_mask, grad, dropout_p, is_causal, False, scale=scale
        )[0]
    if backend == "flash":
        size = query.shape[-1]
        if size % 8:
            scale = size**-0.5 if scale is None else scale
            query, key, value = (torch.nn.functional.pad(t, (0, 8 - size % 8)) for t in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :size] if size % 8 else out
    if backend == "efficient":
        if attn_mask is not None:
            attn_mask = _align_bias(attn_mask, query, key)
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


def _align_bias(bias, query, key):
    """``preprocess_mask``: a last dimension that is no multiple of 8 is copied into one that is."""
    length = bias.shape[-1]
    if length % 8:
        bias = torch.nn.functional.pad(bias, (0, 8 - length % 8))[..., :length]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


@kernel(aten._scaled_dot_product_efficient_attention.default)
def _efficient_forward(tracker, func, args, kwargs, fqn):
    """``_efficient_attention_forward`` (transformers/cuda/attention.cu): seed and offset lie on the host, unless a CUDA
    graph is captured ("Note [Seed and Offset Device]"). Measured: neither is in the card's history."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out[:2], func, args, fqn)
    return out


@kernel(aten._scaled_dot_product_cudnn_attention.default)
def _cudnn_forward(tracker, func, args, kwargs, fqn):
    """``run_cudnn_SDP_fprop`` (native/cudnn/MHA.cpp). Measured: a workspace of 256 bytes; the logsumexp is made where
    a gradient asks for it."""
    out = func(*args, **kwargs)
    for tensor in (out[6], out[7], out[0], *([out[1]] if args[4] else [])):  # the seed and the offset come first
        tracker.record_outputs(tensor, func, args, fqn)
    tracker.record_temporary([(256, "kernel_workspace")], fqn, "run_cudnn_SDP_fprop")
    return out


@kernel(aten._scaled_dot_product_cudnn_attention_backward.default)
def _cudnn_backward(tracker, func, args, kwargs, fqn):
    """``run_cudnn_SDP_bprop``: dQ in fp32, one fp32 a row, and with fewer key heads dK and dV of every query head.

    cudnn-frontend node/scaled_dot_product_flash_attention.h (dQ_accum, softmax_sum). Measured to the byte:
    b1 s512 32 heads of 64, 8 key heads: 8454400; b2 s1024 16 of 128, all key heads: 16908544; b4 s512 32 of 64, 4 key
    heads: 33816832; b4 s1024 12 of 64: 12779776.
    """
    query, key = args[1], args[2]
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    batch, heads, length, size = query.shape
    workspace = query.numel() * 4 + batch * heads * length * 4 + 256
    if key.shape[1] != heads:
        workspace += 2 * batch * heads * key.shape[2] * size * query.element_size()
    record_workspaces(tracker, [workspace], fqn, "run_cudnn_SDP_bprop")
    return out


@kernel(aten._scaled_dot_product_flash_attention_backward.default)
def _flash_backward(tracker, func, args, kwargs, fqn):
    """``mha_bwd`` (native/transformers/cuda/flash_attn/flash_api.cpp): softmax_d, dq_accum, dk and dv expanded."""
    query, key = args[1], args[2]
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
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
    """``_efficient_attention_backward`` (attention_backward.cu): ``delta``, computed outside for fp32, and a workspace.

    Measured on an H100: bf16 b2 16 heads s512 of 64 takes 4198400, fp32 b1 4 heads s1024 of 256 takes 4196352.
    """
    query, key = args[1], args[2]
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    batch, heads, length, size = query.shape
    rows = batch * heads * length * 4
    if query.dtype == torch.float32:
        # kKernelComputesDelta is for half; (grad_out * out).sum(-1).transpose(-2, -1).contiguous() is one expression,
        # whose temporaries live to its end. Measured event for event with 12 heads; with one the last copies nothing.
        temporaries = [tracker.record_alloc(tensor_bytes(query), fqn, "temporaries", "delta")]
        if heads > 1:
            temporaries.append(tracker.record_alloc(rows, fqn, "temporaries", "delta"))
        delta = tracker.record_alloc(rows, fqn, "kernel_workspace", "delta")
        for taken in reversed(temporaries):
            tracker.record_free(taken)
    else:
        delta = tracker.record_alloc(rows, fqn, "kernel_workspace", "delta")
    size = efficient_workspace(tracker.card, query, key)
    size = tracker.card.measured.size("_efficient_attention_backward", size)
    workspace = tracker.record_alloc(size, fqn, "kernel_workspace", "_efficient_attention_backward")
    tracker.record_free(delta)
    tracker.record_free(workspace)
    return out


def efficient_workspace(card: Card, query, key) -> int:
    """``Params::workspace_size`` of mem_eff_attention/kernel_backward.h, for the kernel that
    kernels/cutlassB.h names first for this head size. Bytes."""
    batch, heads, length, size = query.shape
    half = query.dtype != torch.float32
    small_memory = card.capability in ((8, 6), (8, 9), (12, 0), (12, 1))
    if size <= 64:
        rows, columns, largest = 64, 64, 64
    elif size <= 128:
        rows, columns, largest = (128, 128, 128) if half and not small_memory else (64 if half else 128, 64, 128)
    else:
        rows, columns, largest = (64 if small_memory else 128), 64, 65536
    tiles = -(-length // rows) * -(-size // columns)
    elements = tiles * (4 + rows * columns)  # a lock, a counter, padding, and the tile
    if half and largest > rows:  # not kOutputInRF: gK and gV are summed in fp32 too
        splits = torch.sym_max(1, torch.sym_min(-(-key.shape[2] // columns), 200 // (batch * heads)))
        elements += 2 * splits * columns * (-(-size // rows) * rows)
    return batch * heads * -(-elements // 4) * 4 * 4
