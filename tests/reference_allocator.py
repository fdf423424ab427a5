"""PyTorch's CUDA caching allocator in plain Python: the twin that the compiled allocator is held against.

A reading of one class, method by method and by its names, ``DeviceCachingAllocator`` in
https://github.com/pytorch/pytorch/blob/v2.11.0/c10/cuda/CUDACachingAllocator.cpp. It shares no code with the compiled
one: blocks are objects that know their neighbours, pools are sets of them. It leaves out what a step without graphs
never meets (private pools), events (a free stands where its event has passed), and what is off by default (garbage
collection, rounding to parts of powers of 2).

Three things are not in the source. Addresses come from the driver: ``cuda_malloc`` has what was measured.
``limit`` is both the process's share of the card (asked in ``alloc_block``) and the end of the card (asked again in
``map_block``). An expandable segment never ends, and keeps its addresses when all of it is unmapped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from vramplan.memory.allocator.config import AllocatorConfig

MIB = 1 << 20
MIN_BLOCK_SIZE, SMALL_SIZE, SMALL_BUFFER, MIN_LARGE_ALLOC = 512, MIB, 2 * MIB, 10 * MIB  # c10/core/AllocatorConfig.h
ROUND_LARGE, LARGE_SEGMENT_SIZE, MAX_NON_SPLIT_ROUNDING_SIZE = 2 * MIB, 20 * MIB, 20 * MIB
ADDRESSES, GRANULE, EXPANDABLE_RANGE = 1 << 54, 32 * MIB, 1 << 50


class OutOfMemory(Exception):
    """The limit would be passed, even after the cache was given back."""


def round_up(size: int, unit: int) -> int:
    return (size + unit - 1) // unit * unit


def get_allocation_size(size: int) -> int:
    large = LARGE_SEGMENT_SIZE if size < MIN_LARGE_ALLOC else round_up(size, ROUND_LARGE)
    return SMALL_BUFFER if size <= SMALL_SIZE else large


@dataclass(eq=False)
class BlockPool:
    """The blocks that nobody holds, mapped or not. An expandable segment grows by ``page`` bytes."""

    page: int
    blocks: set[Block] = field(default_factory=set)

    def mapped(self, least: float = 0) -> list[Block]:
        fits = [block for block in self.blocks if block.mapped and block.size >= least]
        return sorted(fits, key=lambda block: (block.size, block.address))

    def unmapped(self) -> list[Block]:
        return sorted((block for block in self.blocks if not block.mapped), key=lambda block: block.address)


@dataclass(eq=False)
class Block:
    """A stretch of one segment, which begins at ``base``."""

    address: int
    size: int
    pool: BlockPool
    base: int
    mapped: bool = True
    allocated: bool = False
    prev: Block | None = None
    next: Block | None = None

    def splice(self, before: Block | None, after: Block | None) -> None:
        self.prev, self.next = before, after
        if before:
            before.next = self
        if after:
            after.prev = self

    def split(self, size: int) -> Block:
        """Keep ``size`` bytes; the rest goes to the pool."""
        rest = Block(self.address + size, self.size - size, self.pool, self.base, self.mapped)
        rest.splice(self, self.next)
        self.size = size
        self.pool.blocks.add(rest)
        return rest

    def expandable_size(self) -> int:
        return self.size + (self.next.size if self.next and not self.next.mapped else 0)

    def available_address_space(self) -> int:
        room, block = 0, self
        while block and not block.allocated:
            room, block = room + block.size, block.next
        return room


class ReferenceAllocator:
    """One device's allocator. ``allocated`` and ``reserved`` are bytes now; a handle is a block."""

    def __init__(self, config: AllocatorConfig):
        self.expandable = config.expandable_segments
        self.max_split_size = inf if config.max_split_size is None else config.max_split_size
        self.limit = inf if config.limit is None else config.limit
        self.pools: dict[tuple[int, bool], BlockPool] = {}  # by stream, and whether it is the small one
        self.active_blocks: set[Block] = set()
        self.low, self.rests = ADDRESSES, []
        self.allocated = self.reserved = 0

    def blocks(self) -> list[tuple[int, int]]:
        """(address, size) of every block that is allocated, by address."""
        return sorted((block.address, block.size) for block in self.active_blocks)

    def get_pool(self, size: int, stream: int) -> BlockPool:
        small = size <= SMALL_SIZE
        return self.pools.setdefault((stream, small), BlockPool(SMALL_BUFFER if small else LARGE_SEGMENT_SIZE))

    def cached(self) -> list[Block]:
        """Every free block."""
        return [block for key in sorted(self.pools) for block in self.pools[key].mapped()]

    def malloc(self, orig_size: int, stream: int = 0) -> Block:
        size = round_up(max(orig_size, 1), MIN_BLOCK_SIZE)  # round_size
        pool = self.get_pool(size, stream)
        block = self.get_free_block(pool, size) or self.alloc_block(pool, size)
        if not block and self.release_available_cached_blocks(pool, size):
            block = self.alloc_block(pool, size)
        if not block:
            self.empty_cache()
            block = self.alloc_block(pool, size)
        if not block:
            raise OutOfMemory(size)
        return self.alloc_found_block(block, size)

    def get_free_block(self, pool: BlockPool, size: int) -> Block | None:
        fits = pool.mapped(size)
        while self.expandable and len(fits) > 1 and fits[1].expandable_size() < fits[0].expandable_size():
            del fits[0]  # the best fit is by the size that a block can expand to
        if not fits or size < self.max_split_size <= fits[0].size:
            return None
        oversize = size >= self.max_split_size and fits[0].size >= size + MAX_NON_SPLIT_ROUNDING_SIZE
        return None if oversize else fits[0]

    def alloc_block(self, pool: BlockPool, size: int) -> Block | None:
        alloc_size = get_allocation_size(size)
        if self.reserved + alloc_size > self.limit:
            return None
        if self.expandable:
            return self.try_allocate_expandable_block(pool, size)
        self.reserved += alloc_size
        address = self.cuda_malloc(alloc_size)
        return Block(address, alloc_size, pool, address)

    def cuda_malloc(self, size: int) -> int:
        """The driver's address: the lowest rest that is large enough, or below all others on a whole granule. A rest
        (address, size) is what a segment left of its last granule, or a segment that was given back."""
        address, rest = min((rest for rest in self.rests if rest[1] >= size), default=(0, 0))
        if rest:
            self.rests.remove((address, rest))
        else:
            rest = round_up(size, GRANULE)
            self.low = address = self.low - rest
        self.rests += [(address + size, rest - size)] if rest > size else []
        return address

    def alloc_found_block(self, block: Block, size: int) -> Block:
        block.pool.blocks.discard(block)
        if self.should_split(block, size):
            block.split(size)
        block.allocated = True
        self.active_blocks.add(block)
        self.allocated += block.size
        return block

    def should_split(self, block: Block, size: int) -> bool:
        remaining = block.size - size
        if block.pool.page == SMALL_BUFFER or self.expandable:
            return remaining >= MIN_BLOCK_SIZE
        return size < self.max_split_size and remaining > SMALL_SIZE

    def free(self, block: Block) -> None:
        block.allocated = False
        self.active_blocks.remove(block)
        self.allocated -= block.size
        self.free_block(block)

    def free_block(self, block: Block) -> None:
        block.pool.blocks.add(block)
        self.try_merge_blocks(block, block.prev)
        self.try_merge_blocks(block, block.next)

    def try_merge_blocks(self, dst: Block, src: Block | None) -> None:
        if src is None or src.allocated or dst.mapped != src.mapped:
            return
        src.pool.blocks.remove(src)
        first, second = (src, dst) if dst.prev is src else (dst, src)
        dst.address, dst.size = first.address, dst.size + src.size
        dst.splice(first.prev, second.next)

    def release_available_cached_blocks(self, pool: BlockPool, size: int) -> bool:
        """Give back oversize blocks of this pool: one that is large enough, or else the largest ones."""
        if self.max_split_size == inf or self.expandable:  # what is expandable is passed over
            return False
        wanted, released = max(size, self.max_split_size), 0
        oversize = pool.mapped(self.max_split_size)
        enough = [block for block in oversize if block.size >= wanted]
        for block in enough[:1] or reversed(oversize):
            if released < wanted:
                released += block.size
                self.release_block(block)
        return released >= wanted

    def empty_cache(self) -> None:
        """``release_cached_blocks``"""
        for block in self.cached():
            if self.expandable:
                self.unmap_block(block)
            elif block.prev is None and block.next is None:
                self.release_block(block)

    def release_block(self, block: Block) -> None:
        block.pool.blocks.remove(block)
        self.reserved -= block.size
        self.rests.append((block.address, block.size))

    def try_allocate_expandable_block(self, pool: BlockPool, size: int) -> Block | None:
        block = self.find_expandable_block(pool, size)
        if not block.mapped and not self.map_block(block, min(block.size, size)):
            return None
        while block.size < size:  # the next one is unmapped; once mapped, it takes this one in
            remaining, block = size - block.size, block.next
            if not self.map_block(block, min(remaining, block.size)):
                return None
        return block

    def find_expandable_block(self, pool: BlockPool, size: int) -> Block:
        """The lowest address from which on free and unmapped blocks have room enough."""
        for block in pool.unmapped():
            start = block.prev if block.prev and not block.prev.allocated else block
            if start.available_address_space() >= size:
                return start
        base = self.cuda_malloc(EXPANDABLE_RANGE)
        block = Block(base, EXPANDABLE_RANGE, pool, base, mapped=False)
        pool.blocks.add(block)
        return block

    def map_block(self, block: Block, size: int) -> bool:
        size = round_up(size, block.pool.page)
        if self.reserved + size > self.limit:
            return False
        if size < block.size:
            block.split(size)
        block.mapped = True
        self.free_block(block)
        self.reserved += size
        return True

    def unmap_block(self, block: Block) -> None:
        """Give back the whole pages inside a free block. What lies before and after them stays free."""
        page, begin, end = block.pool.page, block.address - block.base, block.address - block.base + block.size
        first, last = round_up(begin, page), end // page * page
        if first < last:
            block = block.split(first - begin) if begin < first else block
            if last < end:
                block.split(last - first)
            block.mapped = False
            self.free_block(block)
            self.reserved -= last - first
