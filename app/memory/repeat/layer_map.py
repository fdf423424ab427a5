"""Which layer of the whole model takes the place of a layer of the short run, and what its modules are called there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from .ownership import FqnOwner, owner_of_fqn
from .stacks import NotRepeatable, Stack

WholeLayer = tuple[int, int]
"""A layer of the whole model: (index of its stack, layer)."""

K = TypeVar("K")
V = TypeVar("V")


class Memo(dict[K, V]):
    """A dict that computes an entry when it is first asked for."""

    def __init__(self, compute: Callable[[K], V]):
        super().__init__()
        self._compute = compute

    def __missing__(self, key: K) -> V:
        value = self[key] = self._compute(key)
        return value


class LayerMap:
    """The layers of the whole model, each with its template in the short run.

    ``templates`` has, by stack and layer, the position of the template. ``owner_of`` has the owner of every module of
    the short run. A layer is *single* if its template stands for no other layer.
    """

    def __init__(self, stacks: Sequence[Stack]):
        self.stacks = stacks
        self.templates = [stack.templates() for stack in stacks]
        self._single = [_single_uses(templates) for templates in self.templates]
        self.owner_of: Memo[str, FqnOwner | None] = Memo(lambda fqn: owner_of_fqn(fqn, stacks))
        self.names: dict[WholeLayer | None, Memo[str, str]] = {}
        self.names_in(None)  # the first one: profiles list the names outside the layers first

    def is_single(self, layer: WholeLayer | None) -> bool:
        """Whether what is written for ``layer`` stands for itself alone; None: what no layer owns does."""
        return layer is None or self.templates[layer[0]][layer[1]] in self._single[layer[0]]

    def distance(self, position: int, layer: WholeLayer) -> int:
        """How far ``position`` of the same stack is from the template of ``layer``."""
        return position - self.templates[layer[0]][layer[1]]

    def counterpart(self, stack: int, position: int, layer: WholeLayer | None) -> int:
        """The layer that is meant in ``layer`` where the template of ``layer`` means the one at ``position``.

        A neighbour stays a neighbour. Beyond the radius, a single layer means a single layer; others mean the one that
        is as far away, if the layers between are of the same types (several layers use what one of them made). Raises
        :class:`NotRepeatable` where neither is so.
        """
        shifted = None  # as far from ``layer`` as ``position`` is from its template
        if layer is not None and layer[0] == stack:
            distance = self.distance(position, layer)
            shifted = layer[1] + distance
            if abs(distance) <= self.stacks[stack].radius:
                return shifted
        if self.is_single(layer):
            single = self._single[stack].get(position)
            if single is not None:
                return single
        if layer is not None and shifted is not None and self._same_types_between(stack, position, layer[1]):
            return shifted
        raise NotRepeatable(f"layer {position} of {self.stacks[stack].list_fqns[0]} is used from afar")

    def _same_types_between(self, number: int, position: int, layer: int) -> bool:
        """Whether the layers between ``layer`` and its counterpart have the types that they have in the short run."""
        stack, template = self.stacks[number], self.templates[number][layer]
        other = layer + position - template
        if stack.loop or not 0 <= other < len(stack.whole_types):
            return False
        if position < template:
            return stack.short_types[position + 1 : template] == stack.whole_types[other + 1 : layer]
        return stack.short_types[template + 1 : position] == stack.whole_types[layer + 1 : other]

    def names_in(self, layer: WholeLayer | None) -> Memo[str, str]:
        """What the modules of the short run are called where ``layer`` stands for its template.

        All iterations of a loop that have one template share these names.
        """
        key = layer
        if layer is not None and self.stacks[layer[0]].loop:
            key = layer[0], self.templates[layer[0]][layer[1]]
        names = self.names.get(key)
        if names is None:
            names = self.names[key] = Memo(lambda fqn: self._name(fqn, layer))
        return names

    def _name(self, fqn: str, layer: WholeLayer | None) -> str:
        found = self.owner_of[fqn]
        if found is None:
            return fqn
        counterpart = self.counterpart(found.stack, found.position, layer)
        if self.stacks[found.stack].loop:
            return found.list_fqn.rpartition(".")[0] + found.suffix
        return f"{found.list_fqn}.{counterpart}{found.suffix}"


def _single_uses(templates: Sequence[int]) -> dict[int, int]:
    """By position the layer, for those that stand for one layer only."""
    uses = Counter(templates)
    return {position: layer for layer, position in enumerate(templates) if uses[position] == 1}
