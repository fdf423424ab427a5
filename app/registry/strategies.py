"""How a job is spread over cards. Planned is one card; the others are refused, each with what to do instead.

A strategy that is planned has no ``refusal``. How to add one: ``docs/add-a-strategy.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class Strategy:
    """One way to spread a job. ``refusal`` says why it is not planned (None: it is), ``hint`` what to do instead."""

    refusal: str | None = None
    hint: str = ""


_NOT_YET = Strategy("several cards are not planned yet", "plan one card's share with strategy single")

STRATEGIES: dict[str, Strategy] = {
    "single": Strategy(),
    "ddp": _NOT_YET,
    "fsdp2": _NOT_YET,
    "zero1": _NOT_YET,
    "zero2": _NOT_YET,
    "zero3": _NOT_YET,
    "tensor-parallel": _NOT_YET,
    "device-map": _NOT_YET,
}
"""By the name that a job gives it."""

if TYPE_CHECKING:
    StrategyName = str
else:
    StrategyName = Literal[tuple(STRATEGIES)]
