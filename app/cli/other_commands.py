"""``vramplan serve``, ``gpus``, ``models`` and ``version``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ..catalog.gpus import all_gpus, parts_of
from ..catalog.models import MODELS, search_models
from ..errors import PlanError
from ..planning.cards import read_prices
from ..render import terminal
from ..render.visible import Console
from .console import Prices

LOOPBACK = frozenset(("127.0.0.1", "::1", "localhost"))
"""Names of this machine that no other can reach it by."""


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    allow_probe: Annotated[
        bool, typer.Option("--allow-probe", help="Let POST /probe run jobs on this machine's GPU.")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name that the server goes by, as behind a proxy.", metavar="NAME")
    ] = None,
) -> None:
    """Serve the page and the HTTP API. Local folders are read as models only on this machine's own address, under its
    own names."""
    import uvicorn

    from ..server.app import create_app

    names = frozenset(map(str.lower, allow_host or ()))
    local = host in LOOPBACK
    hosts = names | LOOPBACK if local or names else None
    app = create_app(local_files=local and not names, warm=True, allow_probe=allow_probe, hosts=hosts)
    uvicorn.run(app, host=host, port=port, server_header=False)


def gpus(prices: Prices = None, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the cards of the catalogue, the smallest first; with --prices those that have one, the cheapest first."""
    cards, known = all_gpus(), read_prices(prices) if prices else {}
    if known:
        cards = sorted((card for card in cards if card.key in known), key=lambda card: known[card.key])
    if as_json:
        print(json.dumps([{**asdict(card), "parts": parts_of(card), "price": known.get(card.key)} for card in cards]))
    else:
        terminal.gpus(cards, known, Console())


def models(
    query: Annotated[list[str] | None, typer.Argument(help="Words of a model's name.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the models that need no download; any other is fetched from the Hub by its id."""
    text = " ".join(query or ())
    found = search_models(text, limit=len(MODELS))
    if not found:
        raise PlanError(f"the catalogue has no model like {text!r}", "give its whole Hub id to vramplan estimate")
    if as_json:
        print(json.dumps([{"id": m.id, "parameters": m.parameters, "aliases": m.aliases} for m in found]))
    else:
        terminal.models(found, Console())


def version() -> None:
    """Print the versions that plans are traced with."""
    from ..planning.fingerprint import stack

    for name, number in stack().items():
        print(name, number)
