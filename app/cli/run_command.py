"""``vramplan run``: the user's own script on a card that is not there."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..render import script_page
from ..render.visible import Console
from ..script.run import SECONDS, STEPS, run_script
from .console import DOES_NOT_FIT, FITS, Json, Maybe, told_as, waiting


def run(
    script: Annotated[str, typer.Argument(help="A Python training script.", metavar="SCRIPT")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own arguments.", metavar="ARGS...")] = None,
    gpu: Annotated[Maybe, typer.Option(help="The card, as for estimate.", metavar="NAME")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimiser that are run.", metavar="N")] = STEPS,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that it may take.")] = SECONDS,
    as_json: Json = False,
) -> None:
    """Run your own training script, unmodified, on a card that is not there, and tell what it would take.

    Options of vramplan stand before SCRIPT. No weight is read; data, config and tokenizer are. Exit codes: 0 fits,
    1 does not fit the card of --gpu, 2 cannot say.
    """
    with told_as(as_json), waiting("Running the script on the meta device"):
        answer = run_script(script, arguments or [], gpu, steps, timeout)
    if as_json:
        print(json.dumps(answer))
    else:
        script_page.show(answer, Console())
    raise typer.Exit(DOES_NOT_FIT if gpu and answer["fits"][0]["verdict"] == "does_not_fit" else FITS)
