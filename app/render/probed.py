"""A probe as a page of a terminal: plan and card side by side, what differs and by how much."""

from __future__ import annotations

import statistics

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from . import words
from .words import size

FIGURES = {
    "placed": ("Placed", "before the first step"),
    "allocated": ("Allocated", "max_memory_allocated"),
    "reserved": ("Reserved", "max_memory_reserved"),
    "process": ("Process", "as nvidia-smi shows it"),
}
WIDEST = 400
"""Columns of a page that is written to a file or a pipe, at most."""
ROWS = 12
"""Differences that are shown; --json has more."""


def verdict(answer: dict) -> str:
    """What a probe found, in a sentence."""
    card = answer["card"]["name"]
    if answer["broke_in"]:
        where = answer["broke_in"]
        place = f"in {where['phase']} of step {where['step']}" if where["step"] else "while the model loaded"
        return f"Out of memory on {card}, {place}"
    allocated = next(row for row in answer["figures"] if row["figure"] == "allocated")
    return (
        f"Measured on {card}: the plan is off by {abs(allocated['percent']):.3f} % of what was allocated, "
        f"and {100 * answer['match']['share']:.2f} % of the bytes at the peak are events of the plan"
    )


def show(answer: dict, console: Console) -> None:
    """Print the comparison."""
    _print(page(answer), console)


def _print(what: RenderableType, console: Console) -> None:
    """Print; where no terminal says how wide it is, as wide as it needs to be."""
    if not console.is_terminal:
        wanted = console.measure(what, options=console.options.update(max_width=WIDEST)).maximum
        console.width = max(console.width, wanted)
    console.print(what, highlight=False)


def page(answer: dict) -> RenderableType:
    """A probe's answer for a terminal: verdict, figures, phases, and what differs at the peak."""
    good = not answer["broke_in"]
    parts: list[RenderableType] = [Text(verdict(answer), "bold green" if good else "bold red")]
    if answer["layers"]:
        parts.append(Text(f"The model was shortened to {answer['layers']} layers of each stack", "dim"))
    if answer["reason"]:
        parts.append(Text(answer["reason"], "dim"))
    parts += ["", _figures(answer)]
    if good:
        parts += ["", Text("Phases, and what the plan is off by", "bold"), _phases(answer)]
        parts += ["", Text("What differs at the peak", "bold"), _differences(answer["match"])]
    if "extrapolated" in answer:
        parts += ["", Text("All layers", "bold"), _extrapolated(answer["extrapolated"])]
    stack = ", ".join(f"{name} {version}" for name, version in answer["stack"].items() if name != "vramplan")
    parts += ["", Text(f"{stack}; driver {answer['card'].get('driver')}; {answer['date']}", "dim")]
    return Group(*parts)


def _figures(answer: dict) -> Table:
    table = _table("", "Planned", "Measured", "Plan is off by", "")
    for row in answer["figures"]:
        name, note = FIGURES[row["figure"]]
        table.add_row(name, size(row["planned"]), *_beside(row), Text(note, "dim"))
    return table


def _beside(row: dict) -> tuple[str, str]:
    if not row["measured"]:
        return "-", ""
    return size(row["measured"]), _off(row)


def _off(row: dict) -> str:
    return f"{row['difference']:+,} B ({row['percent']:+.3f} %)" if row["difference"] else "0"


def _phases(answer: dict) -> Table:
    moments = {"peak": "Peak", "end": "End", "reserved": "Reserved", "process": "Process"}
    table = _table("Phase", *(column for name in moments.values() for column in (name, "off by")))
    table.padding = (0, 1, 0, 0)
    for phase in answer["phases"]:
        cells = []
        for moment in moments:
            row = phase[moment]
            cells += [size(row["measured"]), _bytes(row["difference"])] if row["measured"] else ["", ""]
        table.add_row(f"{phase['step'] or ' '} {phase['name']}", *cells)
    return table


def _bytes(off: int) -> str:
    return f"{off / 2**20:+,.1f} MiB" if abs(off) >= 1e6 else f"{off:+,}" if off else "0"


def _differences(match: dict) -> RenderableType:
    rows = match["differences"]
    if not rows:
        return Padding(Text("Nothing: every allocation alive there is an event of the plan."), (0, 0, 0, 2))
    table = _table("Module", "Kind", "Since", "Planned", "Measured", "Operator, or who asked")
    for row in rows[:ROWS]:
        kind = words.KINDS.get(row["kind"], row["kind"])
        amounts = (size(row[name]) for name in ("planned", "measured"))
        table.add_row(row["module"] or "the loop", kind, row["phase"], *amounts, Text(row["op"], "dim"))
    if len(rows) > ROWS:
        table.add_row(f"and {len(rows) - ROWS} more")
    return table


def _extrapolated(found: dict) -> RenderableType:
    first, second = found["measured_layers"]
    text = (
        f"Extrapolated, not measured: with all {found['layers']} layers {size(found['allocated'])} allocated and "
        f"{size(found['reserved'])} reserved. From {first} to {second} layers the card's peak grew by "
        f"{size(found['growth_measured'])}, the plan's by {size(found['growth_planned'])}."
    )
    return Padding(Text(text), (0, 0, 0, 2))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=True, padding=(0, 1, 0, 1), header_style="dim")
    text = {"", "Phase", "Module", "Kind", "Since", "Job", "Operator, or who asked"}
    long = {"", "Module", "Kind", "Job", "Operator, or who asked", "off by"}
    for name in columns:
        table.add_column(name, justify="left" if name in text else "right", no_wrap=name not in long, overflow="fold")
    return table


# --- a suite ------------------------------------------------------------------------------------------------


def suite(answers: list[tuple[str, dict]], failed: list[tuple[str, str]], console: Console) -> None:
    """Print the accuracy table of a suite, one row a job, and what could not be measured."""
    _print(suite_table(answers), console)
    for name, message in failed:
        _print(Text(f"  {name}: {message}", "yellow"), console)


def suite_table(answers: list[tuple[str, dict]]) -> Table:
    """The table of a suite: each job's figures, measured, and by how much the plan is off."""
    table = _table("Job", "Allocated", "off by", "Reserved", "off by", "Process", "off by", "matched")
    table.padding = (0, 1, 0, 0)
    columns: dict[str, list[float]] = {"allocated": [], "reserved": [], "process": []}
    for name, answer in answers:
        rows = {row["figure"]: row for row in answer["figures"]}
        cells = []
        for figure, errors in columns.items():
            row = rows[figure]
            cells += [size(row["measured"]), f"{row['percent']:+.3f} %"] if row["measured"] else ["-", "-"]
            errors += [abs(row["percent"])] if row["measured"] else []
        table.add_row(name, *cells, f"{100 * answer['match']['share']:.2f} %")
    for label, of in (("median", statistics.median), ("worst", max)):
        found = [f"{of(errors):.3f} %" if errors else "-" for errors in columns.values()]
        table.add_row(label, "", found[0], "", found[1], "", found[2], "", style="bold")
    return table
