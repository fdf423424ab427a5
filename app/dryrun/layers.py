"""The per-layer table: what each module weighs in each layout, and what it costs to train. Bytes."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

import torch
from transformers.quantizers.base import get_keys_to_not_convert

from app.dryrun.model import is_skipped
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


def weights_table(model: torch.nn.Module, itemsize: int, skip: tuple[str, ...]) -> list[Layer]:
    """The modules of the bare model that hold parameters, in order."""
    skipped = [*get_keys_to_not_convert(model), *skip]
    rows, seen = [], set()
    for path, module in model.named_modules():
        parameters = [p for p in module._parameters.values() if p is not None and id(p) not in seen]
        if not parameters:
            continue
        seen.update(map(id, parameters))
        count = sum(p.numel() for p in parameters)
        base = sum(p.numel() * p.element_size() for p in parameters)
        plain = nested = base
        if type(module) is torch.nn.Linear and not is_skipped(path, skipped):
            rest = base - module.weight.numel() * module.weight.element_size()
            plain = rest + nf4_bytes(module.weight.numel(), False)
            nested = rest + nf4_bytes(module.weight.numel(), True)
        rows.append(Layer(path, type(module).__name__, 1, count, base, plain, nested, 0, 0, 0, 0, 0))
    return rows


def with_costs(rows: list[Layer], books: Books, other: Books | None, checkpointed: bool) -> list[Layer]:
    """``rows`` with what the books of the job hold for each module, and ``other``'s activations: those of the same
    job with checkpointing the other way round (None where the model cannot)."""
    paths = {row.path for row in rows}
    costs: dict[str, dict[str, int]] = {}
    for allocation in books.allocations:
        field = _KINDS.get(allocation.kind)
        if field and allocation.phase in ("load", "backward", "optimizer"):
            owner = _owner(allocation.module, paths)
            cell = costs.setdefault(owner, {})
            if field != "gradients" or allocation.size:
                cell[field] = cell.get(field, 0) + allocation.size
    steps = max((mark.step for mark in books.marks), default=1)
    here, there = saved(books), saved(other) if other else {}
    out = []
    for row in rows:
        cell = costs.get(row.path, {})
        kept, alternative = _under(here, row.path, paths), _under(there, row.path, paths)
        plain, packed = (alternative, kept) if checkpointed else (kept, alternative)
        out.append(
            replace(
                row,
                adapters=cell.get("adapters", 0),
                gradients=cell.get("gradients", 0) // steps,
                optimizer_state=cell.get("optimizer_state", 0),
                activations=plain,
                activations_checkpointed=packed,
            )
        )
    extra = {path for path in {*here, *there} if _owner(path, paths) == ""} - {""}
    for path in sorted(extra):
        plain, packed = (there.get(path, 0), here.get(path, 0)) if checkpointed else (here.get(path, 0), there.get(path, 0))
        out.append(Layer(path, "", 1, 0, 0, 0, 0, 0, 0, 0, plain, packed))
    return out


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


def _owner(path: str, paths: set[str]) -> str:
    """The row that a module path belongs to: itself or its nearest ancestor with a row."""
    while path and path not in paths:
        path = path.rpartition(".")[0]
    return path


def _under(sizes: dict[str, int], row: str, paths: set[str]) -> int:
    return sum(size for path, size in sizes.items() if _owner(path, paths) == row)


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
