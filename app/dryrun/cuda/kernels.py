"""What CUDA does that the meta device does not show: one place a fact, each with its source and its measurement.

A kernel's own temporaries are entered as taken and given back within the call; a workspace that stays is entered once.
"measured" refers to allocation histories (``torch.cuda.memory._record_memory_history``) taken on an H100 and an H200
with torch 2.11.0+cu130 and cuDNN 9.19, the stack of the measured rows.
"""

from __future__ import annotations

import functools
import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from ...memory.kernel_facts import KernelFacts
from ..symbols import called, sym_predicate

aten = torch.ops.aten

HOST_READS: dict[str, bool | str] = {
    # transformers/masking_utils.py: "is every sequence one sequence?"
    "find_packed_sequence_indices": "single",
    # "does the mask hide nothing?"
    "_ignore_causal_mask_sdpa": "full",
    "_ignore_bidirectional_mask_sdpa": "full",
    "create_recurrent_attention_mask": "full",
    "flash_attention_mask": "full",
    "fast_all": "full",
    # transformers/modeling_utils.py: "does a sequence begin or end with padding?" Then it would only warn.
    "PreTrainedModel.warn_if_padding_and_no_attention_mask": False,
    # transformers/generation/utils.py: "is a special token negative, is the mask of the wrong kind?"
    "GenerationMixin._prepare_special_tokens": False,
    "GenerationMixin.generate": False,
    # torch/amp/grad_scaler.py: "is a gradient infinite?" Then the step would be left out.
    "GradScaler._maybe_opt_step": False,
    # "has every sequence ended?" Not before the length that was asked for: new tokens are a minimum too.
    "StopCheck.__call__": "generated",
    # transformers/modeling_rope_utils.py: the largest position, plus one
    "dynamic_rope_update.<locals>.longrope_frequency_update": "length",
}
"""Functions that read a tensor's value on the host, by qualified name, and what they are told: a value, or what the
job says of it."""


@dataclass(frozen=True)
class Card:
    """The facts of a GPU that change what PyTorch allocates.

    ``capability`` is the CUDA compute capability, ``multiprocessors`` their number (or a symbol for it), ``cudnn`` the
    version of the cuDNN that PyTorch runs with (``torch.backends.cudnn.version()``). ``measured`` is what a probe of
    the card found other than what is stated here.
    """

    capability: tuple[int, int] = (9, 0)
    multiprocessors: int | torch.SymInt = 132
    measured: KernelFacts = KernelFacts()
    cudnn: int = 91900

    @property
    def cublas_workspace(self) -> int:
        """Bytes of cuBLAS's workspace, one per thread that multiplies (the loop's, and autograd's in backward).

        ``aten/src/ATen/cuda/CublasHandlePool.cpp``, ``parseChosenWorkspaceSize``: ``:4096:2:16:8`` is the default,
        ``:32768`` KiB from Hopper on. Measured on H100 and H200: 33554432 in forward and again in backward.
        """
        stated = 32 << 20 if self.capability >= (9, 0) else (4096 * 2 + 16 * 8) << 10
        return self.measured.size("cublas_workspace", stated)

    @property
    def cublaslt_workspace(self) -> int:
        """Bytes of the workspace of ``gemm_and_bias`` (cuBLASLt), shared with cuBLAS's.

        ``getCUDABlasLtWorkspaceSize``. Measured on an H100: the first linear with a bias takes 1 MiB more.
        """
        return self.measured.size("cublaslt_workspace", 1 << 20)

    @property
    def prefers_cudnn_attention(self) -> bool:
        """``check_prefer_cudnn_attention`` (transformers/cuda/sdp_utils.cpp): sm90 and sm100, cuDNN > 9.15.0."""
        return self.capability in ((9, 0), (10, 0), (10, 3)) and self.cudnn > 91500


MEASURABLE = (
    "cublas_workspace",
    "cublaslt_workspace",
    "run_cudnn_SDP_bprop",
    "mha_bwd",
    "_efficient_attention_backward",
    "gpu_reduce_kernel",
    "_foreach_norm",
)
"""The operators whose workspaces are asked of ``Card.measured``."""

card_in_use = Card()
_in_math_attention = False


# --- attention ----------------------------------------------------------------------------------------------


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


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """``scaled_dot_product_attention`` as the card in use would run it (attention.cpp, the same name)."""
    backend = "math"
    if query.dim() == 4:
        backend = attention_backend(card_in_use, query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
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
    global _in_math_attention
    _in_math_attention = True
    try:
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
    finally:
        _in_math_attention = False


def _align_bias(bias, query, key):
    """``preprocess_mask``: a last dimension that is no multiple of 8 is copied into one that is."""
    length = bias.shape[-1]
    if length % 8:
        bias = torch.nn.functional.pad(bias, (0, 8 - length % 8))[..., :length]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _dropout(x, p, train):
    """``at::dropout`` on CUDA is ``native_dropout``: the output and a mask of one byte an element (Dropout.cpp)."""
    if train and 0 < p < 1 and x.numel():
        return torch.native_dropout(x, p, True)[0]
    if not train or p == 0:
        return x
    return x * torch.empty_like(x).fill_(0 if p == 1 else 1)


def _softmax_as(run):
    """``softmax`` and ``log_softmax`` (native/SoftMax.cpp): of fp16 into fp32 on CUDA in one kernel; anything else is
    cast first. Measured on an H200: eager attention in fp16 has one block of the scores' size less."""

    def softmax(source, dim, dtype=None):
        if source.dtype == torch.float16 and dtype == torch.float32:
            return run(source, dim, True)
        return run(source if dtype is None else source.to(dtype), dim, False)

    return softmax


_library = torch.library.Library("aten", "IMPL")
_library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
_library.impl("dropout", _dropout, "AutogradMeta")
_library.impl("softmax.int", _softmax_as(aten._softmax), "AutogradMeta")
_library.impl("log_softmax.int", _softmax_as(aten._log_softmax), "AutogradMeta")


# --- kernels that take more than their outputs --------------------------------------------------------------

KERNELS: dict = {}
"""Operator overload to ``handler(tracker, func, args, kwargs, place) -> outputs``."""


def _kernel(*overloads):
    def register(handler):
        for overload in overloads:
            KERNELS[overload] = handler
        return handler

    return register


def _bytes(tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _copied(tracker, tensors, place, op: str):
    """While a kernel runs, the copies that it makes of ``tensors``."""
    copies = [tracker.record_alloc(_bytes(t), place, "temporaries", op) for t in tensors]
    yield
    for key in copies:
        tracker.record_free(key)


def _made_contiguous(tracker, tensors, place, op: str, layout=torch.contiguous_format):
    """While a kernel runs, the copies that it makes of ``tensors`` that are not contiguous in its ``layout``."""
    return _copied(tracker, [t for t in tensors if not t.is_contiguous(memory_format=layout)], place, op)


def _temporaries(tracker, sizes: list[int], place, op: str) -> None:
    """What the kernel of ``op`` takes and gives back within its call."""
    measured = tracker.card.measured
    tracker.record_temporary([(measured.size(op, size), "kernel_workspace") for size in sizes], place, op)


def _workspace(tracker, name: str, size: int) -> None:
    thread = "backward" if tracker.in_backward else "forward"
    if (thread, name) not in tracker._workspace_threads:
        tracker._workspace_threads.add((thread, name))
        tracker.record_alloc(size, "", "kernel_workspace", name)


def _matrices_copied(args) -> list:
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


@_kernel(aten.mm.default, aten.mm.out, aten.bmm.default, aten.baddbmm.default, aten.addmm.default)
def _matmul(tracker, func, args, kwargs, place):
    """``addmm_out_cuda_impl`` (native/cuda/Blas.cpp): a vector bias goes through cuBLASLt, which has its own cache."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    with _copied(tracker, _matrices_copied(args), place, func.__name__):
        _workspace(tracker, "cublas_workspace", tracker.card.cublas_workspace)
        if func is aten.addmm.default and args[0].dim() == 1:
            _workspace(tracker, "cublaslt_workspace", tracker.card.cublaslt_workspace)
    return out


@_kernel(aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.fill_.Scalar)
def _filled(tracker, func, args, kwargs, place):
    """The value must be one of the tensor's dtype (``checked_convert``, c10/util/TypeCast.h): the meta device does not
    ask. Models that mask with the lowest number of another dtype break there."""
    value, dtype = args[-1], args[0].dtype
    if dtype.is_floating_point and isinstance(value, (int, float)) and math.isfinite(value):
        if abs(value) > torch.finfo(dtype).max:
            raise RuntimeError(f"value cannot be converted to type {dtype} without overflow")
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    return out


@_kernel(aten.add.Tensor)
def _add(tracker, func, args, kwargs, place):
    """The autograd engine adds a second gradient into the first one in place where nobody else holds it.

    ``InputBuffer::accumulate`` (torch/csrc/autograd/input_buffer.cpp) asks for the last reference to tensor and
    storage; under a dispatch mode it never does so itself (``isTensorSubclassLike``). Here the tensor is held by the
    buffer, twice on the way to Python, and by its Python object; the storage by the tensor and its Python object.
    """
    if _in_math_attention:  # ``attn.add_(*attn_mask)``, which only tensor subclasses and modes turn into ``add``
        return args[0].add_(args[1])
    if tracker.in_backward and not tracker.in_module and not kwargs and len(args) == 2:
        first, second = args
        if (
            isinstance(second, torch.Tensor)
            and first.shape == second.shape
            and first.dtype == second.dtype
            and first._use_count() == 4
            and torch._C._storage_Use_Count(first.untyped_storage()._cdata) == 2
        ):
            return first.add_(second)
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    return out


@_kernel(aten._safe_softmax.default)
def _safe_softmax(tracker, func, args, kwargs, place):
    """``_safe_softmax`` (native/transformers/attention.cpp): which rows are hidden whole, then the softmax in place.

    Measured on an H100 after the softmax's output: one byte an element, one a row, and a scalar.
    """
    out = func(*args, **kwargs) if len(args) > 2 or kwargs else aten._softmax.default(*args, False)
    tracker.record_outputs(out, func, args, place)
    hidden = [out.numel(), out.numel() // out.shape[-1], 4]
    keys = [tracker.record_alloc(size, place, "temporaries", "_safe_softmax") for size in hidden]
    for key in reversed(keys):
        tracker.record_free(key)
    return out


@_kernel(aten._softmax_backward_data.default)
def _softmax_backward(tracker, func, args, kwargs, place):
    """``softmax_backward_cuda_out`` (native/cuda/SoftMax.cu): ``tmp = grad * output``, as large as the gradient.

    Measured on an H100 with eager attention: one more block of the probabilities' size within the call.
    """
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    tracker.record_temporary([(_bytes(args[0]), "temporaries")], place, "softmax_backward_cuda_out")
    return out


@_kernel(aten.native_dropout.default)
def _native_dropout(tracker, func, args, kwargs, place):
    """``dropout_cuda`` (native/cuda/Dropout.cu): the mask is made before the output. Measured in every history."""
    out, mask = func(*args, **kwargs)
    tracker.record_outputs(mask, func, args, place)
    tracker.record_outputs(out, func, args, place)
    return out, mask


@_kernel(aten._amp_update_scale_.default)
def _update_scale(tracker, func, args, kwargs, place):
    """``_amp_update_scale_cuda_`` (native/cuda/AmpKernels.cu) writes where it was told; it has no meta kernel."""
    return args[0]


@_kernel(aten.native_layer_norm.default)
def _layer_norm(tracker, func, args, kwargs, place):
    """``layer_norm_cuda`` (native/cuda/layer_norm_kernel.cu): ``expect_contiguous`` of the input. Measured on an H100:
    a copy within every call of an encoder whose states come transposed from a convolution. It makes a contiguous
    output, and mean and deviation of each row in the type that sums are kept in."""
    source, shape, weight = args[:3]
    with _made_contiguous(tracker, [source], place, "expect_contiguous"):
        if weight is None or tuple(weight.shape) != tuple(shape):
            out = func(*args, **kwargs)
        else:  # as PyTorch's function in Python says, which takes 0.3 ms
            rows = (*source.shape[: source.dim() - len(shape)], *(1 for _ in shape))
            kept = torch.promote_types(source.dtype, torch.float32)
            out = source.new_empty(source.shape), *(source.new_empty(rows, dtype=kept) for _ in range(2))
        tracker.record_outputs(out, func, args, place)
    return out


@_kernel(aten.native_layer_norm_backward.default)
def _layer_norm_backward(tracker, func, args, kwargs, place):
    """``layer_norm_backward_cuda`` (the same file): gradient and input are made contiguous, and all three gradients are
    (LEGACY_CONTIGUOUS_MEMORY_FORMAT), however the input lay: measured on an H200 with a tower whose states lie so,
    where nothing is copied after it."""
    grad, source, weight, bias, wanted = args[0], args[1], args[5], args[6], args[7]
    with _made_contiguous(tracker, [grad, source], place, "expect_contiguous"):
        like = (source, weight, bias)
        out = tuple(t.new_empty(t.shape) if want and t is not None else None for t, want in zip(like, wanted))
        tracker.record_outputs(out, func, args, place)
    return out


@_kernel(aten._scaled_dot_product_efficient_attention.default)
def _efficient_forward(tracker, func, args, kwargs, place):
    """``_efficient_attention_forward`` (transformers/cuda/attention.cu): seed and offset lie on the host, unless a CUDA
    graph is captured ("Note [Seed and Offset Device]"). Measured: neither is in the card's history."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out[:2], func, args, place)
    return out


@_kernel(aten._scaled_dot_product_cudnn_attention.default)
def _cudnn_forward(tracker, func, args, kwargs, place):
    """``run_cudnn_SDP_fprop`` (native/cudnn/MHA.cpp). Measured: a workspace of 256 bytes; the logsumexp is made where
    a gradient asks for it."""
    out = func(*args, **kwargs)
    for tensor in (out[6], out[7], out[0], *([out[1]] if args[4] else [])):  # the seed and the offset come first
        tracker.record_outputs(tensor, func, args, place)
    tracker.record_temporary([(256, "kernel_workspace")], place, "run_cudnn_SDP_fprop")
    return out


@_kernel(aten._scaled_dot_product_cudnn_attention_backward.default)
def _cudnn_backward(tracker, func, args, kwargs, place):
    """``run_cudnn_SDP_bprop``: dQ in fp32, one fp32 a row, and with fewer key heads dK and dV of every query head.

    cudnn-frontend node/scaled_dot_product_flash_attention.h (dQ_accum, softmax_sum). Measured to the byte:
    b1 s512 32 heads of 64, 8 key heads: 8454400; b2 s1024 16 of 128, all key heads: 16908544; b4 s512 32 of 64, 4 key
    heads: 33816832; b4 s1024 12 of 64: 12779776.
    """
    query, key = args[1], args[2]
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    batch, heads, length, size = query.shape
    workspace = query.numel() * 4 + batch * heads * length * 4 + 256
    if key.shape[1] != heads:
        workspace += 2 * batch * heads * key.shape[2] * size * query.element_size()
    _temporaries(tracker, [workspace], place, "run_cudnn_SDP_bprop")
    return out


@_kernel(aten._scaled_dot_product_flash_attention_backward.default)
def _flash_backward(tracker, func, args, kwargs, place):
    """``mha_bwd`` (native/transformers/cuda/flash_attn/flash_api.cpp): softmax_d, dq_accum, dk and dv expanded."""
    query, key = args[1], args[2]
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    batch, heads, length, size = query.shape
    rows = -(-length // 128) * 128
    columns = -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64
    sizes = [batch * heads * rows * 4, batch * rows * heads * columns * 4]
    if key.shape[1] != heads:
        sizes += [batch * key.shape[2] * heads * size * query.element_size()] * 2
    _temporaries(tracker, sizes, place, "mha_bwd")
    return out


@_kernel(aten._scaled_dot_product_efficient_attention_backward.default)
def _efficient_backward(tracker, func, args, kwargs, place):
    """``_efficient_attention_backward`` (attention_backward.cu): ``delta``, computed outside for fp32, and a workspace.

    Measured on an H100: bf16 b2 16 heads s512 of 64 takes 4198400, fp32 b1 4 heads s1024 of 256 takes 4196352.
    """
    query, key = args[1], args[2]
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    batch, heads, length, size = query.shape
    rows = batch * heads * length * 4
    if query.dtype == torch.float32:
        # kKernelComputesDelta is for half; (grad_out * out).sum(-1).transpose(-2, -1).contiguous() is one expression,
        # whose temporaries live to its end. Measured event for event with 12 heads; with one the last copies nothing.
        temporaries = [tracker.record_alloc(_bytes(query), place, "temporaries", "delta")]
        if heads > 1:
            temporaries.append(tracker.record_alloc(rows, place, "temporaries", "delta"))
        delta = tracker.record_alloc(rows, place, "kernel_workspace", "delta")
        for taken in reversed(temporaries):
            tracker.record_free(taken)
    else:
        delta = tracker.record_alloc(rows, place, "kernel_workspace", "delta")
    size = _efficient_workspace(tracker.card, query, key)
    size = tracker.card.measured.size("_efficient_attention_backward", size)
    workspace = tracker.record_alloc(size, place, "kernel_workspace", "_efficient_attention_backward")
    tracker.record_free(delta)
    tracker.record_free(workspace)
    return out


def _efficient_workspace(card: Card, query, key) -> int:
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


_IN_PLACE = {
    aten.index_put.default: aten.index_put_.default,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.index_add.default: aten.index_add_.default,
}


@_kernel(*_IN_PLACE)
def _accumulate_at(tracker, func, args, kwargs, place):
    """``index_backward``, ``gather_backward``, those of ``topk`` and ``max`` and their like
    (torch/csrc/autograd/FunctionsManual.cpp) write in place into fresh zeros; only for tensor subclasses and under
    modes do they take the out-of-place operator. What sets instead is the gradient of ``index_put_``
    (derivatives.yaml): the incoming one with zeros in a copy."""
    sets = func is aten.index_put.default and not (len(args) > 3 and args[3])
    if tracker.in_backward and not tracker.in_module and not sets:
        if func is aten.index_put.default and any(i is not None and i.dtype == torch.bool for i in args[1]):
            positions = sum(8 * i.numel() * i.dim() for i in args[1] if i is not None)
            tracker.record_temporary([(positions, "temporaries")], place, "nonzero")
            return args[0]
        return _IN_PLACE[func](*args, **kwargs)
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    return out


@_kernel(aten.embedding_dense_backward.default)
def _embedding_backward(tracker, func, args, kwargs, place):
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
        tracker.record_outputs(out, func, args, place)
        return out
    keys = [tracker.record_alloc(8 * count, place, "kernel_workspace", "embedding_sort") for _ in range(2)]
    tracker.record_temporary([(8 * count, "kernel_workspace")], place, "arange")
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    op = "embedding_backward_cuda_kernel"
    keys.append(tracker.record_alloc(8 * count, place, "kernel_workspace", op))
    tracker.record_temporary([(8 * count, "kernel_workspace")], place, "unique_by_key")
    segments = torch.sym_min(count, args[2])
    rows = count // 10 + segments
    sizes = [8 * segments, 8 * segments, 8 * rows, rows * grad.shape[-1] * 4]
    tracker.record_temporary([(size, "kernel_workspace") for size in sizes], place, op)
    for key in keys:
        tracker.record_free(key)
    return out


@_kernel(aten._foreach_norm.Scalar)
def _foreach_norm(tracker, func, args, kwargs, place):
    """``foreach_tensor_norm_cuda`` (native/cuda/ForeachReduceOp.cu): a partial result a chunk of 65536 elements, for
    every tensor as many as the largest has. Measured: 38 tensors, the largest of 136134656: 315856 bytes."""
    tensors = args[0]
    chunks = max(-(-t.numel() // 65536) for t in tensors)
    size = tracker.card.measured.size("_foreach_norm", 4 * len(tensors) * chunks)
    partial = tracker.record_alloc(size, place, "kernel_workspace", "_foreach_norm")
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, None)
    tracker.record_free(partial)
    return out


@_kernel(aten.index.Tensor)
def _index(tracker, func, args, kwargs, place):
    """``index`` by a boolean mask: ``nonzero`` first (native/cuda/Nonzero.cu), then as many rows as it is true for.

    A mask's values are unknown; here it is true everywhere, as for labels none of which is ignored, but for the first
    of each packed sequence, which TRL's collator ignores (DataCollatorForLanguageModeling; measured on an H200: 248 of
    255 are left of eight sequences of 32).
    """
    source, indices = args
    mask = indices[0] if indices else None
    if mask is None or mask.dtype != torch.bool or source.device.type != "meta":
        out = func(*args, **kwargs)
        tracker.record_outputs(out, func, args, place)
        return out
    rows = tracker.labelled if tracker.labelled and mask.numel() == tracker.shifted else mask.numel()
    positions = tracker.record_alloc(8 * rows * mask.dim(), place, "temporaries", "nonzero")
    out = source.new_empty((rows, *source.shape[mask.dim() :]))
    tracker.record_outputs(out, func, args, place)
    tracker.record_free(positions)
    return out


@_kernel(aten.nonzero.default)
def _nonzero(tracker, func, args, kwargs, place):
    """``nonzero`` of a condition that holds everywhere, as for labels none of which is ignored."""
    if args[0].device.type != "meta":
        return func(*args, **kwargs)
    out = torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device="meta")
    tracker.record_outputs(out, func, args, place)
    return out


@_kernel(aten.masked_scatter.default)
def _masked_scatter(tracker, func, args, kwargs, place):
    """``masked_scatter__cuda`` (native/cuda/IndexKernel.cpp): an int64 prefix sum as large as the output, and the
    expanded mask made contiguous, given back in the opposite order (measured on an H200)."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    whole = args[1].shape == out.shape and args[1].is_contiguous()
    sizes = [8 * out.numel(), *([] if whole else [out.numel()])]
    for key in reversed(
        [tracker.record_alloc(size, place, "kernel_workspace", "masked_scatter__cuda") for size in sizes]
    ):
        tracker.record_free(key)
    return out


@_kernel(aten.masked_scatter_backward.default)
def _masked_scatter_backward(tracker, func, args, kwargs, place):
    """``grad.masked_select(mask)`` (TensorAdvancedIndexing.cpp) by ``index``: the expanded mask, made
    contiguous, and its ``nonzero`` first."""
    grad, mask, sizes = args
    count = 1
    for size in sizes:
        count *= size
    whole = mask.expand(grad.shape)
    with _made_contiguous(tracker, [whole], place, "contiguous"):
        positions = tracker.record_alloc(8 * grad.dim() * count, place, "temporaries", "nonzero")
    out = grad.new_empty(sizes)
    tracker.record_outputs(out, func, args, place)
    tracker.record_free(positions)
    return out


@_kernel(aten._grouped_mm.default)
def _grouped_mm(tracker, func, args, kwargs, place):
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
    tracker.record_outputs(out, func, args, place)
    if a.dtype == torch.bfloat16 and tracker.card.capability in ((9, 0), (10, 0), (10, 3)):
        sizes = [64 * groups, 512 * tracker.card.multiprocessors]
        tracker.record_temporary([(size, "kernel_workspace") for size in sizes], place, "bf16bf16_grouped_mm")
    else:
        _workspace(tracker, "cublas_workspace", tracker.card.cublas_workspace)
    return out


def _layout(source, weight) -> torch.memory_format:
    """``cudnn_conv_suggest_memory_format`` (native/ConvUtils.h): channels last where input or filter lies so."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(source.dim())
    if last and any(not t.is_contiguous() and t.is_contiguous(memory_format=last) for t in (source, weight)):
        return last
    return torch.contiguous_format


TRANSFORMED = 392
"""Pixels up to which cuDNN 9.19 turns an image of three channels in bf16 into NHWC on an H200."""


@_kernel(aten.convolution.default)
def _convolution(tracker, func, args, kwargs, place):
    """``cudnn_convolution`` (native/cudnn/ConvShared.cpp) copies an input and a filter that do not lie as it computes.

    For half precision cuDNN's tensor-core kernels transform in a workspace. Measured on an H200 with cuDNN 9.19: 36
    convolutions of images of up to 384 pixels and 48 over time, to 131 bytes; [32, 3, 224, 224] by [1024, 3, 16, 16]
    takes 42729488. Of images of three channels in bf16 those of up to :data:`TRANSFORMED` pixels in height do, in 812
    cases; a filter as large as its input takes none.
    """
    source, weight = args[0], args[1]
    layout = _layout(source, weight)
    with _made_contiguous(tracker, [source], place, "contiguous", layout):
        out = func(*args, **kwargs)
        tracker.record_outputs(out, func, args, place)
        with _made_contiguous(tracker, [weight], place, "contiguous", layout):
            pass
        high = source.dim() == 4 and source.shape[1] == 3 and source.shape[2] > TRANSFORMED
        if source.dim() < 5 and out[0, 0].numel() > 1 and not (high and source.dtype == torch.bfloat16):
            _transformed(tracker, source, weight, out, args[8], place)
    return out


def _transformed(tracker, source, weight, out, groups: int, place) -> None:
    """The workspace in which cuDNN's tensor-core kernels of half precision turn NCHW into NHWC: input, filter and
    output, with their channels padded to 8; what has one element a channel lies so already."""
    half = source.dtype in (torch.float16, torch.bfloat16) and tracker.card.capability >= (8, 0)
    if groups > 1 or not half or not source.is_contiguous():
        return
    size = 16
    for tensor in (source, weight, out):
        if tensor[0, 0].numel() > 1:
            size += _bytes(tensor) // tensor.shape[1] * (-(-tensor.shape[1] // 8) * 8)
    tracker.record_temporary([(size, "kernel_workspace")], place, "run_conv_plan")


@_kernel(aten.convolution_backward.default)
def _convolution_backward(tracker, func, args, kwargs, place):
    """``convolution_backward`` (native/Convolution.cpp): cuDNN is given gradient and input as it computes; the bias
    gradient is a sum of the gradient as it came. The gradients of input and filter transform as forward does; that of
    the filter may take partial sums beside it, which are not modelled."""
    grad, source, weight, groups = args[0], args[1], args[2], args[9]
    with _made_contiguous(tracker, [grad, source], place, "contiguous", _layout(source, weight)):
        out = func(*args, **kwargs)
        for gradient in out[:2]:
            if gradient is not None:
                tracker.record_outputs(gradient, func, args, place)
                _transformed(tracker, source, weight, grad, groups, place)
    if out[2] is not None:
        tracker.record_outputs(out[2], func, args, place)
        others = [d for d in range(grad.dim()) if d != 1]
        _reduce(tracker, grad, others, 8 if grad.element_size() == 2 else 4, 4, place)
    return out


@_kernel(aten.avg_pool2d_backward.default)
def _avg_pool2d_backward(tracker, func, args, kwargs, place):
    """``avg_pool2d_backward_out_cuda`` (native/cuda/AveragePool2d.cu) makes the gradient contiguous."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    with _made_contiguous(tracker, args[:1], place, "contiguous"):
        return out


@_kernel(aten.isin.Tensor_Tensor)
def _isin(tracker, func, args, kwargs, place):
    """``isin_default_kernel_gpu`` (native/cuda/TensorCompare.cu) of few test elements: all comparisons, then whether
    any holds. Of many they are sorted, which no model asks for."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    equal = tracker.record_alloc(args[0].numel() * args[1].numel(), place, "temporaries", "isin")
    tracker.record_temporary([(args[0].numel(), "temporaries")], place, "isin")
    tracker.record_free(equal)
    return out


@_kernel(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
def _sum(tracker, func, args, kwargs, place):
    """``sum_kernel_cuda`` and ``mean_kernel_cuda`` (native/cuda/ReduceSumProdKernel.cu, ReduceMomentKernel.cu): eight
    numbers of 16 bit at a time. ``make_reduction`` (native/ReduceOpsUtils.h) casts first what is not of the result's
    dtype (a mask that is counted), but for 16 bit that are added up in fp32."""
    source, out = args[0], func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    low = source.dtype in (torch.float16, torch.bfloat16)
    cast = [] if out.dtype in (source.dtype, *[torch.float32] * low) else [source.numel() * out.element_size()]
    keys = [tracker.record_alloc(size, place, "temporaries", "make_reduction") for size in cast]
    _reduce(tracker, source, args[1] if len(args) > 1 else None, 8 if low else 4, max(4, out.element_size()), place)
    for key in keys:
        tracker.record_free(key)
    return out


@_kernel(
    aten.linalg_vector_norm.default,
    *(aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.prod.dim_int),
    *(aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default),
    *(aten.any.dim, aten.any.default, aten.all.dim, aten.all.default),
)
def _reduced(tracker, func, args, kwargs, place):
    """Other reductions (native/cuda/ReduceNormKernel.cu, ReduceMomentKernel.cu, Reduce*Kernel.cu), four elements at a
    time. What they meet in: a sum of squares, the moments of Welford's algorithm, a value and its place, a truth.
    Measured on an H200 over 4096 rows of 2048; DoRA's norm of a transposed weight of 1600 × 6400 takes 81920512."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    name, source = func.overloadpacket.__name__, args[0]
    at = 2 if name == "linalg_vector_norm" else 1
    dims = args[at] if len(args) > at else None
    size = max(4, source.element_size())
    if name in ("var", "std", "var_mean", "max", "min", "argmax", "argmin"):
        size = 16
    elif name in ("amax", "amin", "any", "all"):
        size = source.element_size()
    _reduce(tracker, source, [dims] if isinstance(dims, int) else dims, 4, size, place)
    return out


@_kernel(aten.cumsum.default, aten.cumprod.default)
def _cumulated(tracker, func, args, kwargs, place):
    """``impl_func_cum_ops`` (native/ReduceOps.cpp) casts what is not of the result's dtype. Measured on an H200."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    if out.dtype != args[0].dtype:
        tracker.record_temporary([(_bytes(out), "temporaries")], place, "impl_func_cum_ops")
    return out


@_kernel(aten.logsumexp.default)
def _logsumexp(tracker, func, args, kwargs, place):
    """``logsumexp_out_impl`` (native/ReduceOps.cpp): the maxima, then all that is left of them. Measured on an H200."""
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, place)
    sizes = [_bytes(out), args[0].numel() * out.element_size()]
    tracker.record_temporary([(size, "temporaries") for size in sizes], place, "logsumexp")
    return out


@_kernel(aten.log_sigmoid_forward.default)
def _log_sigmoid(tracker, func, args, kwargs, place):
    """``log_sigmoid_forward_cuda`` (native/cuda/ActivationLogSigmoidKernel.cu): its buffer is of no elements."""
    out = torch.empty_like(args[0])
    tracker.record_outputs(out, func, args, place)
    return out, args[0].new_empty(0)


def _reduce(tracker, source, dims: list[int] | None, unrolled: int, sum_bytes: int, place) -> None:
    """``gpu_reduce_kernel`` (native/cuda/Reduce.cuh): a reduction split over blocks meets in global memory."""
    dims = [d % source.dim() for d in dims] if dims else [*range(source.dim())]
    scratch = reduction_scratch(source, dims, tracker.card, unrolled, sum_bytes)
    if scratch > 0:
        scratch = tracker.card.measured.size("gpu_reduce_kernel", scratch)
        buffer, semaphores = (
            tracker.record_alloc(n, place, "kernel_workspace", "gpu_reduce_kernel") for n in (scratch, 512)
        )
        tracker.record_free(semaphores)
        tracker.record_free(buffer)


def reduction_scratch(source, dims: list[int], card: Card, unrolled: int, sum_bytes: int) -> int:
    """Bytes of the buffer of a reduction of ``source`` over ``dims`` (:func:`vramplan.memory.reduction.scratch`)."""
    order = [d for d in range(source.dim()) if d not in dims] + dims
    lies = [number for d in order for number in (source.shape[d], source.stride(d))]
    return called("scratch", card.multiprocessors, unrolled, sum_bytes, source.dim() - len(dims), *lies)


# --- bitsandbytes -------------------------------------------------------------------------------------------


@functools.cache
def bnb_cuda_ops():
    """``bitsandbytes.backends.cuda.ops``, for its own rules; it names one symbol that a CPU build of torch lacks."""
    missing = not hasattr(torch._C, "_cuda_getCurrentRawStream")
    if missing:
        torch._C._cuda_getCurrentRawStream = None
    try:
        import bitsandbytes.backends.cuda.ops as ops
    finally:
        if missing:
            del torch._C._cuda_getCurrentRawStream
    return ops


def gemm_4bit_is_fused(card: Card, dtype, rows: int, out_features: int, in_features: int, blocksize: int) -> bool:
    """Whether bitsandbytes multiplies packed weights directly, or dequantises them first: its own heuristic
    (backends/cuda/ops.py ``gemm_4bit`` and ``_gemm_4bit_use_custom_cuda``), asked for this card."""
    ops = bnb_cuda_ops()

    def fused(rows, multiprocessors) -> bool:
        if rows > ops._gemm_4bit_custom_max_m or in_features % blocksize:
            return False
        ops._gpu_dispatch_props = lambda index: (multiprocessors, *card.capability)
        return ops._gemm_4bit_use_custom_cuda.__wrapped__(0, dtype, rows, out_features, in_features)

    return sym_predicate(
        (dtype, out_features, in_features, blocksize, card.capability), fused, rows, card.multiprocessors
    )


def _register_bitsandbytes():
    import bitsandbytes  # noqa: F401  (registers the operators)

    bnb = torch.ops.bitsandbytes

    @_kernel(bnb.gemm_4bit.default)
    def _gemm_4bit(tracker, func, args, kwargs, place):
        """``_dequant_linear_fallback``, restated: absmax in fp32 (twice if nested), the whole weight in the input's
        dtype, then linear, which autocast casts for: bias, weight and input, in that order."""
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        a, shape, blocksize = given["A"], given["shapeB"], given["blocksize"]
        nested, bias = given.get("absmax_8bit"), given.get("bias")
        rows = a.numel() // a.shape[-1]
        if a.shape[-1] == shape[1]:
            out = a.new_empty((*a.shape[:-1], shape[0]))  # as its fake says, by a shorter way
        else:
            out = func(*args, **kwargs)  # refuses
        if gemm_4bit_is_fused(tracker.card, a.dtype, rows, shape[0], a.shape[-1], blocksize):
            tracker.record_outputs(out, func, args, place)
            return out
        sizes = [] if nested is None else [nested.numel() * 4] * 2
        sizes.append(shape[0] * shape[1] * a.element_size())
        keys = [tracker.record_alloc(size, place, "dequantized_weights", "gemm_4bit") for size in sizes]
        casts = []
        low = tracker.autocast.dtype if tracker.autocast and tracker.autocast.active else a.dtype
        if low != a.dtype:
            counts = [*([] if bias is None else [bias.numel()]), shape[0] * shape[1], a.numel()]
            casts = [tracker.record_alloc(count * low.itemsize, place, "temporaries", "linear") for count in counts]
            out = out.new_empty(out.shape, dtype=low)
        tracker.record_outputs(out, func, args, place)
        _workspace(tracker, "cublas_workspace", tracker.card.cublas_workspace)
        if bias is not None:
            _workspace(tracker, "cublaslt_workspace", tracker.card.cublaslt_workspace)
        for key in (*reversed(casts), *keys):
            tracker.record_free(key)
        return out

    @_kernel(bnb.optimizer_update_8bit_blockwise.default, bnb.optimizer_update_32bit.default)
    def _optimizer_update(tracker, func, args, kwargs, place):
        """backends/cuda/ops.py hands the number of elements over as ``c_int32``. Measured on an H200: a head of 256000
        × 12288 ends in "invalid argument"."""
        if args[1].numel() >= 1 << 31:
            raise RuntimeError(f"bitsandbytes' optimisers take tensors below 2^31 elements, not {args[1].numel()}")
        return func(*args, **kwargs)

    @_kernel(bnb.int8_vectorwise_quant.default)
    def _int8_quant(tracker, func, args, kwargs, place):
        """backends/cuda/ops.py ``int8_vectorwise_quant``: with a threshold, ``A.abs()`` and a mask to look for
        outliers. How many there are depends on the values; here none, as for weights of a usual scale."""
        a = args[0]
        stats = torch.empty(a.numel() // a.shape[-1], dtype=torch.float32, device="meta")
        out = torch.empty(a.shape, dtype=torch.int8, device="meta")
        tracker.record_outputs((stats, out), func, args, place)
        if (args[1] if len(args) > 1 else kwargs.get("threshold", 0.0)) == 0:
            return out, stats, None
        magnitude = tracker.record_alloc(_bytes(a), place, "temporaries", "abs")
        mask = tracker.record_alloc(a.numel(), place, "temporaries", "outliers")
        tracker.record_free(magnitude)
        tracker.record_free(mask)
        return out, stats, torch.empty(0, dtype=torch.long, device="meta")

    @_kernel(bnb.int8_mixed_scaled_mm.default)
    def _int8_mm(tracker, func, args, kwargs, place):
        """backends/default/ops.py: the product in int32, dequantised to fp16, cast to the input's dtype."""
        a, weight = args[0], args[2]
        if a.dim() not in (2, 3):  # backends/cuda/ops.py, in the same words
            raise ValueError("Only two or three dimensional matrices are supported for argument A")
        rows = a.numel() // a.shape[-1] * weight.shape[0]
        product = tracker.record_alloc(4 * rows, place, "dequantized_weights", "int8_linear_matmul")
        half = torch.empty(*a.shape[:-1], weight.shape[0], dtype=torch.float16, device="meta")
        tracker.record_outputs(half, func, args, place)
        out = half
        if a.dtype != torch.float16:
            out = torch.empty(half.shape, dtype=a.dtype, device="meta")
            tracker.record_outputs(out, func, args, place)
        del half
        tracker.record_free(product)
        return out, torch.empty(0, dtype=a.dtype, device="meta")

    @_kernel(bnb.dequantize_4bit.default, bnb.dequantize_blockwise.default)
    def _dequantize(tracker, func, args, kwargs, place):
        out = func(*args, **kwargs)
        tracker.record_outputs(out, func, args, place)
        tracker.reclassify(out, "dequantized_weights")
        return out


_register_bitsandbytes()


# --- what refuses to run on the meta device -----------------------------------------------------------------


@contextmanager
def as_if_cuda(card: Card):
    """Let PyTorch take the paths on meta tensors that it takes on CUDA ones.

    ``torch.optim`` chooses its for-each and fused kernels by device type
    (``torch/utils/_foreach_utils.py``, ``_get_foreach_kernels_supported_devices``); who asks whether autocast is on
    asks for the tensor's device type.
    """
    import importlib

    import torch.utils._foreach_utils as foreach

    global card_in_use
    names = ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices")
    modules = [
        foreach,
        *(importlib.import_module(f"torch.optim.{name}") for name in ("optimizer", "adam", "adamw", "sgd")),
    ]
    saved = [(module, name, getattr(module, name)) for module in modules for name in names if hasattr(module, name)]
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        function = getattr(torch, name)
        saved.append((torch, name, function))
        setattr(torch, name, lambda device="cuda", ask=function: ask("cuda" if device == "meta" else device))
    autocast = torch.autocast
    saved.append((torch, "autocast", autocast))
    torch.autocast = lambda device_type, *args, **kwargs: (
        nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)
    )
    before = card_in_use
    card_in_use = card
    try:
        for module, name, _ in saved:
            if module is not torch:
                setattr(module, name, lambda: ["cuda", "meta"])
        yield
    finally:
        card_in_use = before
        for module, name, function in saved:
            setattr(module, name, function)
