"""Bytes that are known exactly, or within an interval."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

GIB = 1 << 30


class Amount(NamedTuple):
    """Bytes: the least, what is expected, the most."""

    low: int
    expected: int
    high: int

    @staticmethod
    def exact(value: int) -> Amount:
        """An amount that is known."""
        return Amount(value, value, value)

    @staticmethod
    def sum(amounts: Iterable[Amount]) -> Amount:
        """Several amounts together."""
        columns = [*zip(*amounts, strict=True)]
        return Amount(*(sum(column) for column in columns))

    def __sub__(self, other: Amount) -> Amount:
        """What is left of an amount when another is taken: least where most is taken."""
        return Amount(self.low - other.high, self.expected - other.expected, self.high - other.low)
