"""Sizes as exact functions of batch, length and multiprocessors, and the conditions under which they hold.

A :class:`Size` is a polynomial over atoms; an atom is one of :data:`SYMBOLS` or an integer function of sizes, written
as Python writes it: ``(b*s + 127)//128``. Equal sizes have equal terms, so most questions about them have one answer
for every one of them; the others become conditions. Both are kept as text and compiled when they are needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from math import ceil, floor, lcm
from typing import Any, NamedTuple, cast

from .reduction import scratch


class ShapePoint(NamedTuple):
    """One value of everything that sizes are functions of.

    ``batch`` counts sequences (or images), ``length`` tokens of one sequence (0 where there are none), ``sms`` the
    multiprocessors of the card.
    """

    batch: int
    length: int
    sms: int


SYMBOLS = ("b", "s", "m")
"""The symbols of a :class:`ShapePoint`'s fields, in their order."""

Terms = dict[tuple[str, ...], int | Fraction]
"""The coefficient of every product of atoms, these in ascending order; ``()``: the constant."""

_SIGNED: set[str] = set()
"""Atoms that may be negative; all others are at least 0."""


class Size:
    """A polynomial of symbols and atoms, in bytes or elements.

    ``terms`` has the coefficient of every product of atoms: ``{("b", "s"): 4, (): 8}`` is ``4*b*s + 8``. Coefficients
    are ints (fractions between the steps of a computation). A constant is no ``Size``: whatever arithmetic makes
    constant comes back as ``int``.
    """

    __slots__ = ("terms", "_hash")

    def __init__(self, terms: Terms):
        self.terms = terms
        self._hash: int | None = None

    @staticmethod
    def symbol(name: str) -> Size:
        """The size that is one of :data:`SYMBOLS`."""
        return Size({(name,): 1})

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self.terms.items()))
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and self.terms == other.terms

    def __repr__(self) -> str:
        return text_of(self)

    def __add__(self, other: Size | int) -> Size | int:
        return _sum(self, other, 1)

    __radd__ = __add__

    def __sub__(self, other: Size | int) -> Size | int:
        return _sum(self, other, -1)

    def __rsub__(self, other: Size | int) -> Size | int:
        return _sum(other, self, -1)

    def __mul__(self, other: Size | int | Fraction) -> Size | int:
        out: Terms = {}
        for first, a in self.terms.items():
            for second, b in _terms(other).items():
                atoms = tuple(sorted(first + second)) if first and second else first or second
                out[atoms] = out.get(atoms, 0) + a * b
        return _size_of(out)

    __rmul__ = __mul__

    def __floordiv__(self, other: Size | int) -> Size | int:
        return floordiv(self, other)

    @property
    def denominator(self) -> int:
        """The least number that makes all coefficients whole."""
        return lcm(*(Fraction(value).denominator for value in self.terms.values()))


Number = Size | int
"""A size, whether it depends on anything or not."""


def _terms(size: Number | Fraction) -> Terms:
    return size.terms if isinstance(size, Size) else {(): size}


def _size_of(terms: Terms) -> Number:
    """The size with these terms; a constant as it is."""
    terms = {atoms: value for atoms, value in terms.items() if value}
    if not terms:
        return 0
    if len(terms) == 1 and () in terms:
        return cast(int, terms[()])  # a Fraction only within a computation whose result is whole
    return Size(terms)


def _sum(first: Number, second: Number, sign: int) -> Number:
    out = dict(_terms(first))
    for atoms, value in _terms(second).items():
        out[atoms] = out.get(atoms, 0) + sign * value
    return _size_of(out)


def with_int_coefficients(size: Number | Fraction) -> Number:
    """``size`` with ints for coefficients that are whole fractions."""
    if isinstance(size, Size):
        return Size({atoms: int(value) for atoms, value in size.terms.items()})
    return int(size)


def lower_bound(size: Number) -> int | None:
    """What ``size`` is at least, as far as its terms tell (symbols are at least 1); None: they do not."""
    if not isinstance(size, Size):
        return size
    low: int | Fraction = 0
    for atoms, value in size.terms.items():
        if atoms and (value < 0 or not _SIGNED.isdisjoint(atoms)):
            return None
        if all(atom in SYMBOLS for atom in atoms):
            low += value
    return cast(int, low)


def floordiv(size: Number, by: Number) -> Number:
    """``size // by``, always written the same way.

    Where every term is divisible there is no division left; ``-x // y`` is written as what ``x / y`` is rounded up to,
    negated.
    """
    if not isinstance(size, Size) and not isinstance(by, Size):
        return size // by
    exact = _exact_quotient(size, by)
    if exact is not None:
        return exact
    if isinstance(size, Size) and all(value < 0 for value in size.terms.values()) and (lower_bound(by) or 0) > 0:
        return -1 * function("//", -1 * size + by - 1, by)
    return function("//", size, by)


def remainder(size: Number, by: Number) -> Number:
    """``size % by``."""
    if not isinstance(size, Size) and not isinstance(by, Size):
        return size % by
    return 0 if _exact_quotient(size, by) is not None else function("%", size, by)


def _exact_quotient(size: Number, by: Number) -> Number | None:
    """``size / by`` where every term is divisible; None: not all are."""
    if len(_terms(by)) != 1 or not by:
        return None
    ((atoms, value),) = _terms(by).items()
    out: Terms = {}
    for factors, amount in _terms(size).items():
        remaining = list(factors)
        for atom in atoms:
            if atom not in remaining:
                return None
            remaining.remove(atom)
        if amount % value:
            return None
        out[tuple(remaining)] = amount // value
    return _size_of(out)


def function(name: str, first: Number, second: Number) -> Size:
    """The atom ``first // second``, ``first % second``, ``max(first, second)`` or ``min(first, second)``."""
    left, right = text_of(first), text_of(second)
    atom = f"({left}){name}({right})" if name in ("//", "%") else f"{name}({left}, {right})"
    atom = f"({atom})"
    if any(low is None or low < 0 for low in (lower_bound(first), lower_bound(second))):
        _SIGNED.add(atom)
    return Size({(atom,): 1})


FUNCTIONS: dict[str, Callable[..., int]] = {"scratch": scratch}
"""Functions of integers that sizes name (``scratch(m, 8, 4, ...)``): their values are sizes, at least 0.

They branch as they like: a size that calls one is one expression, with no condition for the way that it took.
"""


def call_of(name: str, *numbers: Number) -> Size:
    """The atom that calls the function of this ``name`` in :data:`FUNCTIONS` with these numbers."""
    return Size({(f"{name}({', '.join(map(text_of, numbers))})",): 1})


def decide(comparison: str, difference: Number) -> bool | None:
    """Whether ``difference comparison 0`` is true at every point, or false at every point; None: it depends."""
    for sign, low in ((1, lower_bound(difference)), (-1, lower_bound(-1 * difference))):
        if low is None:
            continue
        if not isinstance(difference, Size) or low > 0:
            return _COMPARE[comparison](difference if not isinstance(difference, Size) else sign * low)
        if low == 0 and (comparison, sign) in ((">=", 1), ("<", 1), ("<=", -1), (">", -1)):
            return comparison in (">=", "<=")
    return None


_COMPARE: dict[str, Callable[[int], bool]] = {
    "==": lambda d: d == 0,
    "!=": lambda d: d != 0,
    "<": lambda d: d < 0,
    "<=": lambda d: d <= 0,
    ">": lambda d: d > 0,
    ">=": lambda d: d >= 0,
}
OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
"""The comparison that is true where this one is false."""


def text_of(size: Number) -> str:
    """``size`` as Python writes it."""
    if not isinstance(size, Size):
        return str(size)
    parts = []
    for atoms, value in sorted(size.terms.items()):
        factors = [*atoms] if value == 1 and atoms else [f"({value})" if value < 0 else str(value), *atoms]
        parts.append("*".join(factors))
    return " + ".join(parts)


_SAFE = re.compile(rf"(?:max|min|ceil|floor|float|and|or|{'|'.join(FUNCTIONS)}|[bsm0-9.e+\-*/%(), <>=!])*")


def compiled(texts: Iterable[str]) -> Callable[[ShapePoint], list[Any]]:
    """A function of a point that gives the value of each text there: ints of sizes, bools of conditions.

    Raises :class:`ValueError` where a text is not arithmetic of symbols and numbers.
    """
    texts = list(texts)
    for text in texts:
        if not _SAFE.fullmatch(text):
            raise ValueError(f"not a size: {text[:80]!r}")
    source = f"lambda point: (lambda {', '.join(SYMBOLS)}: [{', '.join(texts)}])(*point)"
    known = {"max": max, "min": min, "ceil": ceil, "floor": floor, "float": float, **FUNCTIONS}
    return cast(Callable[[ShapePoint], list[Any]], eval(source, {"__builtins__": {}, **known}))
