"""Integers that remember what they were computed from, so that one run holds for many batches and lengths.

A :class:`torch.SymInt` does its arithmetic through its ``node``. In torch.compile a node holds a sympy expression,
which takes minutes for a training step. Here a node (:class:`Node`) holds a value and a
:class:`~vramplan.memory.sizes.Size`, a polynomial of the batch, the length and the number of multiprocessors.

The program runs as it does with the value. Where it looks at a value, by a comparison or ``int()``, the answer becomes
a condition (:class:`Conditions`), unless it is the same for every batch and length. For every batch and length for
which the conditions hold, the program does the same.

Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/csrc/utils/python_symnode.h ``PythonSymNodeImpl``: the
methods of a node that PyTorch calls.
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
"""What PyTorch finds where it asks a node for a sympy expression."""


class Conditions(dict[str, None]):
    """What must hold of batch, length and multiprocessors for the program to do the same: a set of texts, in order.

    ``answers`` keeps the answers of :func:`sym_predicate`.
    """

    def __init__(self):
        super().__init__()
        self.answers: dict[tuple, bool] = {}

    def add(self, comparison: str, left: Number | str, right: Number | str) -> None:
        """Add the condition ``left comparison right``."""
        self[f"{_text(left)} {comparison} {_text(right)}"] = None

    def decide(self, value: bool, comparison: str, left: Number | str, right: Number | str) -> bool:
        """The answer to a program that asks whether ``left comparison right``, which is ``value`` in this run."""
        self.add(comparison if value else OPPOSITE[comparison], left, right)
        return value


class _Path(Conditions):
    """One path through the branches of a predicate (:func:`sym_predicate`).

    At a branch that earlier answers leave open, the predicate gets the next of the ``preset`` answers. When they are
    used up it gets the true answer. ``taken``: all the answers that it got.
    """

    def __init__(self, preset: list[bool]):
        super().__init__()
        self.preset = preset
        self.taken: list[bool] = []
        self._bounds: dict[Size, list[float]] = {}

    def decide(self, value: bool, comparison: str, left: Number | str, right: Number | str) -> bool:
        threshold = _threshold(comparison, left) if right == 0 and isinstance(left, Size) else None
        if threshold is not None:
            size, least, positive = threshold
            bounds = self._bounds.setdefault(size, [-inf, inf])
            if bounds[0] >= least or bounds[1] < least:
                return (bounds[0] >= least) == positive
        if len(self.taken) < len(self.preset):
            value = self.preset[len(self.taken)]
        self.taken.append(value)
        if threshold is None:
            return super().decide(value, comparison, left, right)
        bounds[value != positive] = least if value == positive else least - 1
        return value

    def __str__(self) -> str:
        ranges = []
        for size, (low, high) in self._bounds.items():
            least, most = "" if low == -inf else f"{low} <= ", "" if high == inf else f" <= {high}"
            ranges.append(f"{least}{text_of(size)}{most}")
        return " and ".join([*ranges, *self])


def _threshold(comparison: str, difference: Size) -> tuple[Size, int, bool] | None:
    """``difference comparison 0`` as ``size >= least``: (size, least, whether the two are equal or opposite).

    None where the comparison has no such form.
    """
    terms = {atoms: value for atoms, value in difference.terms.items() if atoms}
    constant, by = difference.terms.get((), 0), terms[min(terms)]
    if comparison in ("==", "!=") or any(value % by for value in terms.values()):
        return None
    least = -constant // by + 1 if (comparison in (">", "<=")) == (by > 0) else -(constant // by)
    size = Size({atoms: value // by for atoms, value in terms.items()})
    return size, least, (comparison[0] == ">") == (by > 0)


class Node:
    """The node of a ``SymInt``, ``SymFloat`` or ``SymBool``.

    ``value``: the number in this run. ``form``: what it is computed from. That is a
    :data:`~vramplan.memory.sizes.Number` for an integer, and text for a float. For a bool it is (comparison, left,
    right), or the value alone where it holds for every batch and length. ``conditions``: where answers are noted.

    The methods without a docstring are those of PyTorch's protocol, with its names.
    """

    __slots__ = ("value", "form", "conditions")
    shape_env = None  # symbolic_shapes._guard_or then asks the node itself ("xla symnode path")
    expr = _STAND_IN  # it has free symbols, and none that is unbacked

    def __init__(self, value, form, conditions: Conditions):
        self.value, self.form, self.conditions = value, form, conditions

    def _of(self, value, form) -> Node:
        return Node(value, form, self.conditions)

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

    # --- what the program looks at -----------------------------------------------------------------------------

    def guard_int(self, file: str = "", line: int = 0) -> int:
        if type(self.form) is not int:
            self.conditions.add("==", self.form, self.value)
        return self.value

    def guard_float(self, file: str = "", line: int = 0) -> float:
        self.conditions.add("==", self.form, repr(self.value))
        return self.value

    def guard_bool(self, file: str = "", line: int = 0) -> bool:
        if type(self.form) is not bool:
            self.form = self.value = self.conditions.decide(self.value, *self.form)
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
            numerator, divisor = self.form.numerator, self.form.divisor
            rounded = floordiv(numerator, divisor) if how is floor else 0 - floordiv(0 - numerator, divisor)
            return self._of(value, rounded)
        self.conditions.add("==", f"{how.__name__}({self.form})", value)
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

    # --- shapes (sizes_strides_methods of torch/fx/experimental/sym_node.py) ----------------------------------

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
            lambda a, b: 0 if _equal(strides[a], strides[b]) else -1 if _less(strides[a], strides[b]) else 1
        )
        return self.wrap_bool(_follows(sizes, strides, sorted(range(len(sizes)), key=smaller)))


class _Quotient(str):
    """The text of one integer divided by another as a float. Rounded, it is an integer function of both.

    That is exact as long as both are below 2**53.
    """

    def __new__(cls, text: str, numerator: Number, divisor: Number):
        self = super().__new__(cls, text)
        self.numerator, self.divisor = numerator, divisor
        return self


def _text(form: Number | str) -> str:
    return form if isinstance(form, str) else text_of(form)


def _equal(first: Node, second: Node | int) -> bool:
    return first.eq(second if isinstance(second, Node) else first.wrap_int(second)).guard_bool()


def _less(first: Node, second: Node) -> bool:
    return first.lt(second).guard_bool()


def _follows(sizes: list[Node], strides: list[Node], order) -> bool:
    """Whether a tensor is dense: its dimensions are nested in ``order``, the innermost first, without gaps."""
    if len(sizes) != len(order):
        return False
    if any(_equal(size, 0) for size in sizes):
        return True
    expected = sizes[0].wrap_int(1) if sizes else None
    for n in order:
        if _equal(sizes[n], 1):
            continue
        if not _equal(strides[n], expected):
            return False
        expected = expected.mul(sizes[n])
    return True


def _descends(sizes: list[Node], strides: list[Node], order) -> bool:
    """Whether strides grow in ``order``, and the tensor is not contiguous in the usual order as well.

    Restates ``_eval_is_channels_last_strides`` of torch/fx/experimental/sym_node.py.
    """
    if len(sizes) != len(order) or _equal(strides[1], 0):
        return False
    low = sizes[0].wrap_int(0)
    for n in order:
        if _equal(sizes[n], 0) or _less(strides[n], low):
            return False
        if n == 0 and _equal(low, strides[1]):
            return False
        low = strides[n].mul(sizes[n]) if not _equal(sizes[n], 1) else strides[n]
    return True


def symbol(name: str, value: int, conditions: Conditions) -> torch.SymInt:
    """An integer that is ``value`` in this run and stands for any; ``conditions`` collects what is assumed of it."""
    return torch.SymInt(Node(value, Size.symbol(name), conditions))


def sym_function(name: str, *numbers: int | torch.SymInt) -> int | torch.SymInt:
    """A function of :data:`~vramplan.memory.sizes.FUNCTIONS`, called with these numbers.

    The result is a size like any other. What the function compares on its way becomes no condition.
    """
    nodes = [number.node for number in numbers if isinstance(number, torch.SymInt)]
    value = FUNCTIONS[name](*(number.node.value if isinstance(number, torch.SymInt) else number for number in numbers))
    form = sizes.call_of(name, *map(size_of, numbers))
    return torch.SymInt(nodes[0]._of(value, form)) if nodes else value


def sym_predicate(about: tuple, question: Callable[..., bool], *numbers: int | torch.SymInt) -> bool:
    """``question(*numbers)``, whose answer becomes a condition.

    Every path through the question's branches is walked, so that the condition is that of the answer, not that of
    one path. ``about`` identifies the question: it is asked once for the same numbers.
    """
    nodes = [number.node for number in numbers if isinstance(number, torch.SymInt)]
    if not nodes:
        return question(*numbers)
    conditions, key = nodes[0].conditions, (*about, *map(size_of, numbers))
    if key not in conditions.answers:
        conditions.answers[key], condition = _explored(question, numbers)
        if condition:
            conditions[condition] = None
    return conditions.answers[key]


def _explored(question: Callable[..., bool], numbers: tuple) -> tuple[bool, str]:
    """The answer in this run, and the paths that lead to the same answer, as one condition.

    The condition is empty where every path leads there. The first path is that of this run.
    """
    results: list[tuple[bool, str]] = []
    unexplored: list[list[bool]] = [[]]
    while unexplored:
        path = _Path(unexplored.pop())
        arguments = (
            torch.SymInt(Node(number.node.value, number.node.form, path))
            if isinstance(number, torch.SymInt)
            else number
            for number in numbers
        )
        results.append((bool(question(*arguments)), str(path)))
        unexplored += [[*path.taken[:n], not path.taken[n]] for n in range(len(path.preset), len(path.taken))]
    answer = results[0][0]
    if all(result == answer for result, _ in results):
        return answer, ""
    return answer, " or ".join(f"({condition})" for result, condition in results if result == answer)


def number_of(size: int | torch.SymInt) -> int:
    """A symbol's own value in this run, which becomes no condition."""
    return size.node.value if isinstance(size, torch.SymInt) else size


def size_of(number: int | torch.SymInt) -> Number:
    """What ``number`` is computed from: a polynomial, or an integer as it is."""
    return number.node.form if isinstance(number, torch.SymInt) else number


def sym_range(start, stop=None, step=1):
    """``range`` for symbols. The number of steps becomes a condition, the bounds do not."""
    start, stop = (0, start) if stop is None else (start, stop)
    if not any(isinstance(number, torch.SymInt) for number in (start, stop, step)):
        return range(start, stop, step)
    return [start + n * step for n in range(-(-(stop - start) // step))]


@contextmanager
def symbol_guards() -> Iterator[None]:
    """PyTorch's shape functions in Python, which take symbols, ask these nodes while the context lasts."""
    original = symbolic_shapes._static_eval_sym_bool

    def guarded(answer):
        return answer.node.guard_bool() if type(answer.node) is Node else original(answer)

    with replaced(symbolic_shapes, "_static_eval_sym_bool", guarded):
        yield
