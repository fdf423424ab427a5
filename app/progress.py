"""What a long computation is doing, in words, for whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

listener: ContextVar[Callable[[str], None]] = ContextVar("listener", default=lambda words: None)


def say(words: str) -> None:
    """Tell who listens what is being done now."""
    listener.get()(words)
