"""What is kept of a dry run: the step for every batch and length of its kind, and what is said of the model."""

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
    """The ``template`` of a job's step, traced at ``point``, with ``facts``, a ``table`` and ``warnings`` of its
    model."""

    template: TraceTemplate
    facts: dict[str, Any]
    table: Table
    warnings: list[str]
    point: ShapePoint

    @property
    def covers_other_batches(self) -> bool:
        """Whether it holds for more than the batch at which it was traced."""
        return f"b == {self.point.batch}" not in self.template.conditions

    @cached_property
    def covers_many_points(self) -> bool:
        """Whether it holds for at least 8 of the batches and lengths within 63 of its own.

        A condition such as "the length is a multiple of 8" leaves enough of them, one on the length itself does not.
        """
        batch, length, sms = self.point
        points = [ShapePoint(batch + n, length, sms) for n in range(max(-63, 1 - batch), 64)]
        points += [ShapePoint(batch, length + n, sms) for n in range(max(-63, 1 - length), 64)]
        return sum(map(self.template.holds, points)) >= 8

    def dump(self) -> bytes:
        """The profile as bytes, to be kept."""
        table = {"rows": self.table.rows, "members": self.table.members}
        beside = {"facts": self.facts, "table": table, "warnings": self.warnings, "point": list(self.point)}
        return packed({**self.template.dump(), **beside})

    @staticmethod
    def load(data: bytes) -> Profile:
        """What :meth:`dump` wrote. Raises :class:`ValueError` where it is damaged."""
        fields = unpacked(data)
        template = TraceTemplate.load(fields, sha256(data).hexdigest())
        try:
            members = [[(number, path) for number, path in group] for group in fields["table"]["members"]]
            table = Table(fields["table"]["rows"], members)
            point = ShapePoint(*fields["point"])
            return Profile(template, dict(fields["facts"]), table, list(fields["warnings"]), point)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a profile: {error}") from None
