"""The table of modules: the bytes of each one's weights in every layout, and what it costs to train."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .events import KINDS, TraceColumns
from .sizes import Number, ShapePoint, compiled, text_of

_HELD = ("adapters", "gradients", "optimizer_state")


class Layer(NamedTuple):
    """One module with weights, or ``count`` alike: the bytes of one of them.

    ``path`` is its fqn, ``parameters`` a number. ``base`` are its weights as they are loaded, ``nf4`` and
    ``nf4_double_quant`` what they would take quantised. The other fields are what training adds.
    """

    path: str
    type: str
    count: int  # type: ignore[assignment]  # a tuple's method, which nobody calls here; profiles have this name
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
    """``rows`` with what a job's run holds for each module. Modules that hold nothing are left out.

    ``other`` is a phase with the forward pass run again, with checkpointing where the job (``checkpointed``) has none
    and without where it has it: the table tells the activations of both. It is not there where the model has no
    checkpointing. A cost belongs to the module itself or, for what PEFT added, to the module that it wraps.
    """
    own, others = saved_activations(trace_log, "forward"), saved_activations(trace_log, other)
    plain, packed = (others, own) if checkpointed else (own, others)
    table: dict[str, dict[str, Any]] = {row.path: {} for row in rows}
    steps = max((mark.step for mark in trace_log.marks), default=1)
    made = np.array([op not in ("to", "load") for op in trace_log.ops], bool)
    costs: dict[str, dict[str, Number]] = {}
    for kind in _HELD:
        keys = trace_log.keys_of(kind)
        costs[kind] = sizes_by_fqn(trace_log, keys[made[trace_log.op[keys]]])
    for field, sizes in {**costs, "activations": plain, "activations_checkpointed": packed}.items():
        for fqn, size in sizes.items():
            cells = table[_row_of(fqn, table)]
            cells[field] = cells.get(field, 0) + size
    for cells in table.values():
        if "gradients" in cells:
            cells["gradients"] //= steps
    return [row._replace(**table[row.path]) for row in rows if row.base or table[row.path]]


def sizes_by_fqn(trace_log: TraceColumns, keys: npt.NDArray[np.int_]) -> dict[str, Number]:
    """Bytes of these allocations, by module."""
    cells = trace_log.fqn[keys].astype(np.int64) * len(trace_log.sizes) + trace_log.size[keys]
    cells, counts = np.unique(cells, return_counts=True)
    out: dict[str, Number] = {}
    for cell, count in zip(cells.tolist(), counts.tolist(), strict=True):
        module, size = divmod(cell, len(trace_log.sizes))
        fqn = trace_log.fqns[module]
        out[fqn] = out.get(fqn, 0) + count * trace_log.sizes[size]
    return out


def saved_activations(trace_log: TraceColumns, phase: str) -> dict[str, Number]:
    """Bytes of activations made in the last phase of that name and alive at its end, by module.

    It is the last one because the first forward pass also makes what stays for all steps. Empty where there is none.
    """
    last = next((mark for mark in reversed(trace_log.marks) if mark.name == phase), None)
    if last is None:
        return {}
    end = next((mark.at for mark in trace_log.marks if mark.at > last.at), trace_log.events.size)
    events = trace_log.events[last.at : end]
    alive = np.zeros(trace_log.size.size, bool)
    alive[events[events >= 0]] = True
    alive[~events[events < 0]] = False
    return sizes_by_fqn(trace_log, np.flatnonzero(alive & (trace_log.kind == KINDS.index("activations"))))


def _row_of(fqn: str, rows: Container[str]) -> str:
    """The row that a module belongs to: its own or its nearest ancestor's."""
    while fqn and fqn not in rows:
        fqn = fqn.rpartition(".")[0]
    return fqn


NUMBER = re.compile(r"\.(\d+)(?=\.|$)")
"""A module's index in its list, within its fqn."""


@dataclass(frozen=True)
class Table:
    """The rows of a model as they are kept: those that differ in a layer's index only are one.

    ``rows`` has one dict for each such group (:class:`Layer`, with costs as texts of b, s and m), ``members`` the place
    among all rows and the path of each of its modules.
    """

    rows: list[dict[str, Any]]
    members: list[list[tuple[int, str]]]

    @staticmethod
    def of(layers: Iterable[Layer]) -> Table:
        """The table of these modules, in the model's order."""
        groups: dict[tuple[Any, ...], tuple[Layer, list[tuple[int, str]]]] = {}
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
        """The table at one point, costs in bytes; ``every``: each module by itself, in the model's order."""
        costs = iter(compiled(row[name] for row in self.rows for name in _COSTS)(point))
        groups = [Layer(**{**row, **{name: next(costs) for name in _COSTS}}) for row in self.rows]
        if not every:
            return groups
        single = {
            place: layer._replace(path=path, count=1)
            for layer, members in zip(groups, self.members, strict=True)
            for place, path in members
        }
        return [single[place] for place in sorted(single)]


def _span(paths: list[str]) -> str:
    """``model.layers.0.mlp`` … ``model.layers.31.mlp`` as one: ``model.layers.{0..31}.mlp``."""
    numbers = [NUMBER.findall(path) for path in (paths[0], paths[-1])]
    parts = re.split(r"\.\d+(?=\.|$)", paths[0])
    spans = [a if a == b else f"{{{a}..{b}}}" for a, b in zip(*numbers, strict=False)]
    return parts[0] + "".join(f".{span}{rest}" for span, rest in zip(spans, parts[1:], strict=False))
