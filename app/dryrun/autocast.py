"""CUDA's autocast for meta tensors, which have no autocast key of their own.

The lists have the operators of PyTorch's header, and the functions that call one of them: ``square`` is ``pow``,
``normalize`` and ``linalg.norm`` compute a norm, ``interpolate`` an ``upsample``. ``tests/test_restated.py`` compares
them with the header of the installed torch.

The cache keeps one 16-bit copy of each fp32 leaf that needs a gradient, until the outermost autocast ends. A
checkpoint's recompute enters an autocast of its own, with an empty cache.

Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/autocast_mode.h#L819
``AT_FORALL_LOWER_PRECISION_FP`` and, further down, ``AT_FORALL_FP32``, ``AT_FORALL_FP32_SET_OPT_DTYPE`` and
``AT_FORALL_PROMOTE``; https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/autocast_mode.cpp
``cached_cast``; https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/UnaryOps.cpp ``square``.
Confirmed: H200, the squared ReLU of Nemotron makes two blocks of fp32.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .sandbox import replaced

LOWER_PRECISION = frozenset(
    """_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution prelu
    addmm addmv addr matmul __matmul__ __rmatmul__ einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul
    multi_dot linalg_multi_dot lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell scaled_dot_product_attention""".split()
)
"""Operators that cast their arguments to the 16-bit type of autocast."""
FLOAT32 = frozenset(
    """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ square
    softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm nuclear_norm cosine_similarity
    poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss
    huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
    multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp interpolate""".split()
)
"""Operators that cast 16-bit arguments to fp32."""
FLOAT32_BY_DTYPE = frozenset(
    "prod softmax log_softmax softmin cumprod cumsum sum linalg_norm linalg_vector_norm linalg_matrix_norm norm".split()
)
"""Operators that get the argument ``dtype=torch.float32``, unless the caller gave a dtype."""
PROMOTE = frozenset(
    "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler grid_sample index_put tensordot scatter_add".split()
)
"""Operators that cast to fp32 where one of their arguments is fp32."""
HALF = (torch.float16, torch.bfloat16)
"""The 16-bit types."""


class Autocast(TorchFunctionMode):
    """A mode that casts as ``torch.autocast("cuda", dtype)`` does, while it is :meth:`on`."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self._enabled = False
        self._suspended = False
        self._cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def active(self) -> bool:
        """Whether arguments are cast now."""
        return self._enabled and not self._suspended

    @contextlib.contextmanager
    def on(self):
        """The outermost ``with torch.autocast("cuda", dtype)``. ``torch.is_autocast_enabled`` is true meanwhile."""
        enabled, dtype = torch._C.is_autocast_enabled("cuda"), torch._C.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", self.dtype)
        self._enabled = True
        try:
            yield
        finally:
            self._enabled = False
            self._cache.clear()
            torch.set_autocast_enabled("cuda", enabled)
            torch.set_autocast_dtype("cuda", dtype)

    @contextlib.contextmanager
    def suspended(self):
        """``with torch.autocast(…, enabled=False)``, which rotary embeddings enter."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    @contextlib.contextmanager
    def in_modules_of(self, model: torch.nn.Module):
        """``torch.autocast`` and the model's ``maybe_autocast`` act on this mode. On the meta device they do nothing.

        Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/utils/generic.py#L227
        ``maybe_autocast``.
        """

        modules = {sys.modules[type(module).__module__] for module in model.modules()}
        with contextlib.ExitStack() as undo:
            for module in modules:
                if hasattr(module, "maybe_autocast"):
                    undo.enter_context(replaced(module, "maybe_autocast", self._region_class()))
            undo.enter_context(replaced(torch, "autocast", self._region_class()))
            yield

    @contextlib.contextmanager
    def nested(self, enabled: bool):
        """``torch.autocast(…, enabled=enabled)``, by whoever asks for it. The outermost one owns the cache."""
        if enabled and not self._enabled:
            with self.on():
                yield
            return
        before, self._suspended = self._suspended, not enabled
        try:
            yield
        finally:
            self._suspended = before

    def _region_class(self) -> type:
        """``torch.autocast`` for this mode: a context and a decorator."""
        mode = self

        class Region(contextlib.ContextDecorator):
            def __init__(self, device_type="cuda", dtype=None, enabled=True, cache_enabled=None):
                self.enabled, self.entered = enabled, []

            def _recreate_cm(self):
                return Region(enabled=self.enabled)

            def __enter__(self):
                self.entered.append(mode.nested(self.enabled))
                return self.entered[-1].__enter__()

            def __exit__(self, *error):
                return self.entered.pop().__exit__(*error)

        return Region

    def _to_low(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype in (self.dtype, torch.float64):
            return tensor
        if tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf and tensor._base is None:
            if id(tensor) not in self._cache:
                self._cache[id(tensor)] = (tensor, tensor.to(self.dtype))
            return self._cache[id(tensor)][1]
        return tensor.to(self.dtype)

    @staticmethod
    def _to_float32(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype in HALF else tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "backward" and isinstance(args[0], torch.Tensor):
            return self._backward(*args, **kwargs)
        if not self.active:
            return func(*args, **kwargs)
        cast = None
        if name in LOWER_PRECISION:
            cast = self._to_low
        elif name in FLOAT32 or (name in PROMOTE and _any_float32((*args, *kwargs.values()))):
            cast = self._to_float32
        elif name == "cross_entropy" and args[0].dtype in HALF and not kwargs.get("label_smoothing"):
            return self._cross_entropy(*args, **kwargs)
        elif name == "normalize":
            return self._normalize(*args, **kwargs)
        elif name in FLOAT32_BY_DTYPE and kwargs.get("dtype") is None:
            first = args[0] if args else None
            if isinstance(first, torch.Tensor) and first.is_floating_point() and first.dtype != torch.float64:
                if not any(isinstance(argument, torch.dtype) for argument in args):
                    kwargs = kwargs | {"dtype": torch.float32}
        if cast is None:
            return func(*args, **kwargs)
        # cached_cast(…)... is the argument list of a C++ call: GCC evaluates it from the last argument to the first,
        # and destroys it from the first to the last. Confirmed: of eager attention's product under no_grad, the scores
        # are freed before the values.
        kwargs = tree_map_only(torch.Tensor, cast, kwargs)
        cast_args = [tree_map_only(torch.Tensor, cast, argument) for argument in reversed(args)]
        out = func(*reversed(cast_args), **kwargs)
        while cast_args:
            cast_args.pop()
        return out

    @staticmethod
    def _cross_entropy(
        logits,
        target,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
    ):
        """``cross_entropy``, which is on no list: log_softmax stays in 16 bit, and nll_loss casts to fp32.

        Confirmed: H100, bf16 logits of [4096, 30522]: log_softmax takes 2 bytes an element, its fp32 copy 4.
        """
        low = torch.log_softmax(logits, 1 if logits.dim() > 1 else 0)
        return torch.nn.functional.nll_loss(low.float(), target, weight, ignore_index=ignore_index, reduction=reduction)

    def _normalize(self, source, p=2.0, dim=1, eps=1e-12, out=None):
        """``torch.nn.functional.normalize``, whose norm is in fp32."""
        with self:
            return source / source.norm(p, dim, keepdim=True).clamp_min(eps).expand_as(source)

    def _backward(self, loss, gradient=None, **_):
        """``Tensor.backward`` under this mode, so that a checkpoint's recompute is cast too."""
        with self:
            run_backward(loss, gradient)


def run_backward(loss: torch.Tensor, gradient: torch.Tensor | None = None, **_) -> None:
    """``Tensor.backward``, with the modes that are entered: a tensor's own method leaves the topmost."""
    gradient = torch.ones_like(loss) if gradient is None else gradient
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _any_float32(values) -> bool:
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in values)
