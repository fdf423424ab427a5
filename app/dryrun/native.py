"""Let meta tensors use PyTorch's own shape functions: those that CUDA uses, and several times as fast.

``torch/_meta_registrations.py`` (``activate_meta``) puts Python decompositions, made for symbolic shapes, before the
structured kernels' shape functions in C++, which the Meta and the CUDA backend share. A step without symbols needs
them only for operators that have no such function. They differ where a decomposition gets strides wrong: of a
``softplus_backward`` of permuted tensors, say, which is why a model with it clones once less in Python than on a card.
"""

from __future__ import annotations

import torch
import torch._meta_registrations as registrations
from torch._decomp import global_decomposition_table

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
        if not _has_kernel(overload.name(), "Meta"):
            library.impl(overload, function)
    return library


_library = _prefer_native_shape_functions()
