"""``vramplan demo``: the main question, answered from what the package brings along."""

from __future__ import annotations

from rich.text import Text

from ..planning.fingerprint import can_trace
from ..planning.pretrace import ASKED, QUESTION
from ..render import terminal, words
from ..render.visible import Console
from ..usecases import other_trainers, plan
from .console import waiting

LADDER = ASKED[:4]
"""The models of the demo's table, the smallest first."""


def demo() -> None:
    """Answer the main question: QLoRA of a 70B model, on 80 GB and on 48 GB; then what 7B to 70B need."""
    console = Console()
    with waiting(f"Planning {LADDER[-1]}"):
        job = {**QUESTION, "model": LADDER[-1], "gpu": "a100-80gb"}
        answer = {**plan(job), "other_trainers": other_trainers(job, trace=False)}
    terminal.show(answer, console)
    smaller = _on(answer, "a6000")
    console.print()
    console.print(Text(words.verdict(smaller), terminal.STATES[words.state(smaller)]))
    table = terminal.ladder()
    for name in LADDER:
        with waiting(f"Planning {name}"):
            terminal.ladder_row(table, plan({**QUESTION, "model": name}))
    console.print(Text("\nThe same job for smaller models", "bold"))
    console.print(table, highlight=False)
    _say_what_else(console)


def _on(answer: dict, gpu: str) -> dict:
    """The answer, with its verdict on another card. A test holds that verdict against a plan for that card."""
    fit = next(fit for fit in answer["fits"] if fit["gpu"] == gpu)
    return {**answer, "job": {**answer["job"], "gpu": gpu}, "fits": [fit]}


def _say_what_else(console: Console) -> None:
    console.print(Text("\nAny other model, method, length or card:", "bold"))
    console.print("  vramplan estimate ORG/MODEL -m lora -b 4 -s 4096 -g rtx-4090", highlight=False)
    if not can_trace():
        text = (
            'That runs the step on the meta device, which needs torch: pip install "vramplan[trace]"; here: make venv'
        )
        console.print(text, highlight=False, markup=False)
