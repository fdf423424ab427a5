"""Run a few layers instead of all: find the repeated layers of a bare model, run it short, repeat what they did.

What a layer does is taken to depend on what it is made of and on its neighbours, not on its number. Every job puts that
to the test: the short run is repeated to the depth of a second, deeper run, and only if it then equals that run event
for event is it repeated to the whole depth. In every other case the whole model is run.
"""

from __future__ import annotations

import copy
import enum
import functools
import logging
import re
import types as python
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import transformers

from ..errors import PlanError
from ..memory.events import TraceLog
from ..memory.repeat import (
    Expansion,
    NotRepeatable,
    Stack,
    combination,
    expand,
    growth_of,
    inner_windows,
    same,
    shorten,
)
from ..memory.sizes import Number, with_int_coefficients
from ..progress import say
from .diagnose import survive
from .token_loops import repeat_tokens
from .tracker import DataDependent

log = logging.getLogger(__name__)

LISTS = (torch.nn.ModuleList, torch.nn.Sequential)
ENOUGH = 0.75
"""Folding is tried where both short runs together have at most this part of the modules."""
GENERAL_EVENTS = 30000
"""Runs of more events are not repeated with symbols, half a millisecond each."""
APART = 3
"""Layers at the beginning that a model may treat otherwise by their number."""
WORTH = 0.05
"""Lists are shortened where that leaves out at least this part of the model's modules."""


class Layers(NamedTuple):
    """Layers that run one after another: the paths of their lists, the type of every layer and how many modules it has.

    ``numbers`` are the integers that are merely a layer's own number: (list path, path within the layer, attribute).
    """

    paths: tuple[str, ...]
    types: tuple[int, ...]
    sizes: tuple[int, ...]
    numbers: tuple[tuple[str, str, str], ...]


Trace = Callable[[torch.nn.Module], TraceLog]


def folded_log(
    model: torch.nn.Module, trace: Trace, names: Iterable[str] = (), general: Trace | None = None
) -> TraceLog | Expansion:
    """The books of ``trace(model)``, without running more layers than it takes to know them.

    ``trace`` may change the model it is given: it is always a copy, ``model`` itself stays as it is. ``names`` are the
    module names that the job spells out: one with a layer's number in it makes that layer unlike the others.
    ``general`` runs the same with sizes that are functions: then the books are its. Loops of which few tokens were run
    are repeated last; raises :class:`NotRepeatable` where they cannot be.
    """
    return repeat_tokens(_folded_log(model, trace, names, general))


def _folded_log(model, trace: Trace, names: Iterable[str], general: Trace | None) -> TraceLog | Expansion:
    try:
        return fold(model, trace, names, general)
    except NotRepeatable as reason:
        log.info("not folded: %s", reason)
    trace_log = trace(shortened(model, [], []))
    return trace_log if general is None else _generalised(trace_log, general, shortened(model, [], []))


def _generalised(trace_log: TraceLog, general: Trace, model: torch.nn.Module) -> TraceLog:
    """``books`` with the sizes that ``general(model)`` gives. Raises :class:`NotRepeatable` where it does something else,
    and where it would take minutes.

    Which operator multiplies is not compared: ``should_fold`` (native/LinearAlgebra.cpp) asks strides that symbols do
    not tell.
    """
    if len(trace_log.events) > GENERAL_EVENTS:
        raise NotRepeatable(f"{len(trace_log.events)} events are too many to be run with symbols")
    theirs = general(model)
    if trace_log.events != theirs.events or trace_log.marks != theirs.marks:
        raise NotRepeatable("with sizes that are functions the events are others")
    pairs = list(zip(trace_log.allocations, theirs.allocations))
    if any(mine[1:4] != other[1:4] for mine, other in pairs):
        raise NotRepeatable("with sizes that are functions the entries are others")
    return replace(trace_log, allocations=[mine._replace(size=other.size) for mine, other in pairs])


def fold(model: torch.nn.Module, trace: Trace, names: Iterable[str] = (), general: Trace | None = None) -> Expansion:
    """The books of ``trace(model)`` from two shorter runs. Raises :class:`NotRepeatable` where they do not prove it.

    Tried are the :data:`WAYS`, first the one in which this model was folded before. With ``general``, which is slow,
    the proof is ``trace``'s as long as no allocation grows with the depth.
    """
    for name in names:
        if re.search(r"(^|\.)\d+(\.|$)", name):
            raise NotRepeatable(f"the job names a layer by its number: {name}")
    if not repeated(model):
        raise NotRepeatable("no layers repeat")
    runs: dict[tuple, TraceLog] = {}
    for apart, radius in sorted(_ways(model), key=lambda way: way != _way.get(model)):
        try:
            trace_log = _Fold(model, repeated(model, apart), trace, radius, general, runs).trace_log()
        except (PlanError, DataDependent):  # so would the whole model
            raise
        except NotRepeatable as error:
            log.info("not folded with %d layers apart and %d neighbours: %s", apart, radius, error)
        except Exception as error:
            survive(error, "running a shorter model")
            log.info("the short model does not run: %s: %s", type(error).__name__, error)
        else:
            _way[model] = apart, radius
            return trace_log
    raise NotRepeatable("in no way that was tried do the layers repeat")


WAYS = ((0, 1), (APART, 1), (0, 2))
"""How layers are told to be alike: how many at the beginning are like no other, and how many neighbours on either side
are to be alike too."""


def _ways(model: torch.nn.Module) -> Sequence[tuple[int, int]]:
    """The :data:`WAYS`, of them those with layers apart where beside the layers there is a list of modules with one for
    each that a config names: features are taken there, and added by number elsewhere."""
    counted = any(
        isinstance(child, LISTS) and len(child) == len(value) < len(group.types)
        for group in repeated(model)
        for child in model.get_submodule(group.paths[0].rpartition(".")[0]).children()
        for holder in _holders(model, group.paths[0])
        for name, value in _open(holder)
        if _selects(name, value, len(group.types))
    )
    return [way for way in WAYS if way[0]] if counted else WAYS


_way: WeakKeyDictionary[torch.nn.Module, tuple[int, int]] = WeakKeyDictionary()
"""In which of them a bare model was folded: the next run of it is of the same layers."""


class _Fold:
    """One model's short runs. A depth is, for each group, the layers that are kept; ``base`` the one that is repeated.
    ``runs`` are those made so far."""

    def __init__(self, model, groups: list[Layers], trace: Trace, radius: int, general: Trace | None, runs: dict):
        self.model, self.groups, self.trace, self.radius, self.general = model, groups, trace, radius, general
        self.runs: dict[tuple, TraceLog] = runs
        self.whole = [range(len(group.types)) for group in groups]
        self.base = self._depth(1)
        self.modules = _modules(model)

    def trace_log(self) -> Expansion:
        once, twice = self.base, self._depth(2)
        if not self.groups or self._size(once) + self._size(twice) > ENOUGH * self._size(self.whole):
            raise NotRepeatable("too few layers repeat")
        try:
            expand(self._run(once), self._stacks(twice))  # says at once what cannot be repeated
            growth = growth_of(self._run(once), self._stacks(twice), self._run(twice))
        except NotRepeatable as error:
            log.info("the shortest run is not repeated: %s", error)
            growth = self._deepened(once, twice)
        short = self._run(self.base)
        if growth and self.general is not None:
            return _Fold(self.model, self.groups, self.general, self.radius, None, {}).trace_log()
        if growth:
            growth = self._growth(short, twice, growth)
        if self.general is not None:
            short = _generalised(short, self.general, shortened(self.model, self.groups, self.base))
        return expand(short, self._stacks(self.whole), growth)

    def _deepened(self, once: list[list[int]], twice: list[list[int]]) -> dict[int, Number]:
        """Repeat the deeper run instead, where a layer need not be the first, the last and all others of its type at
        once: what is alike in it must be equal, and the shortest run what is left of it without some of its layers."""
        self.base = twice
        for depth in (twice, once):
            if not same(expand(self._run(twice), self._stacks(depth)).trace_log(), self._run(depth)):
                raise NotRepeatable("neither run is the other one with more layers or fewer")
        return {}

    def _growth(self, short: TraceLog, twice: list, growth: dict[int, Number]) -> dict[int, Number]:
        """By how many bytes allocations are larger in the whole, if that is a linear function of the numbers of layers
        of each type: observed in as many directions as it takes, and then foretold for one more run."""
        seen = [(self._counts(twice), growth)]
        target = self._counts(self.whole)
        more: list[set[tuple]] = [set() for _ in self.groups]
        for number, group in enumerate(self.groups):
            for window in inner_windows(group.types, self.radius):
                if combination(target, [counts for counts, _ in seen]) is not None:
                    break
                added = [{window} if n == number else set() for n in range(len(self.groups))]
                depth = self._depth(1, added)
                counts = self._counts(depth)
                if combination(counts, [known for known, _ in seen]) is None:
                    seen.append((counts, growth_of(short, self._stacks(depth), self._run(depth))))
                    more[number].add(window)
        check = self._depth(3) if len(seen) == 1 else self._depth(2, more)
        if self._size(check) > ENOUGH * self._size(self.whole):
            raise NotRepeatable("too few layers repeat to foresee how memory grows with depth")
        if not same(expand(short, self._stacks(check), self._scaled(seen, check)).trace_log(), self._run(check)):
            raise NotRepeatable("memory does not grow in proportion to depth")
        return self._scaled(seen, self.whole)

    def _scaled(self, seen: list[tuple[list[int], dict[int, Number]]], depth) -> dict[int, Number]:
        factors = combination(self._counts(depth), [counts for counts, _ in seen])
        if factors is None:
            raise NotRepeatable("memory grows with the depths of several types of layers")
        total: dict[int, Number | Fraction] = defaultdict(Fraction)
        for factor, (_, growth) in zip(factors, seen):
            for key, size in growth.items():
                total[key] += factor * size
        if any(size.denominator != 1 for size in total.values()):
            raise NotRepeatable("memory grows by parts of bytes")
        return {key: with_int_coefficients(size) for key, size in total.items()}

    def _size(self, depth: Sequence[Sequence[int]]) -> int:
        """The modules of a run."""
        left_out = ((g.sizes, set(range(len(g.sizes))).difference(kept)) for g, kept in zip(self.groups, depth))
        return self.modules - sum(sizes[index] for sizes, gone in left_out for index in gone)

    def _depth(self, repeats: int, more: Sequence[set[tuple]] | None = None) -> list[list[int]]:
        extra = more or [set()] * len(self.groups)
        return [shorten(group.types, repeats, self.radius, own) for group, own in zip(self.groups, extra)]

    def _run(self, depth: Sequence[Sequence[int]]) -> TraceLog:
        key = tuple((group.paths, *kept) for group, kept in zip(self.groups, depth))
        if key not in self.runs:
            say(f"running the step with {sum(map(len, depth))} of {sum(map(len, self.whole))} layers")
            self.runs[key] = self.trace(shortened(self.model, self.groups, depth))
        return self.runs[key]

    def _stacks(self, depth: Sequence[Sequence[int]]) -> list[Stack]:
        def types(group, kept):
            return tuple(group.types[index] for index in kept)

        return [
            Stack(group.paths, types(group, a), types(group, b), self.radius)
            for group, a, b in zip(self.groups, self.base, depth)
        ]

    def _counts(self, depth: Sequence[Sequence[int]]) -> list[int]:
        """How many layers of each type there are more than in the shortest run."""
        counts: Counter = Counter({(n, kind): 0 for n, group in enumerate(self.groups) for kind in group.types})
        for sign, layers in ((1, depth), (-1, self.base)):
            for n, (group, kept) in enumerate(zip(self.groups, layers)):
                for index in kept:
                    counts[n, group.types[index]] += sign
        return list(counts.values())


# --- finding ------------------------------------------------------------------------------------------------


_repeated: WeakKeyDictionary[torch.nn.Module, dict[int, list[Layers]]] = WeakKeyDictionary()


def repeated(model: torch.nn.Module, apart: int = 0) -> list[Layers]:
    """:func:`_look` for a bare model, which stays as it is: it is asked of each way in which the model is run."""
    known = _repeated.setdefault(model, {})
    if apart not in known:
        known[apart] = _look(model, apart)
    return known[apart]


def _look(model: torch.nn.Module, apart: int) -> list[Layers]:
    """The outermost lists of layers of which some can be left out; lists of one parent and one length go together.

    With ``apart`` that many layers at the beginning are like no other; of a list of which a config names some by number
    it is those that are.
    """
    found: list[Layers] = []
    least = WORTH * _modules(model)

    def look(parent: torch.nn.Module, path: str) -> None:
        zipped = defaultdict(list)
        for name, child in parent.named_children():
            if isinstance(child, LISTS) and len(child) > 2:
                zipped[len(child)].append(f"{path}{name}")
        taken = set()
        for paths in zipped.values():
            group = _layers(model, tuple(paths), apart)
            left_out = set(range(len(group.types))).difference(shorten(group.types, 2))
            if sum(group.sizes[index] for index in left_out) > least:
                found.append(group)
                taken.update(paths)
        for name, child in parent.named_children():
            if f"{path}{name}" not in taken:
                look(child, f"{path}{name}.")

    look(model, "")
    return found


_counted: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


def _modules(model: torch.nn.Module) -> int:
    """How many modules a bare model has."""
    if model not in _counted:
        _counted[model] = sum(1 for _ in model.modules())
    return _counted[model]


def _layers(model: torch.nn.Module, paths: tuple[str, ...], apart: int) -> Layers:
    """Tell the layers' types apart by all that can change what they allocate: :func:`_add_facts`."""
    lists = [model.get_submodule(path) for path in paths]
    depth = len(lists[0])
    facts: list[dict[Any, Any]] = [{} for _ in range(depth)]
    for path, entries in zip(paths, lists):
        for index, layer in enumerate(entries):
            _add_facts(facts[index], path, layer)
    sizes = tuple(sum(not name for _, _, name in known) for known in facts)
    offsets = defaultdict(list)
    for index, known in enumerate(facts):
        for key, value in known.items():
            if type(value) is int:
                offsets[key].append(value - index)
    numbers = [key for key, values in offsets.items() if len(values) > 1 and len(set(values)) == 1]
    for known in facts:
        for key in numbers:
            known.pop(key, None)
    said = [entry for holder in _holders(model, paths[0]) for entry in _open(holder)]
    for name, value in said:
        for index, known in enumerate(facts):
            if _selects(name, value, depth):
                known[name] = (index if index in value else None) if apart else index in value
            elif _lists(value, depth):
                known[name] = _plain(value[index])
    if not any(value and _selects(name, value, depth) for name, value in said):
        for index, known in enumerate(facts[:apart]):
            known["apart"] = index
    types = _number(facts)
    for name, period in said:
        if type(period) is int and 1 < period < depth and _PERIODIC.search(name):
            # Where the layers themselves alternate so, that is what it is for; else their parent may go by it.
            if len(set(types)) == 1 or types[period:] != types[:-period]:
                for index, known in enumerate(facts):
                    known[name] = index % period
    return Layers(paths, _number(facts), sizes, tuple(numbers))


def _number(facts: list[dict[Any, Any]]) -> tuple[int, ...]:
    """Equal facts get equal numbers, in the order of their first appearance."""
    seen: dict[frozenset, int] = {}
    return tuple(seen.setdefault(frozenset(known.items()), len(seen)) for known in facts)


def _holders(model: torch.nn.Module, path: str) -> list[dict[str, Any]]:
    """Where the depth of the list at ``path`` may be written: the nearest config, and the parents up to the last that
    has it."""
    holders: list[dict[str, Any]] = []
    nearest = None
    while path:
        path = path.rpartition(".")[0]
        parent = model.get_submodule(path)
        config = getattr(parent, "config", None)
        if isinstance(config, transformers.PretrainedConfig):
            if nearest is not None and config is not nearest:
                break
            nearest = config
        holders.append(vars(parent))
    return holders if nearest is None else [*holders, vars(nearest)]


def _open(holder: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in holder.items() if not name.startswith("_")]


def _lists(value: Any, depth: int) -> bool:
    """Whether ``value`` has one entry a layer."""
    return isinstance(value, (list, tuple)) and len(value) == depth


def _selects(name: str, value: Any, depth: int) -> bool:
    """Whether ``value`` is a list of some layers' numbers."""
    return (
        isinstance(value, (list, tuple))
        and all(type(number) is int and 0 <= number < depth for number in value)
        and sorted(set(value)) == list(value)
        and _SPEAKS_OF_LAYERS.search(name) is not None
    )


_SPEAKS_OF_LAYERS = re.compile("layer|block|depth|ind(ex|ices)|idx")
_PERIODIC = re.compile("(interval|period|pattern|every|freq|sparse_step|layer_step)")


def _add_facts(facts: dict[Any, Any], whose: str, layer: torch.nn.Module) -> None:
    """What a layer is made of: classes, shapes, dtypes and plain attributes, by the path of its list, path and name."""
    for path, module in layer.named_modules():
        facts[whose, path, ""] = type(module)
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                facts[whose, path, name] = _plain(tensor)
        attributes = vars(module)
        for name in attributes.keys() - _MACHINERY:
            value = attributes[name]
            # A probability of 0 or 1 changes what is run, any other (of DropPath: one a layer) does not.
            some = "drop" in name and isinstance(value, float) and 0 < value < 1
            facts[whose, path, name] = "some" if some else _plain(value)


_MACHINERY = vars(torch.nn.Module()).keys()


def _plain(value: Any) -> Any:
    """``value`` as far as it can matter to a run without values; objects of unknown make are told apart by identity."""
    return _plainly(type(value))(value)


@functools.cache
def _plainly(kind: type) -> Callable[[Any], Any]:
    """:func:`_plain` of what is of one type. The type is asked: a config looks up its class in itself every time."""
    plain: dict[tuple[type, ...], Callable[[Any], Any]] = {
        (bool, int, float, str, torch.dtype, torch.device, enum.Enum, type, type(None)): lambda value: value,
        (torch.Tensor,): lambda value: (tuple(value.shape), value.dtype, value.requires_grad, kind),
        (list, tuple): lambda value: (kind, *map(_plain, value)),
        (dict,): lambda value: ("dict", *((_plain(key), _plain(entry)) for key, entry in value.items())),
        (set, frozenset): lambda value: ("set", frozenset(map(_plain, value))),
        (functools.partial,): lambda value: ("partial", *map(_plain, (value.func, value.args, value.keywords))),
        (python.MethodType,): lambda value: value.__func__,
    }
    unknown = lambda value: ("object", kind, id(value))  # noqa: E731
    return next((how for kinds, how in plain.items() if issubclass(kind, kinds)), unknown)


# --- shortening ---------------------------------------------------------------------------------------------


def shortened(model: torch.nn.Module, groups: Sequence[Layers], kept: Sequence[Sequence[int]]) -> torch.nn.Module:
    """A copy of the bare ``model`` with only the ``kept`` layers of each group, renumbered; its config agrees."""
    lists = [(model.get_submodule(path), indices) for group, indices in zip(groups, kept) for path in group.paths]
    saved = [entries._modules for entries, _ in lists]
    try:
        for (entries, indices), modules in zip(lists, saved):
            entries._modules = {str(new): modules[str(old)] for new, old in enumerate(indices)}
        memo: dict[int, Any] = {}
        _copy_tensors(model, memo)
        short = copy.deepcopy(model, memo)
    finally:
        for (entries, _), modules in zip(lists, saved):
            entries._modules = modules
    for group, indices in zip(groups, kept):
        for path, within, attribute in group.numbers:
            for new, (old, layer) in enumerate(zip(indices, short.get_submodule(path))):
                module = _submodule(layer, within)
                if module is not None and attribute in vars(module):
                    vars(module)[attribute] += new - old
    _shorten_depths(short, groups, kept)
    return short


def _submodule(module: torch.nn.Module, path: str) -> torch.nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _copy_tensors(model: torch.nn.Module, memo: dict[int, Any]) -> None:
    """Copies of the tensors for :func:`copy.deepcopy`, storages shared as they are shared in ``model``."""
    storages: dict[int, torch.UntypedStorage] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or id(tensor) in memo:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in storages:
                storages[storage._cdata] = torch.UntypedStorage(storage.nbytes(), device="meta")
            twin = torch.empty(0, dtype=tensor.dtype, device="meta")
            twin.set_(storages[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())
            if isinstance(tensor, torch.nn.Parameter):
                twin = torch.nn.Parameter(twin, tensor.requires_grad)
            twin.__dict__.update(tensor.__dict__)
            memo[id(tensor)] = twin


def _shorten_depths(short: torch.nn.Module, groups: Sequence[Layers], kept: Sequence[Sequence[int]]) -> None:
    """Depths, lists with one entry a layer and lists of layers' numbers, in the list's parent and its config.

    A depth is an integer equal to the number of layers whose name speaks of layers, blocks or depth. Where two groups
    of one config and one depth are shortened differently, nobody knows whose it is: it stays.
    """
    wanted: dict[tuple[int, int], tuple[dict[str, Any], set[tuple[int, ...]]]] = {}
    for group, indices in zip(groups, kept):
        for holder in _holders(short, group.paths[0]):
            wanted.setdefault((id(holder), len(group.types)), (holder, set()))[1].add(tuple(indices))
    for (_, depth), (holder, choices) in wanted.items():
        if len(choices) > 1:
            continue
        (indices,) = choices
        for name, value in _open(holder):
            if type(value) is int:
                if value == depth and _SPEAKS_OF_LAYERS.search(name):
                    holder[name] = len(indices)
            elif _selects(name, value, depth):
                holder[name] = type(value)(new for new, old in enumerate(indices) if old in value)
            elif _lists(value, depth):
                holder[name] = type(value)(value[index] for index in indices)
