"""The per-layer table: what each module weighs in each layout, and what it costs to train. Bytes."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .events import KINDS, TraceColumns
from .sizes import Number, ShapePoint, compiled, text_of

_KINDS = ("adapters", "gradients", "optimizer_state")


class Layer(NamedTuple):
    """One module with weights, or ``count`` alike. Bytes of one of them; ``parameters`` is a number."""

    path: str
    type: str
    count: int
    parameters: int
    base: int
    nf4: int
    nf4_double_quant: int
    adapters: Number = 0
    gradients: Number = 0
    optimizer_state: Number = 0
    activations: Number = 0
    activations_checkpointed: Number = 0


_COSTS = ("adapters", "gradients", "optimizer_state", "activations", "activations_checkpointed")


def with_costs(rows: list[Layer], trace_log: TraceColumns, other: str, checkpointed: bool) -> list[Layer]:
    """``rows`` with what the books of the job hold for each module, and the activations of the phase ``other``: a
    forward pass with checkpointing the other way round (not there where the model cannot).

    A cost belongs to the module itself or, for what PEFT added, to the one it wraps. Modules that hold nothing are
    left out.
    """
    here, there = saved(trace_log, "forward"), saved(trace_log, other)
    plain, packed = (there, here) if checkpointed else (here, there)
    table: dict[str, dict[str, Any]] = {row.path: {} for row in rows}
    steps = max((mark.step for mark in trace_log.marks), default=1)
    made = np.array([op not in ("to", "load") for op in trace_log.ops], bool)
    costs = {
        kind: by_module(trace_log, which[made[trace_log.op[which]]])
        for kind in _KINDS
        for which in [trace_log.which(kind)]
    }
    for field, found in {**costs, "activations": plain, "activations_checkpointed": packed}.items():
        for path, size in found.items():
            cells = table[_owner(path, table)]
            cells[field] = cells.get(field, 0) + size
    for cells in table.values():
        if "gradients" in cells:
            cells["gradients"] //= steps
    return [row._replace(**table[row.path]) for row in rows if row.base or table[row.path]]


def by_module(trace_log: TraceColumns, which: np.ndarray) -> dict[str, Number]:
    """Bytes of the allocations ``which``, by module path."""
    cells = trace_log.fqn[which].astype(np.int64) * len(trace_log.sizes) + trace_log.size[which]
    cells, counts = np.unique(cells, return_counts=True)
    out: dict[str, Number] = {}
    for cell, count in zip(cells.tolist(), counts.tolist()):
        module, size = divmod(cell, len(trace_log.sizes))
        path = trace_log.fqns[module]
        out[path] = out.get(path, 0) + count * trace_log.sizes[size]
    return out


def saved(trace_log: TraceColumns, phase: str) -> dict[str, Number]:
    """Bytes of activations alive at the end of the last phase of that name, by module path: the first forward pass also
    makes what stays."""
    last = next((mark for mark in reversed(trace_log.marks) if mark.name == phase), None)
    if last is None:
        return {}
    end = next((mark.at for mark in trace_log.marks if mark.at > last.at), trace_log.events.size)
    events = trace_log.events[last.at : end]
    alive = np.zeros(trace_log.size.size, bool)
    alive[events[events >= 0]] = True
    alive[~events[events < 0]] = False
    return by_module(trace_log, np.flatnonzero(alive & (trace_log.kind == KINDS.index("activations"))))


def _owner(path: str, paths: Container[str]) -> str:
    """The row that a module path belongs to: its own or its nearest ancestor's."""
    while path and path not in paths:
        path = path.rpartition(".")[0]
    return path


NUMBER = re.compile(r"\.(\d+)(?=\.|$)")
"""A module's number in its list, within its path."""


@dataclass(frozen=True)
class Table:
    """The rows, those together that differ in a layer's index only: of each group one row, and the place and path of
    each of its members. Costs are texts of b, s and m."""

    rows: list[dict[str, Any]]
    members: list[list[tuple[int, str]]]

    @staticmethod
    def of(layers: Iterable[Layer]) -> Table:
        groups: dict[tuple, tuple[Layer, list[tuple[int, str]]]] = {}
        for place, layer in enumerate(layers):
            key = (NUMBER.sub(".#", layer.path), *layer[1:])
            groups.setdefault(key, (layer, []))[1].append((place, layer.path))
        rows = []
        for layer, members in groups.values():
            costs = {name: text_of(getattr(layer, name)) for name in _COSTS}
            rows.append(
                {**layer._asdict(), **costs, "path": _span([path for _, path in members]), "count": len(members)}
            )
        return Table(rows, [members for _, members in groups.values()])

    def at(self, point: ShapePoint, every: bool = False) -> list[Layer]:
        """The table at one point; ``every``: each layer by itself, in the model's order."""
        costs = iter(compiled(row[name] for row in self.rows for name in _COSTS)(point))
        groups = [Layer(**{**row, **{name: next(costs) for name in _COSTS}}) for row in self.rows]
        if not every:
            return groups
        single = {
            place: layer._replace(path=path, count=1)
            for layer, members in zip(groups, self.members)
            for place, path in members
        }
        return [single[place] for place in sorted(single)]


def _span(paths: list[str]) -> str:
    """``model.layers.0.mlp`` … ``model.layers.31.mlp`` as one: ``model.layers.{0..31}.mlp``."""
    numbers = [NUMBER.findall(path) for path in (paths[0], paths[-1])]
    parts = re.split(r"\.\d+(?=\.|$)", paths[0])
    spans = [a if a == b else f"{{{a}..{b}}}" for a, b in zip(*numbers)]
    return parts[0] + "".join(f".{span}{rest}" for span, rest in zip(spans, parts[1:]))
