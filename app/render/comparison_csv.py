"""A comparison as CSV: plain values, sizes in bytes."""

from __future__ import annotations

import csv
import io

from .visible import cell

COLUMNS = ("model", "method", "batch_size", "sequence_length", "gpu", "parameters", "trainable_parameters", "allocated",
           "reserved", "phase", "verdict", "headroom", "margin", "breaks", "breaks_on", "cannot", "error")  # fmt: skip


def to_csv(comparison: dict) -> str:
    """The rows with a line of names above, what was varied first."""
    names = [*comparison["over"], *(name for name in COLUMNS if name not in comparison["over"])]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in comparison["rows"]:
        varied = {field: _text(value) for field, value in row["varied"].items()}
        error = row["error"]["message"] if "error" in row else None
        cannot = " ".join(row.get("cannot") or ())
        cells = {**row, **row.get("peak", {}), "cannot": cannot, "error": error, **varied}
        writer.writerow({name: cell(value) for name, value in cells.items()})
    return out.getvalue()


def _text(value: object) -> object:
    if isinstance(value, dict):
        return value.get("name") or " ".join(f"{key}={part}" for key, part in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else value
