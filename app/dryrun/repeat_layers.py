"""A trace of the whole model from runs with few layers.

This file finds the repeated layers of a bare model and makes copies with few layers. The trace log of the short run is
then repeated to the whole depth (:mod:`vramplan.memory.repeat`).

The assumption is that a layer's events depend on its modules and on its neighbours, not on its number. Every job tests
it: a second, deeper run must equal the short run repeated to that depth, event for event. Otherwise the whole model
runs.
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
from torch.utils._python_dispatch import _disable_current_modes

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
"""The classes of a list of layers."""
ENOUGH = 0.75
"""The part of the model's modules that both short runs together may have. With more, the whole model runs."""
GENERAL_EVENTS = 30000
"""The most events of a run with symbols. An event takes half a millisecond there."""
APART = 3
"""The number of first layers that a model may treat differently by their number."""
WORTH = 0.05
"""The least part of the model's modules that a shortened list must leave out."""


class Layers(NamedTuple):
    """Layers that run one after another.

    ``paths``: the fqns of their lists; lists of one parent and one length go together. ``types``: the type of each
    layer, layers of one type being alike. ``sizes``: how many modules each layer has. ``numbers``: the attributes that
    hold a layer's own number, as (list fqn, path within the layer, attribute).
    """

    paths: tuple[str, ...]
    types: tuple[int, ...]
    sizes: tuple[int, ...]
    numbers: tuple[tuple[str, str, str], ...]


Trace = Callable[[torch.nn.Module], TraceLog]
"""A function that runs a job on a copy of the bare model."""


def folded_log(
    model: torch.nn.Module,
    trace: Trace,
    names: Iterable[str] = (),
    general: Trace | None = None,
    copies: Sequence[str] = ("",),
) -> TraceLog | Expansion:
    """The trace log of ``trace(model)``, from as few layers as possible.

    ``trace`` gets a copy of the model, which it may change. ``names``: the module names in the job; a name with a
    layer's number makes that layer unlike the others. ``general``: the same run with symbols for sizes; the result then
    has its sizes. ``copies``: the prefixes of the model's own fqns and of those of its copies that run beside it. Loops
    over tokens are repeated last (:func:`~vramplan.dryrun.token_loops.repeat_tokens`).

    Raises :class:`NotRepeatable` where such a loop cannot be repeated.
    """
    return repeat_tokens(_folded_log(model, trace, names, general, copies))


def _folded_log(
    model, trace: Trace, names: Iterable[str], general: Trace | None, copies: Sequence[str]
) -> TraceLog | Expansion:
    try:
        return fold(model, trace, names, general, copies)
    except NotRepeatable as reason:
        log.info("not folded: %s", reason)
    trace_log = trace(shortened(model, [], []))
    return trace_log if general is None else _generalised(trace_log, general, shortened(model, [], []))


def _generalised(trace_log: TraceLog, general: Trace, model: torch.nn.Module) -> TraceLog:
    """``trace_log`` with the sizes of ``general(model)``, which are functions of batch and length.

    The names of operators are not compared: with symbols, ``should_fold`` may choose another product.

    Raises :class:`NotRepeatable` where the two runs differ, and where ``general`` would take minutes.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/LinearAlgebra.cpp ``should_fold``.
    """
    if len(trace_log.events) > GENERAL_EVENTS:
        raise NotRepeatable(f"{len(trace_log.events)} events are too many to be run with symbols")
    symbolic = general(model)
    if trace_log.events != symbolic.events or trace_log.marks != symbolic.marks:
        raise NotRepeatable("with symbols for sizes the events are others")
    pairs = list(zip(trace_log.allocations, symbolic.allocations, strict=True))
    if any(numeric[1:4] != other[1:4] for numeric, other in pairs):
        raise NotRepeatable("with symbols for sizes the allocations are others")
    return replace(trace_log, allocations=[numeric._replace(size=other.size) for numeric, other in pairs])


def fold(
    model: torch.nn.Module,
    trace: Trace,
    names: Iterable[str] = (),
    general: Trace | None = None,
    copies: Sequence[str] = ("",),
) -> Expansion:
    """The trace log of ``trace(model)`` from two shorter runs. Raises :class:`NotRepeatable` where they disagree.

    The :data:`WAYS` are tried in turn, first the one that worked for this model before. ``general`` is slow: unless an
    allocation grows with the depth, it runs for the short model only, and ``trace`` for the deeper one.
    """
    for name in names:
        if re.search(r"(^|\.)\d+(\.|$)", name):
            raise NotRepeatable(f"the job names a layer by its number: {name}")
    if not repeated(model):
        raise NotRepeatable("no layers repeat")
    runs: dict[tuple, TraceLog] = {}
    for apart, radius in sorted(_ways(model), key=lambda way: way != _way.get(model)):
        try:
            trace_log = _Fold(model, repeated(model, apart), trace, radius, general, runs, copies).trace_log()
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
"""The ways to decide which layers are alike: (how many first layers are unlike all others, how many neighbours on each
side must be alike too)."""


def _ways(model: torch.nn.Module) -> Sequence[tuple[int, int]]:
    """The :data:`WAYS` for this model.

    Only those with layers apart, where the layers' parent has another list of modules, with one for each layer that a
    config names: the model takes features at these layers, and uses them elsewhere by their number.
    """
    takes_features = any(
        isinstance(child, LISTS) and len(child) == len(value) < len(group.types)
        for group in repeated(model)
        for child in model.get_submodule(group.paths[0].rpartition(".")[0]).children()
        for holder in _holders(model, group.paths[0])
        for name, value in _public(holder)
        if _selects(name, value, len(group.types))
    )
    return [way for way in WAYS if way[0]] if takes_features else WAYS


_way: WeakKeyDictionary[torch.nn.Module, tuple[int, int]] = WeakKeyDictionary()
"""The way that worked for a bare model. Its next run has the same layers."""


class _Fold:
    """The short runs of one model.

    A depth lists, for each group of layers, the numbers of the layers that are kept. ``base`` is the depth whose run is
    repeated, ``whole`` that of the whole model. ``runs`` are the trace logs so far, by depth. ``copies`` are the
    prefixes of the fqns of the model and of its copies.
    """

    def __init__(
        self, model, groups: list[Layers], trace: Trace, radius: int, general: Trace | None, runs: dict, copies
    ):
        self.copies = copies
        self.model, self.groups, self.trace, self.radius, self.general = model, groups, trace, radius, general
        self.runs: dict[tuple, TraceLog] = runs
        self.whole = [range(len(group.types)) for group in groups]
        self.base = self._depth(1)
        self.modules = _modules(model)

    def trace_log(self) -> Expansion:
        """The trace log of the whole model."""
        shortest, deeper = self.base, self._depth(2)
        if not self.groups or self._size(shortest) + self._size(deeper) > ENOUGH * self._size(self.whole):
            raise NotRepeatable("too few layers repeat")
        try:
            expand(self._run(shortest), self._stacks(deeper))  # raises before the deeper run
            growth = growth_of(self._run(shortest), self._stacks(deeper), self._run(deeper))
        except NotRepeatable as error:
            log.info("the shortest run is not repeated: %s", error)
            growth = self._repeat_deeper(shortest, deeper)
        short = self._run(self.base)
        if growth and self.general is not None:
            return _Fold(self.model, self.groups, self.general, self.radius, None, {}, self.copies).trace_log()
        if growth:
            growth = self._growth(short, deeper, growth)
        if self.general is not None:
            short = _generalised(short, self.general, shortened(self.model, self.groups, self.base))
        return expand(short, self._stacks(self.whole), growth)

    def _repeat_deeper(self, shortest: list[list[int]], deeper: list[list[int]]) -> dict[int, Number]:
        """Make the deeper run the one that is repeated. It has a first, an inner and a last layer of each type.

        The test is then: the deeper run equals itself when its layers are repeated, and the shortest run equals the
        deeper one without some of its layers. Nothing may grow with the depth.
        """
        self.base = deeper
        for depth in (deeper, shortest):
            if not same(expand(self._run(deeper), self._stacks(depth)).trace_log(), self._run(depth)):
                raise NotRepeatable("neither run is the other one with more layers or fewer")
        return {}

    def _growth(self, short: TraceLog, deeper: list, growth: dict[int, Number]) -> dict[int, Number]:
        """By how many bytes allocations are larger in the whole model than in the short one, by key.

        The growth must be a linear function of the number of layers of each type. It is observed in as many runs as
        the whole model's numbers need to be a combination of theirs, and then predicted for one more run as a test.
        """
        observed = [(self._counts(deeper), growth)]
        target = self._counts(self.whole)
        more: list[set[tuple]] = [set() for _ in self.groups]
        for number, group in enumerate(self.groups):
            for window in inner_windows(group.types, self.radius):
                if combination(target, [counts for counts, _ in observed]) is not None:
                    break
                added = [{window} if n == number else set() for n in range(len(self.groups))]
                depth = self._depth(1, added)
                counts = self._counts(depth)
                if combination(counts, [earlier for earlier, _ in observed]) is None:
                    observed.append((counts, growth_of(short, self._stacks(depth), self._run(depth))))
                    more[number].add(window)
        check = self._depth(3) if len(observed) == 1 else self._depth(2, more)
        if self._size(check) > ENOUGH * self._size(self.whole):
            raise NotRepeatable("too few layers repeat to foresee how memory grows with depth")
        if not same(expand(short, self._stacks(check), self._scaled(observed, check)).trace_log(), self._run(check)):
            raise NotRepeatable("memory does not grow in proportion to depth")
        return self._scaled(observed, self.whole)

    def _scaled(self, observed: list[tuple[list[int], dict[int, Number]]], depth) -> dict[int, Number]:
        """The growth at ``depth``, as a combination of the observed ones."""
        factors = combination(self._counts(depth), [counts for counts, _ in observed])
        if factors is None:
            raise NotRepeatable("memory grows with the depths of several types of layers")
        total: dict[int, Number | Fraction] = defaultdict(Fraction)
        for factor, (_, growth) in zip(factors, observed, strict=True):
            for key, size in growth.items():
                total[key] += factor * size
        if any(size.denominator != 1 for size in total.values()):
            raise NotRepeatable("memory grows by parts of bytes")
        return {key: with_int_coefficients(size) for key, size in total.items()}

    def _size(self, depth: Sequence[Sequence[int]]) -> int:
        """How many modules a run at ``depth`` has."""
        pairs = zip(self.groups, depth, strict=True)
        left_out = ((g.sizes, set(range(len(g.sizes))).difference(kept)) for g, kept in pairs)
        return self.modules - sum(sizes[index] for sizes, indices in left_out for index in indices)

    def _depth(self, repeats: int, more: Sequence[set[tuple]] | None = None) -> list[list[int]]:
        """The least depth in which each window of types occurs ``repeats`` times, and those of ``more`` once more."""
        extra = more or [set()] * len(self.groups)
        pairs = zip(self.groups, extra, strict=True)
        return [shorten(group.types, repeats, self.radius, windows) for group, windows in pairs]

    def _run(self, depth: Sequence[Sequence[int]]) -> TraceLog:
        """The trace log of the model at ``depth``."""
        key = tuple((group.paths, *kept) for group, kept in zip(self.groups, depth, strict=True))
        if key not in self.runs:
            say(f"running the step with {sum(map(len, depth))} of {sum(map(len, self.whole))} layers")
            self.runs[key] = self.trace(shortened(self.model, self.groups, depth))
        return self.runs[key]

    def _stacks(self, depth: Sequence[Sequence[int]]) -> list[Stack]:
        def types(group, kept):
            return tuple(group.types[index] for index in kept)

        return [
            Stack(self._paths(group), types(group, a), types(group, b), self.radius)
            for group, a, b in zip(self.groups, self.base, depth, strict=True)
        ]

    def _paths(self, group: Layers) -> tuple[str, ...]:
        return tuple(prefix + path for prefix in self.copies for path in group.paths)

    def _counts(self, depth: Sequence[Sequence[int]]) -> list[int]:
        """How many more layers of each type there are at ``depth`` than in the run that is repeated."""
        counts: Counter = Counter({(n, kind): 0 for n, group in enumerate(self.groups) for kind in group.types})
        for sign, layers in ((1, depth), (-1, self.base)):
            for n, (group, kept) in enumerate(zip(self.groups, layers, strict=True)):
                for index in kept:
                    counts[n, group.types[index]] += sign
        return list(counts.values())


# --- finding ------------------------------------------------------------------------------------------------


_repeated: WeakKeyDictionary[torch.nn.Module, dict[int, list[Layers]]] = WeakKeyDictionary()


def repeated(model: torch.nn.Module, apart: int = 0) -> list[Layers]:
    """The layers of a bare model of which some can be left out; see :func:`_find_layers`. The answer is cached."""
    cached = _repeated.setdefault(model, {})
    if apart not in cached:
        cached[apart] = _find_layers(model, apart)
    return cached[apart]


def _find_layers(model: torch.nn.Module, apart: int) -> list[Layers]:
    """The outermost lists of layers of which some can be left out.

    ``apart``: how many first layers are unlike all others. Where a config names some layers of a list by their number,
    these are unlike all others instead.
    """
    groups: list[Layers] = []
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
                groups.append(group)
                taken.update(paths)
        for name, child in parent.named_children():
            if f"{path}{name}" not in taken:
                look(child, f"{path}{name}.")

    look(model, "")
    return groups


_counted: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


def _modules(model: torch.nn.Module) -> int:
    """How many modules a bare model has."""
    if model not in _counted:
        _counted[model] = sum(1 for _ in model.modules())
    return _counted[model]


Facts = dict[Any, Any]
"""What a layer is made of: everything that can change what it allocates, by where it is written."""


def _layers(model: torch.nn.Module, paths: tuple[str, ...], apart: int) -> Layers:
    """The layers of these lists, with a type for each: layers of equal facts are of one type."""
    lists = [model.get_submodule(path) for path in paths]
    depth = len(lists[0])
    facts: list[Facts] = [{} for _ in range(depth)]
    for path, entries in zip(paths, lists, strict=True):
        for index, layer in enumerate(entries):
            _add_facts(facts[index], path, layer)
    sizes = tuple(sum(not name for _, _, name in layer) for layer in facts)
    numbers = _own_numbers(facts)
    for layer in facts:
        for key in numbers:
            layer.pop(key, None)
    attributes = [entry for holder in _holders(model, paths[0]) for entry in _public(holder)]
    _add_listed(facts, attributes, apart)
    _add_periods(facts, attributes)
    return Layers(paths, _number(facts), sizes, tuple(numbers))


def _own_numbers(facts: list[Facts]) -> list:
    """The keys of integers that only count the layers: value minus the layer's number is the same for all layers."""
    offsets = defaultdict(list)
    for index, layer in enumerate(facts):
        for key, value in layer.items():
            if type(value) is int:
                offsets[key].append(value - index)
    return [key for key, values in offsets.items() if len(values) > 1 and len(set(values)) == 1]


def _add_listed(facts: list[Facts], attributes: list[tuple[str, Any]], apart: int) -> None:
    """Add what lists in the config and in parents say of each layer: an entry, or whether its number is listed."""
    depth = len(facts)
    for name, value in attributes:
        for index, layer in enumerate(facts):
            if _selects(name, value, depth):
                layer[name] = (index if index in value else None) if apart else index in value
            elif _has_entry_per_layer(value, depth):
                layer[name] = _plain(value[index])
    if not any(value and _selects(name, value, depth) for name, value in attributes):
        for index, layer in enumerate(facts[:apart]):
            layer["apart"] = index


def _add_periods(facts: list[Facts], attributes: list[tuple[str, Any]]) -> None:
    """Add each layer's position in a period that the config names.

    Where the layers themselves alternate with that period, their facts say so already. Otherwise their parent may
    treat them differently.
    """
    types = _number(facts)
    for name, period in attributes:
        if type(period) is int and 1 < period < len(facts) and _PERIODIC.search(name):
            if len(set(types)) == 1 or types[period:] != types[:-period]:
                for index, layer in enumerate(facts):
                    layer[name] = index % period


def _number(facts: list[Facts]) -> tuple[int, ...]:
    """A number for each layer: equal facts get equal numbers, in the order of their first appearance."""
    numbers: dict[frozenset, int] = {}
    return tuple(numbers.setdefault(frozenset(layer.items()), len(numbers)) for layer in facts)


def _holders(model: torch.nn.Module, path: str) -> list[dict[str, Any]]:
    """The attributes of the objects that may hold the depth of the list at ``path``.

    These are its parents, up to the last one that has the nearest config, and that config.
    """
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


def _public(holder: dict[str, Any]) -> list[tuple[str, Any]]:
    """The attributes without a leading underscore."""
    return [(name, value) for name, value in holder.items() if not name.startswith("_")]


def _has_entry_per_layer(value: Any, depth: int) -> bool:
    """Whether ``value`` is a list with one entry for each layer."""
    return isinstance(value, (list, tuple)) and len(value) == depth


def _selects(name: str, value: Any, depth: int) -> bool:
    """Whether ``value`` is a list of layer numbers."""
    return (
        isinstance(value, (list, tuple))
        and all(type(number) is int and 0 <= number < depth for number in value)
        and sorted(set(value)) == list(value)
        and _SPEAKS_OF_LAYERS.search(name) is not None
    )


_SPEAKS_OF_LAYERS = re.compile("layer|block|depth|ind(ex|ices)|idx")
_PERIODIC = re.compile("(interval|period|pattern|every|freq|sparse_step|layer_step)")


def _add_facts(facts: Facts, fqn: str, layer: torch.nn.Module) -> None:
    """Add classes, shapes, dtypes and plain attributes of a layer of the list ``fqn``, by (fqn, path, name)."""
    for path, module in layer.named_modules():
        facts[fqn, path, ""] = type(module)
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                facts[fqn, path, name] = _plain(tensor)
        attributes = vars(module)
        for name in attributes.keys() - _MACHINERY:
            value = attributes[name]
            # A probability of 0 or 1 changes what runs. Others do not: DropPath has another one for each layer.
            drops = "drop" in name and isinstance(value, float) and 0 < value < 1
            facts[fqn, path, name] = "drops" if drops else _plain(value)


_MACHINERY = vars(torch.nn.Module()).keys()
"""The attributes that every module has."""


def _plain(value: Any) -> Any:
    """A hashable form of ``value``, without what cannot matter on the meta device. Unknown objects equal themselves."""
    return _plain_form(type(value))(value)


@functools.cache
def _plain_form(kind: type) -> Callable[[Any], Any]:
    """:func:`_plain` for values of one type. It goes by type because ``isinstance`` of a config is slow."""
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
    return next((form for kinds, form in plain.items() if issubclass(kind, kinds)), unknown)


# --- shortening ---------------------------------------------------------------------------------------------


def shortened(model: torch.nn.Module, groups: Sequence[Layers], kept: Sequence[Sequence[int]]) -> torch.nn.Module:
    """A copy of the bare ``model`` with only the ``kept`` layers of each group, renumbered; its config agrees."""
    lists = [
        (model.get_submodule(path), indices)
        for group, indices in zip(groups, kept, strict=True)
        for path in group.paths
    ]
    saved = [entries._modules for entries, _ in lists]
    try:
        for (entries, indices), modules in zip(lists, saved, strict=True):
            entries._modules = {str(new): modules[str(old)] for new, old in enumerate(indices)}
        memo: dict[int, Any] = {}
        _copy_tensors(model, memo)
        short = copy.deepcopy(model, memo)
    finally:
        for (entries, _), modules in zip(lists, saved, strict=True):
            entries._modules = modules
    for group, indices in zip(groups, kept, strict=True):
        for path, within, attribute in group.numbers:
            for new, (old, layer) in enumerate(zip(indices, short.get_submodule(path), strict=True)):
                module = _submodule(layer, within)
                if module is not None and attribute in vars(module):
                    vars(module)[attribute] += new - old
    _shorten_depths(short, groups, kept)
    return short


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model with tensors of its own, which no tracker has recorded. On the meta device it costs nothing."""
    with _disable_current_modes():
        memo: dict[int, Any] = {}
        if next(model.parameters()).is_meta:
            _copy_tensors(model, memo)
        return copy.deepcopy(model, memo)


def _submodule(module: torch.nn.Module, path: str) -> torch.nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _copy_tensors(model: torch.nn.Module, memo: dict[int, Any]) -> None:
    """Put copies of the tensors into the memo of :func:`copy.deepcopy`. Tensors that share a storage go on to do so."""
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
    """Shorten what the parents of the lists and their configs say of the depth.

    That is: the depth itself, an integer equal to the number of layers, with a name like layers, blocks or depth; lists
    with one entry for each layer; lists of layer numbers. Where two groups of one config have the same depth and keep
    different layers, an entry could belong to either, and it stays.
    """
    wanted: dict[tuple[int, int], tuple[dict[str, Any], set[tuple[int, ...]]]] = {}
    for group, indices in zip(groups, kept, strict=True):
        for holder in _holders(short, group.paths[0]):
            wanted.setdefault((id(holder), len(group.types)), (holder, set()))[1].add(tuple(indices))
    for (_, depth), (holder, choices) in wanted.items():
        if len(choices) > 1:
            continue
        (indices,) = choices
        for name, value in _public(holder):
            if type(value) is int:
                if value == depth and _SPEAKS_OF_LAYERS.search(name):
                    holder[name] = len(indices)
            elif _selects(name, value, depth):
                holder[name] = type(value)(new for new, old in enumerate(indices) if old in value)
            elif _has_entry_per_layer(value, depth):
                holder[name] = type(value)(value[index] for index in indices)
