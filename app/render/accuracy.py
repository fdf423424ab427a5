"""How far plans are from measurements: the rows that ``tests/test_accuracy.py`` computes and keeps in
``app/catalog/accuracy.json``, summed up for the README and for the page alike."""

from __future__ import annotations

import json
import statistics
from functools import lru_cache
from typing import Any

from ..resources import CATALOG

DATA = CATALOG / "accuracy.json"
COLUMNS = {
    "peak_allocated": "Allocated",
    "peak_reserved": "Reserved",
    "peak_process": "Process",
    "placed_allocated": "Placed",
    "optimizer_state": "Optimizer state",
    "phases": "The phase most off",
}


@lru_cache(maxsize=1)
def tables() -> dict[str, dict[str, Any]]:
    """By name: the ``title`` of a table and its ``rows``: an ``id`` and, by figure, bytes as [planned, measured]."""
    return json.loads(DATA.read_text(encoding="utf-8"))


def error(planned: int, measured: int) -> float:
    """How far a plan is off, in percent of what was measured."""
    return abs(planned / measured - 1) * 100


def summary(errors: list[float]) -> tuple[float, float, float]:
    """The median, what 95 % stay within, and the worst."""
    values = sorted(errors)
    return statistics.median(values), values[int(0.95 * (len(values) - 1))], values[-1]


def summaries(rows: list[dict]) -> list[tuple[str, int, float, float, float]]:
    """By figure: its name, how many rows have it, and :func:`summary` of their errors."""
    out = []
    for figure, name in COLUMNS.items():
        errors = [error(*row[figure]) for row in rows if figure in row]
        if errors:
            out.append((name, len(errors), *summary(errors)))
    return out
