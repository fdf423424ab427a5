"""The exit codes of the commands, the options they share, and what they print with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.text import Text

from ..errors import OurFault, PlanError
from ..planning import fault_reports
from ..progress import listener
from ..render import words
from ..render.visible import Console
from ..usecases import failure

FITS, DOES_NOT_FIT, CANNOT_SAY = 0, 1, 2
"""Exit codes."""

Maybe = str | None
"""The text of an option that may be left out."""
Jobs = Annotated[Maybe, typer.Option(help="Many jobs, one a line of JSON (-: stdin).", metavar="FILE")]
Json = Annotated[bool, typer.Option("--json", help="The answer as JSON.")]
Prices = Annotated[
    Maybe,
    typer.Option(help="Your prices: a file of lines card,price, or JSON; cards are ranked by them.", metavar="FILE"),
]


@contextmanager
def told_as(as_json: bool) -> Iterator[None]:
    """Errors on standard output too, where the answer would have been JSON."""
    try:
        yield
    except PlanError as error:
        if as_json:
            print(json.dumps(failure(error)))
        raise


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner on standard error, where somebody looks at it, that says what is being done."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield
        return
    with errors.status(f"{text} …") as status:
        before = listener.set(lambda words: status.update(f"{text}: {words} …"))
        try:
            yield
        finally:
            listener.reset(before)


def tell(error: PlanError) -> None:
    """Print an error to standard error: what is wrong, what a model weighs, and what to try."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("Cannot say: ", "bold red"), error.message), highlight=False)
    if error.weights:
        console.print(Text.assemble(("Weights: ", "dim"), words.weights(error.weights)), highlight=False)
    if error.hint:
        console.print(Text.assemble(("Try: ", "dim"), _with_report(error)), highlight=False)


def _with_report(error: PlanError) -> str:
    """The hint, with the file to attach where there is one."""
    path = fault_reports.path_of(error) if isinstance(error, OurFault) else None
    return error.hint if path is None else f"{error.hint}; attach {path}"
