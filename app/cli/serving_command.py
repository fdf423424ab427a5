"""``vramplan serving``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..form import PASTE, read_object
from ..planning.cards import local_card
from ..render import served
from ..render.visible import Console
from ..usecases import serving as plan_server
from .console import DOES_NOT_FIT, FITS, Json, Maybe, told_as, waiting
from .job_files import read_text


def serving(
    command: Annotated[str, typer.Argument(help="What starts the server, in quotes: 'vllm serve MODEL -tp 2'.")],
    gpu: Annotated[Maybe, typer.Option("--gpu", "-g", help="The card of each rank.", metavar="NAME")] = None,
    config: Annotated[
        Maybe, typer.Option(help="The model's config.json (-: stdin), instead of the one named.", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan a server: does it start, with how many tokens of KV cache, for how many requests.

    Exit codes: 0 starts, 1 refuses, 2 cannot say.
    """
    with told_as(as_json):
        asked: dict = {"command": command, "gpu": gpu}
        if gpu is not None and gpu.partition(":")[0] == "local":
            asked["gpu"] = local_card(gpu)[0].model_dump()
        if config is not None:
            asked["config"] = read_object(read_text(config), "config", PASTE)
        with waiting("Looking at the model on the meta device"):
            answer = plan_server(asked)
    if as_json:
        print(json.dumps(answer))
    else:
        served.show(answer, Console())
    raise typer.Exit(DOES_NOT_FIT if answer["verdict"] == "refuses" else FITS)
