"""What the running trace sets for the functions that PyTorch calls without a tracker."""

from __future__ import annotations

from dataclasses import dataclass

from .card_facts import Card


@dataclass
class Running:
    """The card of the running trace, and whether attention's math kernel is running."""

    card: Card = Card()
    in_math_attention: bool = False


running = Running()
"""The one instance: one trace runs at a time in a process (:mod:`vramplan.dryrun.sandbox`)."""
