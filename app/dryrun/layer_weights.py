"""Bytes of the weights of each module, as loaded and quantised."""

from __future__ import annotations

from collections.abc import Container

import torch

from ..memory.table import Layer
from ..registry.quantizers import WEIGHT_COLUMNS


def weights_table(model: torch.nn.Module, linear: Container[str]) -> list[Layer]:
    """One row for each module of the bare model, in order, with the parameters that it holds itself.

    A tied weight counts once, where it comes first. ``linear``: the fqns of the modules that quantisation packs.
    """
    rows, seen = [], set()
    for path, module in model.named_modules():
        parameters = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen.update(map(id, parameters))
        counts = [p.numel() for p in parameters]
        count, base = sum(counts), sum(n * p.element_size() for n, p in zip(counts, parameters, strict=True))
        stored = dict.fromkeys(WEIGHT_COLUMNS, base)
        if path in linear:
            weight = module.weight
            elements = weight.numel()
            rest = base - elements * weight.element_size()
            stored = {name: rest + column.bytes_of(elements) for name, column in WEIGHT_COLUMNS.items()}
        rows.append(Layer(path, type(module).__name__, 1, count, base, **stored))
    return rows
