"""What the autograd engine writes in place on a GPU, and out of place under a dispatch mode."""

from __future__ import annotations

import torch

from .registry import kernel
from .running import running

aten = torch.ops.aten


@kernel(aten.add.Tensor)
def _add(tracker, func, args, kwargs, fqn):
    """The autograd engine adds a second gradient into the first one in place where nobody else holds it.

    ``InputBuffer::accumulate`` (torch/csrc/autograd/input_buffer.cpp) asks for the last reference to tensor and
    storage; under a dispatch mode it never does so itself (``isTensorSubclassLike``). Here the tensor is held by the
    buffer, twice on the way to Python, and by its Python object; the storage by the tensor and its Python object.
    """
    if running.in_math_attention:  # ``attn.add_(*attn_mask)``, which only tensor subclasses and modes turn into ``add``
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
    tracker.record_outputs(out, func, args, fqn)
    return out


_IN_PLACE = {
    aten.index_put.default: aten.index_put_.default,
    aten.scatter_add.default: aten.scatter_add_.default,
    aten.scatter.src: aten.scatter_.src,
    aten.index_add.default: aten.index_add_.default,
}


@kernel(*_IN_PLACE)
def _accumulate_at(tracker, func, args, kwargs, fqn):
    """``index_backward``, ``gather_backward``, those of ``topk`` and ``max`` and their like
    (torch/csrc/autograd/FunctionsManual.cpp) write in place into fresh zeros; only for tensor subclasses and under
    modes do they take the out-of-place operator. What sets instead is the gradient of ``index_put_``
    (derivatives.yaml): the incoming one with zeros in a copy."""
    sets = func is aten.index_put.default and not (len(args) > 3 and args[3])
    if tracker.in_backward and not tracker.in_module and not sets:
        if func is aten.index_put.default and any(i is not None and i.dtype == torch.bool for i in args[1]):
            positions = sum(8 * i.numel() * i.dim() for i in args[1] if i is not None)
            tracker.record_temporary([(positions, "temporaries")], fqn, "nonzero")
            return args[0]
        return _IN_PLACE[func](*args, **kwargs)
    out = func(*args, **kwargs)
    tracker.record_outputs(out, func, args, fqn)
    return out
