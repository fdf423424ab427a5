"""Integers that remember what they were computed from: one run for every batch and length of its kind.

PyTorch asks a ``SymInt`` for its arithmetic through its ``node`` (torch/csrc/utils/python_symnode.h); torch.compile
puts sympy there, which takes minutes for a training step. Here a node is a value and a
:class:`~vramplan.memory.sizes.Size`. The program runs as it does with the value; wherever it looks at one (a comparison,
``int()``), what it saw becomes a condition, unless it is so for every batch and length. Where the conditions hold, the
program does the same again.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, floor, inf

import sympy
import torch
import torch.fx.experimental.symbolic_shapes as symbolic_shapes

from ..memory import sizes
from ..memory.sizes import FUNCTIONS, OPPOSITE, Number, Size, decide, floordiv, function, remainder, text_of
from .sandbox import replaced

_PYTHON = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_STAND_IN = sympy.Symbol("s0")


class Conditions(dict[str, None]):
    """What holds where the program does again what it did, as text."""

    def __init__(self):
        super().__init__()
        self.answers: dict[tuple, bool] = {}

    def see(self, comparison: str, left: Number | str, right: Number | str) -> None:
        self[f"{_text(left)} {comparison} {_text(right)}"] = None

    def decide(self, value: bool, comparison: str, left: Number | str, right: Number | str) -> bool:
        """What a program is told that asks, and the answer is ``value``."""
        self.see(comparison if value else OPPOSITE[comparison], left, right)
        return value


class _Way(Conditions):
    """One way through a question: at every turn that what is known leaves open, it is told its ``turns``, and when they
    are at an end, what is so. ``taken``: what it was told."""

    def __init__(self, turns: list[bool]):
        super().__init__()
        self.turns = turns
        self.taken: list[bool] = []
        self._between: dict[Size, list[float]] = {}

    def decide(self, value: bool, comparison: str, left: Number | str, right: Number | str) -> bool:
        asked = _threshold(comparison, left) if right == 0 and isinstance(left, Size) else None
        if asked is not None:
            what, least, up = asked
            bounds = self._between.setdefault(what, [-inf, inf])
            if bounds[0] >= least or bounds[1] < least:
                return (bounds[0] >= least) == up
        if len(self.taken) < len(self.turns):
            value = self.turns[len(self.taken)]
        self.taken.append(value)
        if asked is None:
            return super().decide(value, comparison, left, right)
        bounds[value != up] = least if value == up else least - 1
        return value

    def __str__(self) -> str:
        between = []
        for what, (low, high) in self._between.items():
            least, most = "" if low == -inf else f"{low} <= ", "" if high == inf else f" <= {high}"
            between.append(f"{least}{text_of(what)}{most}")
        return " and ".join([*between, *self])


def _threshold(comparison: str, difference: Size) -> tuple[Size, int, bool] | None:
    """``difference comparison 0`` as a question whether a size is at least a number, and whether that is the answer, or
    its opposite; None: it is no such question."""
    terms = {atoms: value for atoms, value in difference.terms.items() if atoms}
    constant, by = difference.terms.get((), 0), terms[min(terms)]
    if comparison in ("==", "!=") or any(value % by for value in terms.values()):
        return None
    least = -constant // by + 1 if (comparison in (">", "<=")) == (by > 0) else -(constant // by)
    size = Size({atoms: value // by for atoms, value in terms.items()})
    return size, least, (comparison[0] == ">") == (by > 0)


class Node:
    """What a ``SymInt``, ``SymFloat`` or ``SymBool`` is made of.

    ``value`` is the number of this run; ``form`` where it is from: a :data:`~vramplan.memory.sizes.Number` for integers,
    text otherwise (of a bool: (comparison, left, right), or its value alone where it is so everywhere). ``seen``
    are the conditions.
    """

    __slots__ = ("value", "form", "seen")
    shape_env = None  # "xla symnode path" of symbolic_shapes._guard_or: it asks the node
    expr = _STAND_IN  # what asks for free symbols finds one, and none that is unbacked

    def __init__(self, value, form, seen: Conditions):
        self.value, self.form, self.seen = value, form, seen

    def _of(self, value, form) -> Node:
        return Node(value, form, self.seen)

    @property
    def pytype(self) -> type:
        return type(self.value)

    @property
    def hint(self):
        return self.value

    _hint = hint

    @property
    def node(self) -> Node:
        return self

    def clone(self) -> Node:
        return self

    def is_int(self) -> bool:
        return type(self.value) is int

    def is_float(self) -> bool:
        return type(self.value) is float

    def is_bool(self) -> bool:
        return type(self.value) is bool

    def is_nested_int(self) -> bool:
        return False

    def nested_int(self) -> None:
        return None

    def has_hint(self) -> bool:
        return True

    def is_constant(self) -> bool:
        return False

    def is_symbolic(self) -> bool:
        return True

    def str(self) -> str:
        return text_of(self.form) if self.is_int() else str(self.form)

    _graph_repr = str

    def maybe_as_int(self) -> int | None:
        return self.form if type(self.form) is int else None

    constant_int = maybe_as_int

    def maybe_as_float(self) -> None:
        return None

    def maybe_as_bool(self) -> bool | None:
        return self.form if type(self.form) is bool else None

    def wrap_int(self, value: int) -> Node:
        return self._of(int(value), int(value))

    def wrap_float(self, value: float) -> Node:
        return self._of(float(value), repr(float(value)))

    def wrap_bool(self, value: bool) -> Node:
        return self._of(value, value)

    # --- what the program sees --------------------------------------------------------------------------------

    def guard_int(self, file: str = "", line: int = 0) -> int:
        if type(self.form) is not int:
            self.seen.see("==", self.form, self.value)
        return self.value

    def guard_float(self, file: str = "", line: int = 0) -> float:
        self.seen.see("==", self.form, repr(self.value))
        return self.value

    def guard_bool(self, file: str = "", line: int = 0) -> bool:
        if type(self.form) is not bool:
            self.form = self.value = self.seen.decide(self.value, *self.form)
        return self.value

    guard_size_oblivious = guard_or_false = guard_or_true = expect_true = statically_known_true = guard_bool

    def expect_size(self, file: str = "", line: int = 0) -> bool:
        return True

    def bool_(self) -> bool:
        return self.guard_bool()

    def int_(self) -> int:
        return self.guard_int()

    # --- arithmetic -------------------------------------------------------------------------------------------

    def _number(self, other: Node, sign: str, exact: Callable[[Number, Number], Number], value) -> Node:
        if self.is_int() and other.is_int():
            return self._of(value, exact(self.form, other.form))
        return self._of(value, f"({_text(self.form)} {sign} {_text(other.form)})")

    def add(self, other: Node) -> Node:
        return self._number(other, "+", operator.add, self.value + other.value)

    def sub(self, other: Node) -> Node:
        return self._number(other, "-", operator.sub, self.value - other.value)

    def mul(self, other: Node) -> Node:
        return self._number(other, "*", operator.mul, self.value * other.value)

    def floordiv(self, other: Node) -> Node:
        return self._number(other, "//", floordiv, self.value // other.value)

    int_floordiv = floordiv

    def mod(self, other: Node) -> Node:
        return self._number(other, "%", remainder, self.value % other.value)

    def truediv(self, other: Node) -> Node:
        form = f"({_text(self.form)} / {_text(other.form)})"
        exact = self.is_int() and other.is_int()
        return self._of(self.value / other.value, _Quotient(form, self.form, other.form) if exact else form)

    int_truediv = float_truediv = truediv

    def pow(self, other: Node) -> Node:
        if self.is_int() and type(other.form) is int and other.form >= 0:
            return self._of(self.value**other.value, functools.reduce(operator.mul, [self.form] * other.form, 1))
        return self._of(self.value**other.value, f"({_text(self.form)} ** {_text(other.form)})")

    pow_by_natural = float_pow = pow

    def neg(self) -> Node:
        return self.wrap_int(0).sub(self) if self.is_int() else self._of(-self.value, f"(-{self.form})")

    def sym_max(self, other: Node) -> Node:
        return self._choice("max", other, max(self.value, other.value))

    def sym_min(self, other: Node) -> Node:
        return self._choice("min", other, min(self.value, other.value))

    def _choice(self, name: str, other: Node, value) -> Node:
        if not (self.is_int() and other.is_int()):
            return self._of(value, f"{name}({_text(self.form)}, {_text(other.form)})")
        larger = decide(">=", self.form - other.form)
        if larger is None:
            return self._of(value, function(name, self.form, other.form))
        return self if larger == (name == "max") else other

    def sym_sum(self, others: list[Node]) -> Node:
        return functools.reduce(Node.add, others)

    def sym_float(self) -> Node:
        return self if self.is_float() else self._of(float(self.value), f"float({_text(self.form)})")

    def ceil(self) -> Node:
        return self if self.is_int() else self._rounded(ceil)

    def floor(self) -> Node:
        return self if self.is_int() else self._rounded(floor)

    trunc = round = floor

    def _rounded(self, how: Callable[[float], int]) -> Node:
        value = how(self.value)
        if isinstance(self.form, _Quotient):
            above, below = self.form.above, self.form.below
            return self._of(value, floordiv(above, below) if how is floor else 0 - floordiv(0 - above, below))
        self.seen.see("==", f"{how.__name__}({self.form})", value)
        return self.wrap_int(value)

    # --- comparison -------------------------------------------------------------------------------------------

    def _compare(self, comparison: str, other: Node) -> Node:
        value = _PYTHON[comparison](self.value, other.value)
        if not (self.is_int() and other.is_int()):
            return self._of(value, (comparison, self.form, other.form))
        difference = self.form - other.form
        always = decide(comparison, difference)
        return self._of(value, value if always is not None else (comparison, difference, 0))

    def eq(self, other: Node) -> Node:
        return self._compare("==", other)

    def ne(self, other: Node) -> Node:
        return self._compare("!=", other)

    def lt(self, other: Node) -> Node:
        return self._compare("<", other)

    def le(self, other: Node) -> Node:
        return self._compare("<=", other)

    def gt(self, other: Node) -> Node:
        return self._compare(">", other)

    def ge(self, other: Node) -> Node:
        return self._compare(">=", other)

    def sym_and(self, other: Node) -> Node:
        return self.wrap_bool(self.guard_bool() and other.guard_bool())

    def sym_or(self, other: Node) -> Node:
        return self.wrap_bool(self.guard_bool() or other.guard_bool())

    and_, or_ = sym_and, sym_or

    def sym_not(self) -> Node:
        if type(self.form) is bool:
            return self.wrap_bool(not self.value)
        return self._of(not self.value, (OPPOSITE[self.form[0]], *self.form[1:]))

    def sym_ite(self, yes: Node, no: Node) -> Node:
        return yes if self.guard_bool() else no

    # --- shapes (torch/fx/experimental/sym_node.py sizes_strides_methods) -------------------------------------

    def is_contiguous(self, sizes, strides) -> Node:
        return self.wrap_bool(_follows(sizes, strides, range(len(sizes) - 1, -1, -1)))

    def is_channels_last_contiguous_2d(self, sizes, strides) -> Node:
        return self.wrap_bool(_follows(sizes, strides, (1, 3, 2, 0)))

    def is_channels_last_contiguous_3d(self, sizes, strides) -> Node:
        return self.wrap_bool(_follows(sizes, strides, (1, 4, 3, 2, 0)))

    def is_channels_last_strides_2d(self, sizes, strides) -> Node:
        return self.wrap_bool(_descends(sizes, strides, (1, 3, 2, 0)))

    def is_channels_last_strides_3d(self, sizes, strides) -> Node:
        return self.wrap_bool(_descends(sizes, strides, (1, 4, 3, 2, 0)))

    def is_non_overlapping_and_dense(self, sizes, strides) -> Node:
        smaller = functools.cmp_to_key(
            lambda a, b: 0 if _is(strides[a], strides[b]) else -1 if _below(strides[a], strides[b]) else 1
        )
        return self.wrap_bool(_follows(sizes, strides, sorted(range(len(sizes)), key=smaller)))


class _Quotient(str):
    """The text of one integer divided by another, as a float: rounded, it is an integer function of both (as long as
    they are below 2**53)."""

    def __new__(cls, text: str, above: Number, below: Number):
        self = super().__new__(cls, text)
        self.above, self.below = above, below
        return self


def _text(form: Number | str) -> str:
    return form if isinstance(form, str) else text_of(form)


def _is(first: Node, second: Node | int) -> bool:
    return first.eq(second if isinstance(second, Node) else first.wrap_int(second)).guard_bool()


def _below(first: Node, second: Node) -> bool:
    return first.lt(second).guard_bool()


def _follows(sizes: list[Node], strides: list[Node], order) -> bool:
    """Whether the dimensions lie one within the other in ``order``, the innermost first, without gaps."""
    if len(sizes) != len(order):
        return False
    if any(_is(size, 0) for size in sizes):
        return True
    expected = sizes[0].wrap_int(1) if sizes else None
    for n in order:
        if _is(sizes[n], 1):
            continue
        if not _is(strides[n], expected):
            return False
        expected = expected.mul(sizes[n])
    return True


def _descends(sizes: list[Node], strides: list[Node], order) -> bool:
    """``_eval_is_channels_last_strides``: strides grow in ``order``, and tell it from the usual one."""
    if len(sizes) != len(order) or _is(strides[1], 0):
        return False
    low = sizes[0].wrap_int(0)
    for n in order:
        if _is(sizes[n], 0) or _below(strides[n], low):
            return False
        if n == 0 and _is(low, strides[1]):
            return False
        low = strides[n].mul(sizes[n]) if not _is(sizes[n], 1) else strides[n]
    return True


def symbol(name: str, value: int, seen: Conditions) -> torch.SymInt:
    """An integer of this ``value`` that stands for all; ``seen`` collects what holds for this one alone."""
    return torch.SymInt(Node(value, Size.symbol(name), seen))


def called(name: str, *numbers: int | torch.SymInt) -> int | torch.SymInt:
    """The function of this ``name`` in :data:`~vramplan.memory.sizes.FUNCTIONS` of these numbers: a size like any other,
    whatever it asks on its way."""
    nodes = [number.node for number in numbers if isinstance(number, torch.SymInt)]
    value = FUNCTIONS[name](*(number.node.value if isinstance(number, torch.SymInt) else number for number in numbers))
    form = sizes.call_of(name, *map(size_of, numbers))
    return torch.SymInt(nodes[0]._of(value, form)) if nodes else value


def sym_predicate(about: tuple, question: Callable[..., bool], *numbers: int | torch.SymInt) -> bool:
    """``question(*numbers)``, where the answer becomes a condition, not how it was found: every way through the
    question is walked. ``about`` tells the question from others."""
    nodes = [number.node for number in numbers if isinstance(number, torch.SymInt)]
    if not nodes:
        return question(*numbers)
    seen, key = nodes[0].seen, (*about, *map(size_of, numbers))
    if key not in seen.answers:
        seen.answers[key], condition = _explored(question, numbers)
        if condition:
            seen[condition] = None
    return seen.answers[key]


def _explored(question: Callable[..., bool], numbers: tuple) -> tuple[bool, str]:
    """What is true, and the ways that lead there, as one condition; none where every way does."""
    ways: list[tuple[bool, str]] = []
    ahead: list[list[bool]] = [[]]
    while ahead:
        way = _Way(ahead.pop())
        mine = (
            torch.SymInt(Node(number.node.value, number.node.form, way)) if isinstance(number, torch.SymInt) else number
            for number in numbers
        )
        ways.append((bool(question(*mine)), str(way)))
        ahead += [[*way.taken[:n], not way.taken[n]] for n in range(len(way.turns), len(way.taken))]
    answer = ways[0][0]
    if all(said == answer for said, _ in ways):
        return answer, ""
    return answer, " or ".join(f"({how})" for said, how in ways if said == answer)


def size_of(number: int | torch.SymInt) -> Number:
    """What ``number`` is computed from."""
    return number.node.form if isinstance(number, torch.SymInt) else number


def sym_range(start, stop=None, step=1):
    """``range`` that looks at how many steps there are, not at where the last one ends."""
    start, stop = (0, start) if stop is None else (start, stop)
    if not any(isinstance(number, torch.SymInt) for number in (start, stop, step)):
        return range(start, stop, step)
    return [start + n * step for n in range(-(-(stop - start) // step))]


@contextmanager
def symbol_guards() -> Iterator[None]:
    """Let PyTorch's shape functions in Python, which are those that take symbols, ask these nodes."""
    original = symbolic_shapes._static_eval_sym_bool

    def answered(answer):
        return answer.node.guard_bool() if type(answer.node) is Node else original(answer)

    with replaced(symbolic_shapes, "_static_eval_sym_bool", answered):
        yield
