"""The plan of a server as a page of a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from . import words
from .words import size

STYLES = {"starts": "bold green", "tight": "bold yellow", "refuses": "bold red"}
PARTS = {
    "weights": "Weights",
    "adapters": "LoRA adapters",
    "buffers": "Buffers that stay",
    "activations": "Activations, sampler",
    "graphs": "CUDA graphs",
    "outside": "Outside PyTorch",
    "reserve": "Kept for the rest",
}
"""Names of the parts, in the order in which they are shown."""


def sentence(answer: dict) -> str:
    """The verdict in one sentence."""
    name = words.card_name(answer["gpu"])
    card = name[0].lower() + name[1:]
    where = f"{answer['ranks']} cards, each {card}" if answer["ranks"] > 1 else card
    if answer["verdict"] == "refuses":
        return f"Refuses to start on {where}"
    cache = answer["kv_cache"]
    begin = "Starts" if answer["verdict"] == "starts" else "May start"
    length = answer["settings"]["max_model_len"]
    return (
        f"{begin} on {where}: {cache['tokens']:,} tokens of KV cache, {answer['concurrency']:g} requests of "
        f"{length:,} tokens"
    )


def changes(answer: dict) -> list[str]:
    """What would make it start."""
    if answer["verdict"] == "starts":
        return []
    out = []
    if share := answer["utilization_needed"]:
        out.append(f"a share of the card of {share:g} would do")
    if answer["longest"]:
        out.append(f"the longest request that fits has {answer['longest']:,} tokens")
    return out or ["nothing on this card: take more ranks, or weights of fewer bits"]


def show(answer: dict, console: Console) -> None:
    """Print the answer."""
    console.print(Text(sentence(answer), STYLES[answer["verdict"]]))
    if answer["message"]:
        console.print(Text(answer["message"], "red"))
    for change in changes(answer):
        console.print(Text(change))
    engine = answer["engine"]
    about = f"{answer['model_class']}, {words.number(answer['parameters'])} parameters; {engine['name']}"
    console.print(Text(f"{about} {engine['version']}", "dim"))
    console.print()
    console.print(_parts(answer))
    for warning in answer["warnings"]:
        console.print(Padding(Text(f"! {warning}", "yellow"), (0, 0, 0, 2)))
    if answer["ignored"]:
        console.print(Text(f"cost nothing on the card: {', '.join('--' + flag for flag in answer['ignored'])}", "dim"))


def _parts(answer: dict) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    table.add_row("May be taken", size(answer["requested"]), f"of {size(answer['total'])}")
    for name, title in PARTS.items():
        if answer["parts"].get(name):
            low, high = answer["intervals"][name]
            between = f"{size(low)} to {size(high)}" if low != high else ""
            table.add_row(title, size(answer["parts"][name]), between)
    cache = answer["kv_cache"]
    low, high = cache["available_interval"]
    table.add_row("KV cache", size(max(cache["available"], 0)), f"{size(max(low, 0))} to {size(max(high, 0))}")
    return table
