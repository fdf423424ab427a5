"""PyTorch's CUDA caching allocator, replayed: blocks, segments, reserved bytes, and out of memory under a limit.

Restated from ``c10/cuda/CUDACachingAllocator.cpp`` (class ``DeviceCachingAllocator``) and the constants of
``c10/core/AllocatorConfig.h``; one device, one stream. What is counted is what ``torch.cuda.memory_allocated`` and
``memory_reserved`` count: whole blocks, so the unsplit rest of a block (at most 1 MiB) counts as allocated.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 1 << 20
MIN_BLOCK = 512  # kMinBlockSize: every size is rounded up to a multiple of it
SMALL_SIZE = MIB  # kSmallSize: the largest request served from the small pool
SMALL_BUFFER = 2 * MIB  # kSmallBuffer: a segment of the small pool
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc: below it a large segment is LARGE_BUFFER
LARGE_BUFFER = 20 * MIB  # kLargeBuffer
ROUND_LARGE = 2 * MIB  # kRoundLarge: segments of MIN_LARGE_ALLOC and more
GRANULE = 32 * MIB  # what cudaMalloc takes of the address space at a time
EXPANDABLE_RANGE = 1 << 50  # the address range that an expandable segment may grow into


def round_size(size: int) -> int:
    """Bytes of the block that a request of ``size`` bytes needs (``round_size``, default options)."""
    return MIN_BLOCK if size < MIN_BLOCK else -(-size // MIN_BLOCK) * MIN_BLOCK


@dataclass(frozen=True)
class Settings:
    """``PYTORCH_ALLOC_CONF`` as far as it changes the books, and the limit.

    ``limit`` is the bytes that the allocator may reserve (``set_per_process_memory_fraction``, or the bytes
    free on the card); ``None``: no limit. ``max_split_size`` is in bytes.
    """

    expandable_segments: bool = False
    max_split_size: int | None = None
    limit: int | None = None


class OutOfMemory(Exception):
    """The allocator could not serve ``size`` bytes within its limit, even after giving back its cache."""

    def __init__(self, size: int):
        super().__init__(size)
        self.size = size


class _Addresses:
    """Where ``cudaMalloc`` puts segments; addresses order blocks of equal size, so they decide which one is taken.

    Measured on an H100 with driver 580: new segments lie below the older ones, each on a whole number of granules;
    what a segment leaves of its last granule serves later ones, the lowest such rest that is large enough first.
    """

    def __init__(self):
        self._low = 1 << 60
        self._rests: list[tuple[int, int]] = []

    def take(self, size: int) -> int:
        for at, (address, rest) in enumerate(self._rests):
            if rest >= size:
                self._rests[at : at + 1] = [(address + size, rest - size)] if rest > size else []
                return address
        region = -(-size // GRANULE) * GRANULE
        self._low -= region
        if region > size:
            insort(self._rests, (self._low + size, region - size))
        return self._low

    def give(self, address: int, size: int) -> None:
        insort(self._rests, (address, size))


class _Block:
    __slots__ = ("size", "address", "previous", "next", "free", "mapped", "small")

    def __init__(self, size: int, address: int, small: bool):
        self.size = size
        self.address = address
        self.small = small
        self.previous: _Block | None = None
        self.next: _Block | None = None
        self.free = False
        self.mapped = True


class CachingAllocator:
    """One device's allocator. ``allocated`` and ``reserved`` are bytes now; ``peak_*`` since the last reset."""

    def __init__(self, settings: Settings = Settings()):
        self.settings = settings
        self.allocated = self.peak_allocated = 0
        self.reserved = self.peak_reserved = 0
        self._live: dict[int, _Block] = {}
        # Free blocks by (size, address), as the std::set of a BlockPool; unmapped ones by (size, address) too.
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._unmapped: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._addresses = _Addresses()

    def reset_peaks(self) -> None:
        self.peak_allocated = self.allocated
        self.peak_reserved = self.reserved

    # --- taking ---------------------------------------------------------------------------------------------

    def malloc(self, key: int, size: int) -> None:
        """Serve ``size`` bytes under ``key``. Raises :class:`OutOfMemory` where CUDA's would."""
        if size == 0:
            return
        rounded = round_size(size)
        small = rounded <= SMALL_SIZE
        block = self._take_free(rounded, small)
        if block is None:
            block = self._new_block(rounded, small)
        if block is None and self.settings.max_split_size is not None and self._release_oversize(rounded):
            block = self._new_block(rounded, small)
        if block is None:
            self.empty_cache()
            block = self._new_block(rounded, small)
        if block is None:
            raise OutOfMemory(rounded)
        rest = block.size - rounded
        if rest and self._should_split(rounded, rest, small):
            self._split(block, rounded)
        self._live[key] = block
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated

    def _should_split(self, size: int, rest: int, small: bool) -> bool:
        if small or self.settings.expandable_segments:
            return rest >= MIN_BLOCK
        limit = self.settings.max_split_size
        return rest > SMALL_SIZE and (limit is None or size < limit)

    def _take_free(self, size: int, small: bool) -> _Block | None:
        """``get_free_block``: the smallest free block that is large enough, the lowest address among equals."""
        pool = self._free[small]
        at = bisect_left(pool, (size,))
        if at == len(pool):
            return None
        if self.settings.expandable_segments:
            # "the size it can expand to, not the size it currently is"
            while at + 1 < len(pool) and _room(pool[at + 1][2]) < _room(pool[at][2]):
                at += 1
        block = pool[at][2]
        split_limit = self.settings.max_split_size
        if split_limit is not None:
            if size < split_limit <= block.size:
                return None
            if size >= split_limit and block.size >= size + LARGE_BUFFER:
                return None
        pool.pop(at)
        block.free = False
        return block

    def _new_block(self, size: int, small: bool) -> _Block | None:
        """``alloc_block``: a new segment, or None where the limit forbids it. A limit (``set_fraction``) is asked about
        the whole segment, also where an expandable one would grow by less."""
        if small:
            segment = SMALL_BUFFER
        elif size < MIN_LARGE_ALLOC:
            segment = LARGE_BUFFER
        else:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.settings.expandable_segments:
            limit = self.settings.limit
            return None if limit is not None and self.reserved + segment > limit else self._expand(size, small)
        if not self._reserve(segment):
            return None
        return _Block(segment, self._addresses.take(segment), small)

    def _reserve(self, size: int) -> bool:
        limit = self.settings.limit
        if limit is not None and self.reserved + size > limit:
            return False
        self.reserved += size
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved
        return True

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.size - size, block.address + size, block.small)
        rest.previous, rest.next = block, block.next
        if block.next:
            block.next.previous = rest
        block.next = rest
        block.size = size
        self._put(self._free, rest)

    # --- giving back ----------------------------------------------------------------------------------------

    def free(self, key: int) -> None:
        """Give back what ``key`` holds and merge it with free neighbours (``free_block``)."""
        block = self._live.pop(key, None)
        if block is None:
            return
        self.allocated -= block.size
        self._put(self._free, self._merge(block))

    def _merge(self, block: _Block) -> _Block:
        for neighbour in (block.previous, block.next):
            if neighbour is None or not neighbour.free or neighbour.mapped != block.mapped:
                continue
            self._drop(self._free if neighbour.mapped else self._unmapped, neighbour)
            first, second = (neighbour, block) if neighbour is block.previous else (block, neighbour)
            first.size += second.size
            first.next = second.next
            if second.next:
                second.next.previous = first
            block = first
        return block

    @staticmethod
    def _put(pools: dict, block: _Block) -> None:
        block.free = True
        insort(pools[block.small], (block.size, block.address, block))

    @staticmethod
    def _drop(pools: dict, block: _Block) -> None:
        pool = pools[block.small]
        pool.pop(bisect_left(pool, (block.size, block.address)))
        block.free = False

    def empty_cache(self) -> None:
        """``release_cached_blocks``: give back every segment (or page) that holds nothing."""
        for small in (True, False):
            kept = []
            for entry in self._free[small]:
                block = entry[2]
                if self.settings.expandable_segments:
                    kept += self._unmap(block)
                elif block.previous is None and block.next is None:
                    self._give_segment(block)
                else:
                    kept.append(entry)
            self._free[small] = sorted(kept, key=lambda entry: entry[:2])

    def _give_segment(self, block: _Block) -> None:
        self.reserved -= block.size
        self._addresses.give(block.address, block.size)

    def _release_oversize(self, size: int) -> bool:
        """``release_available_cached_blocks``: give back unsplit blocks, the one that suffices or the largest first."""
        wanted = max(size, self.settings.max_split_size)
        pool = self._free[False]
        at = bisect_left(pool, (wanted,))
        if at < len(pool):
            victims = [pool[at]]
        else:
            victims, total = [], 0
            for entry in reversed(pool):
                if entry[0] < self.settings.max_split_size or total >= wanted:
                    break
                victims.append(entry)
                total += entry[0]
            if total < wanted:
                return False
        for entry in victims:
            if entry[2].previous is None and entry[2].next is None:
                pool.remove(entry)
                self._give_segment(entry[2])
        return True

    # --- expandable segments --------------------------------------------------------------------------------

    def _expand(self, size: int, small: bool) -> _Block | None:
        """``try_allocate_expandable_block``: map pages behind a free tail, or at the start of a new range."""
        tail = self._expandable_tail(size, small)
        mapped = tail if tail.mapped else self._map(tail, min(tail.size, size))
        while mapped is not None and mapped.size < size:
            mapped = self._map(mapped.next, min(size - mapped.size, mapped.next.size))
        if mapped is not None:
            self._drop(self._free, mapped)
        return mapped

    def _expandable_tail(self, size: int, small: bool) -> _Block:
        for _, _, block in self._unmapped[small]:
            start = block.previous if block.previous and block.previous.free else block
            room, at = 0, start
            while room < size and at is not None and at.free:
                room += at.size
                at = at.next
            if room >= size:
                return start
        block = _Block(EXPANDABLE_RANGE, self._addresses.take(EXPANDABLE_RANGE), small)
        block.mapped = False
        self._put(self._unmapped, block)
        return block

    def _map(self, block: _Block, size: int) -> _Block | None:
        page = SMALL_BUFFER if block.small else LARGE_BUFFER
        size = min(-(-size // page) * page, block.size)
        if not self._reserve(size):
            return None
        self._drop(self._unmapped, block)
        if block.size > size:
            rest = _Block(block.size - size, block.address + size, block.small)
            rest.mapped = False
            rest.previous, rest.next = block, block.next
            if block.next:
                block.next.previous = rest
            block.next, block.size = rest, size
            self._put(self._unmapped, rest)
        block.mapped = True
        block = self._merge(block)
        self._put(self._free, block)
        return block

    def _unmap(self, block: _Block) -> list[tuple[int, int, _Block]]:
        """``unmap_block``: give back the whole pages inside a free block; what is left of it stays free."""
        page = SMALL_BUFFER if block.small else LARGE_BUFFER
        base = block.address // EXPANDABLE_RANGE * EXPANDABLE_RANGE
        start = base + -(-(block.address - base) // page) * page
        end = base + (block.address - base + block.size) // page * page
        if end <= start:
            return [(block.size, block.address, block)]
        self.reserved -= end - start
        kept = []
        for low, high in ((block.address, start), (end, block.address + block.size)):
            if high > low:
                piece = _Block(high - low, low, block.small)
                piece.free = True
                kept.append((piece.size, piece.address, piece))
        middle = _Block(end - start, start, block.small)
        middle.mapped = False
        chain = [
            b
            for b in (
                block.previous,
                *(k[2] for k in kept if k[1] < start),
                middle,
                *(k[2] for k in kept if k[1] >= end),
                block.next,
            )
            if b is not None
        ]
        for left, right in zip(chain, chain[1:]):
            left.next, right.previous = right, left
        self._put(self._unmapped, self._merge(middle))
        return kept


def _room(block: _Block) -> int:
    """The size that a free block can expand to (``expandable_size`` in ``get_free_block``)."""
    tail = block.next
    return block.size + (tail.size if tail is not None and not tail.mapped else 0)


def replay(events: Iterable[int], sizes: list[int], allocator: CachingAllocator) -> None:
    """Feed ``events`` (``k`` takes ``sizes[k]`` bytes, ``~k`` gives them back) to ``allocator``."""
    for event in events:
        if event >= 0:
            allocator.malloc(event, sizes[event])
        else:
            allocator.free(~event)
