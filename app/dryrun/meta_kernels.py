"""PyTorch's own shape functions for meta tensors: those that CUDA uses, and several times as fast as those in Python.

Structured kernels have a shape function in C++, which the Meta and the CUDA backend share. ``activate_meta`` hides it
behind a decomposition in Python, which is made for symbolic shapes. A step without symbols needs the decomposition only
where C++ has no shape function. Some decompositions also get strides wrong: that of ``softplus_backward`` with permuted
tensors lets a model clone one tensor less than on a card.

:data:`COMPOSED` has operators that C++ composes of others with a shape function (``CompositeExplicitAutograd`` in
native_functions.yaml). There C++ is ten to sixty times as fast. Other composed operators stay in Python: some are
composed of operators that have no shape function (``abs`` calls ``abs.out`` and loses its strides), some read values.

Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/_meta_registrations.py ``activate_meta``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

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
"""Composed operators that a step calls often. ``test_restated.py`` compares them with PyTorch on a CPU."""

_library = registrations._meta_lib_dont_use_me_use_register_meta
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


class NativeShapeFunctions:
    """The change of PyTorch's dispatcher that removes Python's functions where C++ has one, and its undo."""

    def apply(self) -> None:
        """Remove them."""
        _split()
        _library.m.reset()

    def undo(self) -> None:
        """Register them again."""
        _library.m.reset()  # of an undo that was interrupted
        _library.m = _registered(_split())


@functools.cache
def _split() -> dict[str, Callable]:
    """Python's functions for operators that have one in C++, by the operator's name.

    After this PyTorch's library holds these alone. The others are registered separately, once: that takes most of the
    time.
    """
    python = _registered_by_torch()
    _library.m.reset()
    kept = {name: f for name, f in python.items() if name not in COMPOSED and not _has_kernel(name, "Meta")}
    _others.append(_registered(kept))
    replaceable = {name: f for name, f in python.items() if name not in kept}
    _library.m = _registered(replaceable)
    return replaceable


_others: list = []
"""Keeps the handle of the functions that stay: with it they would go."""


def _registered(functions: dict[str, Callable]):
    """A handle of the dispatcher with these functions for meta tensors; they go with it."""
    handle = torch._C._dispatch_library("IMPL", "aten", "Meta", __file__, 0)
    for name, function in functions.items():
        handle.impl(name, "Meta", function, False)
    return handle


def _registered_by_torch() -> dict[str, Callable]:
    """What ``activate_meta`` has registered in its library, in its order of precedence."""
    python: dict[torch._ops.OpOverload, Callable] = {}
    for kind in ("meta", "post_autograd", "pre_autograd"):
        for overload, function in global_decomposition_table[kind].items():
            if isinstance(overload, torch._ops.OpOverload):
                python.setdefault(overload, function)
    names = {overload.name(): function for overload, function in python.items()}
    ours = {name: f for name, f in names.items() if f"aten/{name.partition('::')[2]}/Meta" in _library._op_impls}
    return {name: f for name, f in ours.items() if name.startswith("aten::")}
