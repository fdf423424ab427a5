"""The answer to a script as a page of a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from . import terminal, words
from .words import size


def show(answer: dict, console: Console) -> None:
    """Print the page, no wider than reads well."""
    width = min(console.width, terminal.WIDEST)
    console.print(_page(answer, width), highlight=False, width=width)


def _page(answer: dict, width: int) -> RenderableType:
    fit, script = answer["fits"][0], answer["script"]
    room = f"{size(abs(fit['headroom']))} {'to spare' if fit['headroom'] >= 0 else 'short'}"
    said = f"{Path(script['path']).name} {terminal.VERDICTS[fit['verdict']]} {words.with_article(fit['name'])}: {room}"
    steps = f"{script['steps']} steps of its optimiser were run on the meta device"
    parts: list[RenderableType] = [Text(said, terminal.STATES[fit["verdict"]]), Text(steps, "dim"), ""]
    parts += [terminal.peaks(answer), "", terminal.bar(answer, fit, width - 2), "", terminal.title("Phases")]
    parts += [terminal.phases(answer), "", terminal.title("Lines at the peak"), _lines(script)]
    if script["reads"]:
        parts += ["", terminal.title("Values that were stated"), _reads(script)]
    if answer["warnings"]:
        parts += ["", terminal.title("Warnings")]
        parts += [Padding(Text(f"! {warning}", "yellow"), (0, 0, 0, 2)) for warning in answer["warnings"]]
    return Group(*parts)


def _lines(script: dict) -> RenderableType:
    table = terminal.quiet_table("Line", "Kind", "Allocated")
    table.columns[0].no_wrap, table.columns[0].justify, table.columns[1].justify = False, "left", "left"
    for row in script["lines"]:
        where = Text.assemble((_place(row["line"]), "bold"), "  ", (row["text"], "dim"))
        table.add_row(where, words.KINDS[row["kind"]], size(row["bytes"]))
    return table


def _reads(script: dict) -> RenderableType:
    table = terminal.quiet_table("Line", "Value")
    table.columns[0].no_wrap, table.columns[0].justify = False, "left"
    for row in script["reads"]:
        table.add_row(Text.assemble((_place(row["line"]), "bold"), "  ", (row["text"], "dim")), str(row["value"]))
    return table


def _place(line: str) -> str:
    """A line's file without the folders that do not tell it apart, and its number."""
    return line.rpartition("site-packages/")[2] if "site-packages/" in line else Path(line).name
