"""What comes from outside is shown: it commands no terminal, no spreadsheet, and takes nobody's time."""

from __future__ import annotations

import csv
import io
import os
import threading

import pytest
from rich.table import Table
from rich.text import Text
from vramplan.cli import console
from vramplan.errors import PlanError
from vramplan.job import read_job
from vramplan.planning.resolve import CONFIG_BYTES, config_of
from vramplan.render.comparison_csv import to_csv
from vramplan.render.visible import Console, visible

EVIL = "\x1b]52;c;cm0gLXJm\x07a\x9b2Jb\rc\x7fd\u202ee\bf"
"""It writes the clipboard, clears the screen, overwrites the line, and turns the direction of writing."""
COMMANDS = set("\x1b\x07\x9b\r\x7f\u202e\b")


def test_a_console_shows_commands_and_keeps_its_own_styles():
    out = io.StringIO()
    shown = Console(file=out, force_terminal=True, color_system="standard")
    table = Table(EVIL)
    table.add_row(Text(EVIL, "red"))
    shown.print(Text.assemble((EVIL, "bold")), table)
    said = out.getvalue()
    assert "\x1b[1m" in said and "\x1b]52" not in said
    assert not COMMANDS - {"\x1b"} & set(said)
    assert visible("tab\tline\nä 漢") == "tab\tline\nä 漢"


def test_an_error_that_names_what_was_given_commands_no_terminal(capfd):
    console.tell(PlanError(f"no model {EVIL}", f"try {EVIL}"))
    said = capfd.readouterr().err
    assert "no model" in said and not COMMANDS & set(said)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", f"=HYPERLINK({EVIL})"])
def test_a_cell_of_a_csv_is_no_formula(name):
    row = {"varied": {"gpu": {"name": name}, "batch_size": -1}, "model": name, "error": {"message": EVIL}}
    (read,) = csv.DictReader(io.StringIO(to_csv({"over": ["gpu", "batch_size"], "rows": [row]})))
    assert read["gpu"] == read["model"] == f"'{visible(name)}" and read["batch_size"] == "-1"
    assert read["error"] == visible(EVIL)


def test_a_config_that_is_too_large_or_never_ends_is_told(tmp_path):
    large = tmp_path / "config.json"
    large.write_bytes(b" " * (CONFIG_BYTES + 1))
    with pytest.raises(PlanError, match="no config.json is that large"):
        config_of(read_job({"model": str(large)}))
    os.mkfifo(tmp_path / "pipe")
    for silent in ("/proc/kmsg", str(tmp_path / "pipe")):
        told = []
        asked = threading.Thread(target=lambda name=silent, told=told: told.append(answer_of(name)), daemon=True)
        asked.start()
        asked.join(10)
        assert told and isinstance(told[0], PlanError), silent


def answer_of(name: str):
    try:
        return config_of(read_job({"model": name}))
    except PlanError as error:
        return error
