"""Let meta tensors use PyTorch's own shape functions: those that CUDA uses, and several times as fast.

``torch/_meta_registrations.py`` (``activate_meta``) puts Python decompositions, made for symbolic shapes, before the
structured kernels' shape functions in C++, which the Meta and the CUDA backend share. A step without symbols needs
them only for operators that have no such function. They differ where a decomposition gets strides wrong: of a
``softplus_backward`` of permuted tensors, say, which is why a model with it clones once less in Python than on a card.

The same goes for operators that C++ composes of others that have one (``CompositeExplicitAutograd``,
native/native_functions.yaml), :data:`COMPOSED`: ten to sixty times as fast. Not all: parts of some have none and are
Python's again (``abs`` by way of ``abs.out`` loses its strides), others read values.
"""

from __future__ import annotations

import torch
import torch._meta_registrations as registrations
from torch._decomp import global_decomposition_table

COMPOSED = frozenset(
    f"aten::{name}"
    for name in """add.Scalar sub.Scalar rsub.Scalar mul.Scalar div.Scalar add_.Scalar sub_.Scalar mul_.Scalar
    div_.Scalar remainder.Scalar bitwise_and.Scalar bitwise_or.Scalar fill.Scalar fill.Tensor masked_fill.Scalar
    masked_fill.Tensor masked_scatter index_put mean sort stack empty_like zeros_like ones_like new_empty new_zeros
    new_ones new_full _unsafe_view slice_backward select_backward diagonal_backward""".split()
)
"""What a step calls often of them; ``test_restated.py`` holds them against PyTorch on a CPU."""

_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


def _prefer_native_shape_functions() -> torch.library.Library:
    python: dict[torch._ops.OpOverload, object] = {}
    for kind in ("meta", "post_autograd", "pre_autograd"):  # activate_meta's order of precedence
        for overload, function in global_decomposition_table[kind].items():
            if isinstance(overload, torch._ops.OpOverload) and overload.namespace == "aten":
                python.setdefault(overload, function)
    used = {overload: function for overload, function in python.items() if _has_kernel(overload.name(), "Meta")}
    registrations._meta_lib_dont_use_me_use_register_meta._destroy()
    library = torch.library.Library("aten", "IMPL", "Meta")
    for overload, function in used.items():
        if not _has_kernel(overload.name(), "Meta") and overload.name() not in COMPOSED:
            library.impl(overload, function)
    return library


_library = _prefer_native_shape_functions()
