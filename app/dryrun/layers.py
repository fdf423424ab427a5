"""The per-layer table: what each module weighs in each layout, and what it costs to train. Bytes."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import asdict, dataclass, replace

import torch

from app.dryrun.model import quantizable
from app.memory.event import Books

_KINDS = {
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer_state": "optimizer_state",
}


@dataclass(frozen=True)
class Layer:
    """One module with weights, or ``count`` alike. Bytes of one of them; ``parameters`` is a number."""

    path: str
    type: str
    count: int
    parameters: int
    base: int
    nf4: int
    nf4_double_quant: int
    adapters: int
    gradients: int
    optimizer_state: int
    activations: int
    activations_checkpointed: int


def nf4_bytes(elements: int, double_quant: bool) -> int:
    """A weight in NF4 with its constants (bitsandbytes/functional.py ``quantize_4bit``: blocks of 64 and 256)."""
    blocks = -(-elements // 64)
    packed = (elements + 1) // 2 + 64
    if not double_quant:
        return packed + 4 * blocks
    return packed + blocks + 4 * -(-blocks // 256) + 1024 + 4


def weights_table(model: torch.nn.Module, skip: tuple[str, ...]) -> list[Layer]:
    """Every module of the bare model with the parameters that are its own, in order; a tied weight counts once."""
    linear = {path for path, _ in quantizable(model, skip)}
    rows, seen = [], set()
    for path, module in model.named_modules():
        parameters = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        seen.update(map(id, parameters))
        count = sum(p.numel() for p in parameters)
        base = sum(p.numel() * p.element_size() for p in parameters)
        plain = nested = base
        if path in linear:
            rest = base - module.weight.numel() * module.weight.element_size()
            plain = rest + nf4_bytes(module.weight.numel(), False)
            nested = rest + nf4_bytes(module.weight.numel(), True)
        rows.append(Layer(path, type(module).__name__, 1, count, base, plain, nested, 0, 0, 0, 0, 0))
    return rows


def with_costs(rows: list[Layer], books: Books, other: Books | None, checkpointed: bool) -> list[Layer]:
    """``rows`` with what the books of the job hold for each module, and ``other``'s activations: those of the same
    job with checkpointing the other way round (None where the model cannot).

    A cost belongs to the module itself or, for what PEFT added, to the one it wraps. Modules that hold nothing are
    left out.
    """
    here, there = saved(books), saved(other) if other else {}
    plain, packed = (there, here) if checkpointed else (here, there)
    table = {row.path: asdict(row) for row in rows}
    steps = max((mark.step for mark in books.marks), default=1)
    for allocation in books.allocations:
        field = _KINDS.get(allocation.kind)
        if field and allocation.op not in ("to", "load"):
            table[_owner(allocation.module, table)][field] += allocation.size
    for sizes, field in ((plain, "activations"), (packed, "activations_checkpointed")):
        for path, size in sizes.items():
            table[_owner(path, table)][field] += size
    for cells in table.values():
        cells["gradients"] //= steps
    return [Layer(**cells) for cells in table.values() if any(value for value in list(cells.values())[3:])]


def saved(books: Books) -> dict[str, int]:
    """Bytes of activations alive at the end of the first forward pass, by module path."""
    first = next((mark for mark in books.marks if mark.name == "forward"), None)
    if first is None:
        return {}
    end = next((mark.at for mark in books.marks if mark.at > first.at), len(books.events))
    alive: dict[int, None] = {}
    for event in books.events[first.at : end]:
        if event >= 0:
            alive[event] = None
        else:
            alive.pop(~event, None)
    out: dict[str, int] = {}
    for key in alive:
        entry = books.allocations[key]
        if entry.kind == "activations":
            out[entry.module] = out.get(entry.module, 0) + entry.size
    return out


def _owner(path: str, paths: Container[str]) -> str:
    """The row that a module path belongs to: its own or its nearest ancestor's."""
    while path and path not in paths:
        path = path.rpartition(".")[0]
    return path


def group(rows: list[Layer]) -> list[Layer]:
    """Repeated layers as one row with a count: paths that differ in a layer's index only, alike in everything."""
    groups: dict[tuple, list[Layer]] = {}
    for row in rows:
        shape = re.sub(r"\.\d+(?=\.|$)", ".#", row.path)
        key = (shape, *list(asdict(row).values())[1:])
        groups.setdefault(key, []).append(row)
    out = []
    for alike in groups.values():
        first = alike[0]
        if len(alike) > 1:
            numbers = [re.findall(r"\.(\d+)(?=\.|$)", row.path) for row in (first, alike[-1])]
            parts = re.split(r"\.\d+(?=\.|$)", first.path)
            spans = [a if a == b else f"{{{a}..{b}}}" for a, b in zip(*numbers)]
            path = parts[0] + "".join(f".{span}{rest}" for span, rest in zip(spans, parts[1:]))
            first = replace(first, path=path, count=len(alike))
        out.append(first)
    return out
