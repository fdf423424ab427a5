"""Text from outside as a terminal, or a spreadsheet, may be given it: nothing in it is a command."""

from __future__ import annotations

import re
from typing import Any

import rich.console
from rich.segment import Segment

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline (ECMA-48: C0, DEL, C1), and those that turn the direction of writing."""
_FORMULA = tuple("=+-@\t\r")
"""How text begins that a spreadsheet computes (https://owasp.org/www-community/attacks/CSV_Injection)."""


def visible(text: str) -> str:
    """``text`` with a replacement character for each character that commands a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def cell(value: Any) -> Any:
    """A cell of a CSV: text without commands to a terminal, and with an apostrophe before what would be a formula."""
    if not isinstance(value, str):
        return value
    return f"'{visible(value)}" if value.startswith(_FORMULA) else visible(value)


class Console(rich.console.Console):
    """A console of rich that shows what it prints, whoever wrote it: only rich's own styles command the terminal."""

    def render(self, *given: Any, **options: Any) -> Any:
        """As rich's, with every text made :func:`visible`."""
        for text, style, control in super().render(*given, **options):
            yield Segment(text if control else visible(text), style, control)
