"""What a dry run leaves, to be kept: the step for every batch and length of its kind, and what is said of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from app.memory.script import Script, packed, unpacked
from app.memory.table import Table


@dataclass(frozen=True, eq=False)
class Profile:
    """``facts`` of the model, its ``table`` and ``warnings``, and the ``script`` of the step; traced at ``point``:
    batch, length and multiprocessors."""

    script: Script
    facts: dict[str, Any]
    table: Table
    warnings: list[str]
    point: tuple[int, int, int]

    @property
    def general(self) -> bool:
        """Whether it holds for more than one batch."""
        return f"b == {self.point[0]}" not in self.script.conditions

    @cached_property
    def broad(self) -> bool:
        """Whether it holds for some of the batches or lengths around its own, however divisible they are."""
        batch, length, card = self.point
        points = [(batch + n, length, card) for n in range(max(-63, 1 - batch), 64)]
        points += [(batch, length + n, card) for n in range(max(-63, 1 - length), 64)]
        return sum(self.script.holds(*point) for point in points) >= 8

    def dump(self) -> bytes:
        table = {"rows": self.table.rows, "members": self.table.members}
        told = {"facts": self.facts, "table": table, "warnings": self.warnings, "point": list(self.point)}
        return packed({**self.script.dump(), **told})

    @staticmethod
    def load(data: bytes) -> Profile:
        """What :meth:`dump` wrote. Raises :class:`ValueError` where it is damaged."""
        told = unpacked(data)
        script = Script.load(told, sha256(data).hexdigest())
        try:
            table = Table(
                told["table"]["rows"], [[(place, path) for place, path in group] for group in told["table"]["members"]]
            )
            batch, length, card = told["point"]
            return Profile(script, dict(told["facts"]), table, list(told["warnings"]), (batch, length, card))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a profile: {error}") from None
