"""What each module of a model weighs, in each layout. Bytes."""

from __future__ import annotations

from collections.abc import Container

import torch

from ..memory.table import Layer


def nf4_bytes(elements: int, double_quant: bool) -> int:
    """A weight in NF4 with its constants (bitsandbytes/functional.py ``quantize_4bit``: blocks of 64 and 256)."""
    blocks = -(-elements // 64)
    packed = (elements + 1) // 2 + 64
    if not double_quant:
        return packed + 4 * blocks
    return packed + blocks + 4 * -(-blocks // 256) + 1024 + 4


def weights_table(model: torch.nn.Module, linear: Container[str]) -> list[Layer]:
    """Every module of the bare model with the parameters that are its own, in order; a tied weight counts once.
    ``linear``: the paths of those that are packed when the model is quantised."""
    rows, seen = [], set()
    for path, module in model.named_modules():
        parameters = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen.update(map(id, parameters))
        counts = [p.numel() for p in parameters]
        count, base = sum(counts), sum(n * p.element_size() for n, p in zip(counts, parameters))
        plain = nested = base
        if path in linear:
            weight = module.weight
            elements = weight.numel()
            rest = base - elements * weight.element_size()
            plain, nested = (rest + nf4_bytes(elements, double) for double in (False, True))
        rows.append(Layer(path, type(module).__name__, 1, count, base, plain, nested))
    return rows
