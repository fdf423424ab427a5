"""``vramplan demo``: the main question, answered from what the package brings along."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ..planning.fingerprint import can_trace
from ..planning.pretrace import ASKED, QUESTION
from ..render import terminal, words
from ..usecases import plan
from .console import waiting

LADDER = ASKED[:4]
"""The models of the demo's table, the smallest first."""


def demo() -> None:
    """Answer the main question: QLoRA of a 70B model, on 80 GB and on 48 GB; then what 7B to 70B need."""
    console = Console()
    for card in ("a100-80gb", "a6000"):
        with waiting(f"Planning {LADDER[-1]} on {card}"):
            answer = plan({**QUESTION, "model": LADDER[-1], "gpu": card})
        if card == "a100-80gb":
            terminal.show(answer, console)
        else:
            console.print()
            console.print(Text(words.verdict(answer), terminal.STATES[words.state(answer)]))
    table = terminal.ladder()
    for name in LADDER:
        with waiting(f"Planning {name}"):
            terminal.ladder_row(table, plan({**QUESTION, "model": name}))
    console.print(Text("\nThe same job for smaller models", "bold"))
    console.print(table, highlight=False)
    console.print(Text("\nAny other model, method, length or card: ", "bold"), end="")
    console.print("vramplan estimate ORG/MODEL -m lora -b 4 -s 4096 -g rtx-4090", highlight=False)
    if not can_trace():
        console.print(
            'That runs the step on the meta device, which needs torch: pip install "vramplan[trace]" '
            "(in a checkout: make venv)",
            highlight=False,
            markup=False,
        )
