"""The arithmetic of a paged KV cache, in exact integers: pages, groups of layers, blocks, what a request takes.

Layers of one kind share a table of blocks. Where a model mixes kinds (full and sliding attention), vLLM cuts them into
groups of equally many layers, and all groups take their blocks from one pool.

Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/v1/core/kv_cache_planning.py#L416
``_get_kv_cache_groups_uniform_page_size``.
https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/v1/kv_cache_interface.py ``max_memory_usage_bytes``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ..errors import PlanError

FULL, SLIDING, CHUNKED, LATENT, CROSS = "full", "sliding", "chunked", "latent", "cross"
"""Kinds of layers: all tokens are kept, or those in a window, or in a chunk; a latent vector instead of keys and
values; an encoder's states."""


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of a token: ``bytes_per_token``. ``reach``: the tokens of its window, chunk or encoder."""

    kind: str
    bytes_per_token: int
    reach: int = 0
    block_size: int = 16

    @property
    def page(self) -> int:
        """Bytes of a block of one layer."""
        return self.bytes_per_token * self.block_size

    def blocks(self, length: int, in_flight: int) -> int:
        """Blocks that a request of ``length`` tokens takes at most, with ``in_flight`` tokens not yet settled."""
        if self.kind == SLIDING:
            return -(-min(self.reach - 1 + in_flight, length) // self.block_size) + 1
        if self.kind == CHUNKED:
            return -(-min(self.reach + in_flight, length) // self.block_size)
        if self.kind == CROSS:
            return -(-self.reach // self.block_size)
        return -(-length // self.block_size)


@dataclass(frozen=True)
class Group:
    """Layers that share a table of blocks. ``layers`` counts them, padding not among them."""

    layer: CacheLayer
    layers: int
    bytes_per_block: int


@dataclass(frozen=True)
class Pool:
    """The groups of a model (or of one stage of it), which share one pool of blocks."""

    groups: tuple[Group, ...]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block of the pool: the largest group's."""
        return max((group.bytes_per_block for group in self.groups), default=0)

    def blocks(self, length: int, in_flight: int) -> int:
        """Blocks that a request of ``length`` tokens takes of the pool."""
        return sum(group.layer.blocks(length, in_flight) for group in self.groups)

    def needed(self, length: int, in_flight: int) -> int:
        """Bytes without which a server refuses a model of this length: one request, and the block that stays empty."""
        return (self.blocks(length, in_flight) + 1) * self.bytes_per_block

    def longest(self, available: int, limit: int, in_flight: int) -> int:
        """The longest request, up to ``limit`` tokens, whose cache fits ``available`` bytes; 0: none does."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.needed(middle, in_flight) <= available else (low, middle - 1)
        return low


def pool_of(layers: list[CacheLayer]) -> Pool:
    """The pool of a model with these layers, in their order. Raises :class:`PlanError` for pages that do not match."""
    if not layers:
        return Pool(())
    if len({(layer.kind, layer.reach) for layer in layers}) == 1:
        return Pool((Group(layers[0], len(layers), sum(layer.page for layer in layers)),))
    counts = Counter(_same_pages(layers))
    least, most = min(counts.values()), max(counts.values())
    size = most if most < least * 1.5 else least
    groups = []
    for layer, count in counts.items():
        parts = -(-count // size)
        groups += [Group(layer, len(range(part, count, parts)), size * layer.page) for part in range(parts)]
    return Pool(tuple(groups))


def _same_pages(layers: list[CacheLayer]) -> list[CacheLayer]:
    """The layers with pages of one size: longer blocks where a page is a divisor of the largest.

    Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/v1/core/kv_cache_planning.py#L346
    ``unify_kv_cache_spec_page_size``.
    """
    largest = max(layer.page for layer in layers)
    if any(largest % layer.page for layer in layers):
        raise PlanError(
            "this model's kinds of layers keep unlike amounts of a token, which are packed in a way that is not "
            "modelled",
            "its weights are in the answer of vramplan estimate",
            "command",
        )
    return [replace(layer, block_size=layer.block_size * (largest // layer.page)) for layer in layers]
