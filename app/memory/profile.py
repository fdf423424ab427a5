"""What a dry run leaves, to be kept: the step for every batch and length of its kind, and what is said of the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from .sizes import ShapePoint
from .table import Table
from .template import TraceTemplate, packed, unpacked


@dataclass(frozen=True, eq=False)
class Profile:
    """``facts`` of the model, its ``table`` and ``warnings``, and the ``template`` of the step, traced at ``point``."""

    template: TraceTemplate
    facts: dict[str, Any]
    table: Table
    warnings: list[str]
    point: ShapePoint

    @property
    def general(self) -> bool:
        """Whether it holds for more than one batch."""
        return f"b == {self.point.batch}" not in self.template.conditions

    @cached_property
    def covers_many_points(self) -> bool:
        """Whether it holds for some of the batches or lengths around its own, however divisible they are."""
        batch, length, sms = self.point
        points = [ShapePoint(batch + n, length, sms) for n in range(max(-63, 1 - batch), 64)]
        points += [ShapePoint(batch, length + n, sms) for n in range(max(-63, 1 - length), 64)]
        return sum(map(self.template.holds, points)) >= 8

    def dump(self) -> bytes:
        table = {"rows": self.table.rows, "members": self.table.members}
        told = {"facts": self.facts, "table": table, "warnings": self.warnings, "point": list(self.point)}
        return packed({**self.template.dump(), **told})

    @staticmethod
    def load(data: bytes) -> Profile:
        """What :meth:`dump` wrote. Raises :class:`ValueError` where it is damaged."""
        told = unpacked(data)
        template = TraceTemplate.load(told, sha256(data).hexdigest())
        try:
            table = Table(
                told["table"]["rows"], [[(place, path) for place, path in group] for group in told["table"]["members"]]
            )
            point = ShapePoint(*told["point"])
            return Profile(template, dict(told["facts"]), table, list(told["warnings"]), point)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a profile: {error}") from None
