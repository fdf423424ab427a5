"""What must hold of any expanded run: each layer frees and keeps what its template frees and keeps."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from .blocks import BlockWriter
from .expansion import Expansion
from .ownership import Owner
from .stacks import NotRepeatable


def check_freed(expansion: Expansion, writer: BlockWriter) -> None:
    """What the short run frees, and only that, is freed in the whole: by every layer, once, after it was allocated.

    Raises :class:`NotRepeatable`.
    """
    events = expansion.events
    freed = ~events[events < 0]
    times = np.bincount(freed, minlength=writer.keys_written)
    if times.size and times.max() > 1:
        raise writer.freed_too_often(int(expansion.short_keys[times.argmax()]))
    allocating = np.flatnonzero(events >= 0)
    if (allocating[freed] > np.flatnonzero(events < 0)).any():
        raise NotRepeatable("a layer frees what is not allocated yet")
    stays = np.ones(len(writer.owners), bool)
    stays[~expansion.short_events[expansion.short_events < 0]] = False
    _check_unowned(writer, times, stays)
    _check_layers(expansion, writer, times, stays)


def _check_unowned(writer: BlockWriter, times: npt.NDArray[np.int_], stays: npt.NDArray[np.bool_]) -> None:
    """What no layer owns is written, and freed where the short run frees it. ``times``: how often, by key of the whole;
    ``stays``: what is alive at the end, by key of the short run."""
    unowned = np.array([owner is None for owner in writer.owners], bool)
    keys = writer.unowned_keys[unowned]
    if (keys < 0).any() or (times[keys].astype(bool) == stays[unowned]).any():
        raise NotRepeatable("what no layer owns is freed by a layer that stands for none of the whole")


def _check_layers(
    expansion: Expansion, writer: BlockWriter, times: npt.NDArray[np.int_], stays: npt.NDArray[np.bool_]
) -> None:
    """Every layer keeps as many allocations as its template."""
    kept_by: Counter[Owner] = Counter()
    for owner, kept in zip(writer.owners, stays.tolist(), strict=True):
        if owner is not None and kept:
            kept_by[owner.stack, owner.position] += 1
    layer_map = expansion.layer_map
    left = [np.zeros(len(templates), int) for templates in layer_map.templates]
    start = 0
    for block in expansion.blocks:
        shape = len(block.layers), block.allocations
        end = start + shape[0] * shape[1]
        layers = [layer for layer in block.layers if layer is not None]
        if layers:
            left[layers[0][0]][[layer for _, layer in layers]] += block.allocations - times[start:end].reshape(
                shape
            ).sum(1)
        start = end
    for number, templates in enumerate(layer_map.templates):
        for layer, position in enumerate(templates):
            if left[number][layer] != kept_by[number, position]:
                list_fqn = layer_map.stacks[number].list_fqns[0]
                raise NotRepeatable(f"layer {layer} of {list_fqn} does not free what it allocated")


def check_all_run(expansion: Expansion, ran: set[Owner]) -> None:
    """Of each type, all layers allocate in a forward pass (``ran``) or none does.

    If only some do, they are chosen by their number, and no short run shows how the choice goes on. Raises
    :class:`NotRepeatable`.
    """
    for number, stack in enumerate(expansion.layer_map.stacks):
        found = {(type_, (number, position) in ran) for position, type_ in enumerate(stack.short_types)}
        if len(found) > len(set(stack.short_types)):
            raise NotRepeatable(f"of layers alike in {stack.list_fqns[0]} some run and some do not")
