"""What transformers' flex attention takes on a card, where it is compiled: the tensors of Inductor's kernels.

Compiled, it makes no scores. A kernel of Triton writes the output and two rows of statistics; another one the three
gradients. Masks are of blocks of 128 by 128.

Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/_inductor/kernel/flex/flex_attention.py
``flex_attention``, ``flex_attention_backward``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxOutput, BlockMask

from ..sandbox import replaced
from ..symbols import number_of

BLOCK = 128
"""Tokens of a block of the mask, either way."""


def _dense(tensor: torch.Tensor, shape: torch.Size | tuple) -> torch.Tensor:
    """An empty tensor of ``shape`` without gaps, whose dimensions are nested as those of ``tensor`` are."""
    order = sorted(range(len(shape)), key=lambda dim: number_of(tensor.stride(dim)))
    strides, size = [0] * len(shape), 1
    for dim in order:
        strides[dim], size = size, size * shape[dim]
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)


class _Flex(torch.autograd.Function):
    """The compiled attention of queries [B, H, S, D], keys [B, K, T, D] and values [B, K, T, E], K heads of them."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        out = _dense(query, (*query.shape[:3], value.shape[3]))
        statistics, most = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
        told = torch.empty_like(statistics)  # in natural logarithms
        ctx.save_for_backward(query, key, value, out, statistics)
        ctx.set_materialize_grads(False)
        del most
        return out, told

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_statistics: torch.Tensor | None):
        query, key, value, _, statistics = ctx.saved_tensors
        zeros = torch.empty_like(statistics) if grad_statistics is None else grad_statistics
        delta, scaled = torch.empty_like(statistics), torch.empty_like(statistics)
        grads = tuple(_dense(tensor, tensor.shape) for tensor in (query, value, key))
        del zeros, delta, scaled
        return grads[0], grads[2], grads[1]


def _attend(query, key, value, training: bool = False, return_aux: Any = None, **kwargs: Any):
    """``compile_friendly_flex_attention`` of transformers."""
    out, statistics = _Flex.apply(query, key, value)
    return out if return_aux is None else (out, AuxOutput(lse=statistics))


def _block_mask(mask_mod, B: int, H: int | None, Q_LEN: int, KV_LEN: int, device: Any, _compile: bool = False):
    """``create_block_mask``, compiled: of each block of queries how many blocks of keys it sees in part and in whole,
    and which; and the other way round."""
    rows, columns = -(-Q_LEN // BLOCK), -(-KV_LEN // BLOCK)

    def pair(first: int, second: int) -> list[torch.Tensor]:
        shape = (B, H or 1, first)
        return [torch.empty(end, dtype=torch.int32, device=device) for end in (shape, (*shape, second))]

    seen, whole, seen_by, whole_by = (*(pair(rows, columns) for _ in "12"), *(pair(columns, rows) for _ in "12"))
    return BlockMask((Q_LEN, KV_LEN), *seen, *whole, *seen_by, *whole_by, (BLOCK, BLOCK), mask_mod)


@contextlib.contextmanager
def compiled_flex_attention() -> Iterator[None]:
    """While the context lasts, transformers finds flex attention compiled."""
    import transformers.integrations.flex_attention as flex
    import transformers.masking_utils as masks

    with replaced(flex, "compile_friendly_flex_attention", _attend), replaced(masks, "create_block_mask", _block_mask):
        yield
