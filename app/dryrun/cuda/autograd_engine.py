"""What the autograd engine writes in place on a GPU.

Under a dispatch mode, and for tensor subclasses, PyTorch takes the out-of-place operator in these cases
(``isTensorSubclassLike``). The rules here go back to what a plain tensor gets.
"""

from __future__ import annotations

import torch

from .registry import kernel
from .running import running
from .temporaries import run_and_record

aten = torch.ops.aten

USES_OF_LAST_REFERENCE = 4
"""``_use_count`` of a gradient that only the engine holds: the input buffer has one reference, the way to Python two,
and the tensor's Python object one."""
USES_OF_LAST_STORAGE = 2
"""The same of its storage: the tensor has one reference, the tensor's Python object one."""


@kernel(aten.add.Tensor)
def _add(tracker, func, args, kwargs, fqn):
    """A sum. Where the autograd engine accumulates a second gradient, it adds in place if nobody else holds the first.

    Math attention writes ``attn.add_(*attn_mask)``, in place as well.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/csrc/autograd/input_buffer.cpp
    ``InputBuffer::accumulate``.
    """
    if running.in_math_attention:
        return args[0].add_(args[1])
    if tracker.in_backward and not tracker.in_module and not kwargs and len(args) == 2 and _accumulates(*args):
        return args[0].add_(args[1])
    return run_and_record(tracker, func, args, kwargs, fqn)


def _accumulates(first, second) -> bool:
    """Whether the engine may add ``second`` into ``first``, by the references that are held."""
    return (
        isinstance(second, torch.Tensor)
        and first.shape == second.shape
        and first.dtype == second.dtype
        and first._use_count() == USES_OF_LAST_REFERENCE
        and torch._C._storage_Use_Count(first.untyped_storage()._cdata) == USES_OF_LAST_STORAGE
    )


IN_PLACE = {
    aten.index_put.default: aten.index_put_.default,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.index_add.default: aten.index_add_.default,
}
"""Out-of-place operators of backward formulas to the operators that plain tensors get."""


@kernel(*IN_PLACE)
def _accumulate_at(tracker, func, args, kwargs, fqn):
    """The backward of indexing, ``gather``, ``topk``, ``max`` and others: it writes in place into fresh zeros.

    An exception is the gradient of ``index_put_``, which is the incoming gradient with zeros in a copy.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/csrc/autograd/FunctionsManual.cpp
    ``index_backward`` and ``gather_backward``;
    https://github.com/pytorch/pytorch/blob/v2.11.0/tools/autograd/derivatives.yaml#L886 ``index_put``.
    """
    overwrites = func is aten.index_put.default and not (len(args) > 3 and args[3])
    if not tracker.in_backward or tracker.in_module or overwrites:
        return run_and_record(tracker, func, args, kwargs, fqn)
    if func is aten.index_put.default and any(i is not None and i.dtype == torch.bool for i in args[1]):
        positions = sum(8 * i.numel() * i.dim() for i in args[1] if i is not None)
        tracker.record_temporary([(positions, "temporaries")], fqn, "nonzero")
        return args[0]
    return IN_PLACE[func](*args, **kwargs)
