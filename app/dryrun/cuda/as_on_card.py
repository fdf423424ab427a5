"""What a card refuses and the meta device takes: raised by the rules, and told as the stack's own refusal."""

from __future__ import annotations


class AsOnCard(Exception):
    """A refusal that a rule raises in the stack's place. Its other base class is what the stack raises."""


class ErrorOnCard(AsOnCard, RuntimeError):
    """What a card answers with a RuntimeError."""


class BadValueOnCard(AsOnCard, ValueError):
    """What a card answers with a ValueError."""
