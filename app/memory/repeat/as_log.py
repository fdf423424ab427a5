"""An expanded run as a :class:`TraceLog`, entry by entry, or as :class:`TraceColumns`, arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..events import TraceColumns, TraceLog, numbered

if TYPE_CHECKING:
    from .expansion import Expansion


def log_of(expansion: Expansion) -> TraceLog:
    """The whole run entry by entry, with the module of every event."""
    short = expansion.short_log
    out = TraceLog([], expansion.events.tolist(), [], list(expansion.marks))
    for block in expansion.blocks:
        source = block.source.tolist()
        allocated = [short.allocations[short.events[at]] for at in source if short.events[at] >= 0]
        for layer in block.layers:
            names = expansion.layer_map.names_in(layer)
            out.event_fqns += [names[short.event_fqns[at]] for at in source]
            out.allocations += [entry._replace(fqn=names[entry.fqn]) for entry in allocated]
    for short_key, more in expansion.growth.items():
        key = expansion.single_keys[short_key]
        if key >= 0:
            entry = out.allocations[key]
            out.allocations[key] = entry._replace(size=entry.size + more)
    return out


def columns_of(expansion: Expansion) -> TraceColumns:
    """The whole run as arrays."""
    short, keys = expansion.short_log.columns(), expansion.short_keys
    sizes, size = list(short.sizes), short.size[keys]
    for short_key, more in expansion.growth.items():
        key = expansion.single_keys[short_key]
        if key >= 0:
            size[key] = len(sizes)
            sizes.append(short.sizes[short.size[short_key]] + more)
    fqn, fqns = _modules(expansion, short)
    kind, op, stream = short.kind[keys], short.op[keys], short.stream[keys]
    return TraceColumns(expansion.events, size, fqn, kind, op, stream, sizes, fqns, short.ops, expansion.marks)


def _modules(expansion: Expansion, short: TraceColumns) -> tuple[npt.NDArray[np.int32], list[str]]:
    """The columns ``fqn`` and ``fqns`` of the whole.

    A cell is a pair of names (:meth:`LayerMap.names_in`) and a module of the short run. Only pairs that occur get one.
    """
    layer_map = expansion.layer_map
    names = list(layer_map.names.values())
    number_of, width = {id(one): number for number, one in enumerate(names)}, len(short.fqns)
    rows = [
        np.repeat([number_of[id(layer_map.names_in(layer))] for layer in block.layers], block.allocations)
        for block in expansion.blocks
    ]
    cells = np.concatenate([np.zeros(0, int), *rows]) * width + short.fqn[expansion.short_keys]
    occurring = np.flatnonzero(np.bincount(cells))
    fqn = np.zeros(len(names) * width, np.int32)
    fqn[occurring], fqns = numbered([names[cell // width][short.fqns[cell % width]] for cell in occurring.tolist()])
    return fqn[cells], fqns
