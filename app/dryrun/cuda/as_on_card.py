"""The errors of a GPU that the meta device does not raise. Rules raise them; they count as the stack's refusals."""

from __future__ import annotations


class AsOnCard(Exception):
    """A refusal that a rule raises in the stack's place. Its other base class is what the stack raises."""


class ErrorOnCard(AsOnCard, RuntimeError):
    """What a card answers with a RuntimeError."""


class BadValueOnCard(AsOnCard, ValueError):
    """What a card answers with a ValueError."""
