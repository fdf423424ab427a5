"""PyTorch's CUDA caching allocator, replayed: blocks, segments, reserved bytes, and out of memory under a limit.

Restated from ``DeviceCachingAllocator`` in
https://github.com/pytorch/pytorch/blob/v2.11.0/c10/cuda/CUDACachingAllocator.cpp with the constants of
https://github.com/pytorch/pytorch/blob/v2.11.0/c10/core/AllocatorConfig.h, under its names: a function here is the
method there of the same name, but for the underscore. One device, one stream. ``tests/test_allocator_reference.py``
holds it against the same rules in plain Python, ``tests/test_allocator.py`` against histories that an H100 recorded.

What is counted is what ``torch.cuda.memory_allocated`` and ``memory_reserved`` count: whole blocks, in bytes. So the
unsplit rest of a block (at most 1 MiB) counts as allocated.

Note [Compiled rules]
    Rationale: a step has some hundred thousand events, and a verdict takes several replays. Objects took 2000 ns an
    event, compiled code with blocks as rows of arrays takes 20 to 90.
    Implementation: all numbers are ``uint64``, since numba asks of every signed index whether it counts from the end.
    A ``uint64`` and a Python int would make a float: hence the constants ``_0``, ``_1``, ...
    Limitation: all of it stands in this one file, since numba's cache on disk notices changes of the file that a
    function stands in, not of those that it calls.

Note [Streams]
    PyTorch keeps free blocks by stream: one stream's are never used for another. A pool is a number that
    :func:`_pool_of` makes of stream and size, and nothing else looks into it; :data:`STREAMS` is how many there are at
    most. A free that waits for an event of another stream (``record_stream``) stands in the log where that event has
    passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from ...errors import PlanError
from .config import LARGE_BUFFER, MIB, STREAMS, AllocatorConfig, ReplayInput

MIN_BLOCK_SIZE = 512  # kMinBlockSize: every size is rounded up to a multiple of it
SMALL_SIZE = MIB  # kSmallSize: the largest request served from the small pool
SMALL_BUFFER = 2 * MIB  # kSmallBuffer: a segment of the small pool
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc: below it a large segment is LARGE_BUFFER
ROUND_LARGE = 2 * MIB  # kRoundLarge: segments of MIN_LARGE_ALLOC and more are multiples of it
ADDRESS_GRANULE = 32 * MIB  # what cudaMalloc takes of the address space at a time
ADDRESS_SPACE = 1 << 54  # bytes of the address space, which fills from above
EXPANDABLE_RANGE = 1 << 50  # the address range that an expandable segment may grow into
REPEATS = 8  # how often a repeated step is served again, at most

Function = TypeVar("Function", bound=Callable[..., Any])
Uints = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Uint = Any  # an np.uint64: bytes, an address or an index. numpy's stubs know no more of an array's item than Any


def _compiled(function: Function) -> Function:
    """``function`` compiled by numba, kept on disk.

    Without numba's reference counts, as nothing here makes an array: alone that makes a replay three times as fast.
    Without the interpreter's lock: a server replays on every core.
    """
    options: dict[str, Any] = {"cache": True, "_nrt": False, "nogil": True}  # numba's stubs do not know _nrt
    return cast(Function, njit(**options)(function))


def _inlined(function: Function) -> Function:
    """``function`` as a part of those that call it.

    With all that every event calls in one piece, a replay is three times as fast.
    """
    options: dict[str, Any] = {"_nrt": False, "inline": "always"}
    return cast(Function, njit(**options)(function))


class OutOfMemory(Exception):
    """The allocator could not serve ``size`` bytes (rounded) within its limit, even after it released its cache."""

    def __init__(self, size: int):
        super().__init__(size)
        self.size = size


_U = np.uint64
_0, _1, _2, _3, _4 = map(_U, range(5))
_NONE = _U(0)  # no block; row 0 is a block that is allocated, the neighbour of all that have none
_MAX = _U((1 << 64) - 1)  # more than any size, address or place: the place of what is allocated, a limit that is none
_NEGATIVE = _U(1 << 63)  # a difference from here on is less than nothing
_MIN_BLOCK_SIZE, _SMALL_SIZE, _SMALL_PAGE, _LARGE_PAGE = map(
    _U, (MIN_BLOCK_SIZE, SMALL_SIZE, SMALL_BUFFER, LARGE_BUFFER)
)
_MIN_LARGE_ALLOC, _ROUND_LARGE = map(_U, (MIN_LARGE_ALLOC, ROUND_LARGE))
_ADDRESS_GRANULE, _EXPANDABLE_RANGE = map(_U, (ADDRESS_GRANULE, EXPANDABLE_RANGE))


class _Config(NamedTuple):
    """:class:`AllocatorConfig` for compiled code: bytes, with :data:`_MAX` for what is not limited."""

    expandable: bool
    max_split_size: np.uint64
    limit: np.uint64


def _compiled_config(config: AllocatorConfig) -> _Config:
    def bytes_of(size: int | None) -> np.uint64:
        return _MAX if size is None else _U(max(0, size))

    return _Config(config.expandable_segments, bytes_of(config.max_split_size), bytes_of(config.limit))


class _State(NamedTuple):
    """The blocks, one a row, and the pools of those that are free.

    ``blocks`` has :data:`_WIDTH` columns a row, named below; a block is known by the index where its row begins.

    A pool is a set of size classes, a size class the free blocks of one size. A hundred free blocks have about eight
    sizes, so looking through the sizes and then through one class takes less time than keeping the pool in order, as
    PyTorch does. Each pool has ``slots`` size classes. Their ``words`` hold the size (0: never used; _HOLE: used no
    more), their ``counts`` how many blocks there are; ``holes`` is a stack of those used no more. ``marks`` count a
    pool's classes by a hash of their size: where there are none, none has to be looked for. A class has ``depth``
    places in ``cells``, unordered: each holds a block's address and row.

    ``gaps`` are pairs of address and size that segments left of their last granule, by address. ``ordered`` is where
    the order of a pool is written when it is wanted, ``live`` the block of every key (its number in the log), and
    ``numbers`` the counters, named below.
    """

    blocks: Uints
    words: Uints
    counts: Uints
    holes: Uints
    marks: Uints
    cells: Uints
    gaps: Uints
    ordered: Uints
    live: Uints
    numbers: Uints
    slots: np.uint64
    depth: np.uint64


# Pools: the mapped ones first (small and large of each stream), then those of unmapped blocks, in the same order
_MAPPED_POOLS = _U(2 * STREAMS)
_POOLS = 4 * STREAMS
# Columns of _State.blocks. _PLACE: where in the cells of its _CLASS; _MAX: allocated. _NEXT_DELETED: the next unused
# row
_SIZE, _ADDRESS, _PREVIOUS, _NEXT, _PLACE, _CLASS, _POOL, _NEXT_DELETED = map(_U, range(8))
_WIDTH = _U(8)
# Places in _State.numbers; from _SLOTS and _HOLES on, those of each pool. _SEGMENTS: how often memory was reserved;
# _LOWEST: the lowest address in use; _GAPS: how many there are; _DELETED: the first unused row; _NEXT_ROW: the first
# row that was never used; _FULL: what ran out
_ALLOCATED, _RESERVED, _SEGMENTS, _LOWEST, _GAPS, _DELETED, _NEXT_ROW, _FULL = map(_U, range(8))
_SLOTS, _HOLES = _U(8), _U(8 + _POOLS)
_NO_ROWS, _NO_SLOTS, _NO_CELLS = _1, _2, _4
# A word is a size and its slot, a cell an address and its row: sizes and addresses are multiples of 512
_WORD, _SLOT, _HOLE = _1, _U(1023), _1
_CELL, _ROW, _STEP = _U(10), _U((1 << 19) - 1), _U(3)
_MOST_ROWS, _MOST_SLOTS = 1 << 19, 1 << 10
# A mark is the upper bits of a size times the golden ratio (Knuth, The Art of Computer Programming 3, 6.4)
_MARKS = 1 << 8
_GOLDEN, _UPPER, _MARK = _U(0x9E3779B97F4A7C15), _U(56), _U(8)


def _state(rows: int, keys: int, slots: int = 64, depth: int = 256) -> _State:
    """A state without blocks, with room for so many blocks, keys, size classes a pool and blocks of one size."""

    def places(count: int) -> Uints:
        return np.zeros(count, np.uint64)

    blocks = np.empty(rows * int(_WIDTH), np.uint64)
    words, counts, holes = (places(_POOLS * slots) for _ in range(3))
    cells, gaps = np.empty(_POOLS * slots * depth, np.uint64), np.empty(4 * rows, np.uint64)
    ordered, marks, numbers = np.empty(rows, np.uint64), places(_POOLS * _MARKS), places(8 + 2 * _POOLS)
    st = _State(blocks, words, counts, holes, marks, cells, gaps, ordered, places(keys), numbers, _U(slots), _U(depth))
    _clear(st)
    return st


def _clear(st: _State) -> None:
    """Forget all blocks."""
    for part in (st.words, st.marks, st.live, st.numbers):
        part.fill(0)
    st.blocks[: int(_WIDTH)] = _MAX
    st.numbers[int(_LOWEST)], st.numbers[int(_NEXT_ROW)] = ADDRESS_SPACE, _WIDTH


# --- sizes and pools ------------------------------------------------------------------------------------------


@_compiled
def round_size(size: int) -> int:
    """Bytes of the block that a request of ``size`` bytes needs (``round_size``, default options)."""
    return MIN_BLOCK_SIZE if size < MIN_BLOCK_SIZE else (size + MIN_BLOCK_SIZE - 1) // MIN_BLOCK_SIZE * MIN_BLOCK_SIZE


@_inlined
def _pool_of(stream: Uint, size: Uint) -> Uint:
    """The pool of a stream from which a block of ``size`` bytes is served (``get_pool``)."""
    return stream * _2 + (_0 if size <= _SMALL_SIZE else _1)


@_inlined
def _is_small(pool: Uint) -> Any:
    return pool & _1 == _0


@_inlined
def _is_unmapped(pool: Uint) -> Any:
    return pool >= _MAPPED_POOLS


@_inlined
def _page_of(pool: Uint) -> Uint:
    """Bytes by which an expandable segment of ``pool`` grows."""
    return _SMALL_PAGE if pool & _1 == _0 else _LARGE_PAGE


# --- rows and size classes ------------------------------------------------------------------------------------


@_inlined
def _new_block(st: _State, size: Uint, address: Uint, pool: Uint) -> Uint:
    """A block that is in no pool and has no neighbours. Where rows run out, the state is full, and a wrong one."""
    numbers, blocks = st.numbers, st.blocks
    block = numbers[_DELETED]
    if block != _NONE:
        numbers[_DELETED] = blocks[block + _NEXT_DELETED]
    else:
        block = numbers[_NEXT_ROW]
        if block + _2 * _WIDTH > _U(blocks.size):
            numbers[_FULL] |= _NO_ROWS
        else:
            numbers[_NEXT_ROW] = block + _WIDTH
    blocks[block + _SIZE], blocks[block + _ADDRESS], blocks[block + _POOL] = size, address, pool
    blocks[block + _PREVIOUS] = blocks[block + _NEXT] = _NONE
    blocks[block + _PLACE] = _MAX
    return block


@_inlined
def _delete_block(st: _State, block: Uint) -> None:
    """Let the row be used again."""
    st.blocks[block + _NEXT_DELETED] = st.numbers[_DELETED]
    st.numbers[_DELETED] = block


@_inlined
def _best_word(st: _State, pool: Uint, size: Uint) -> Uint:
    """The word of the smallest size class of ``pool`` with at least ``size`` bytes; _MAX: there is none.

    A word less the size that is wanted is a huge number, beyond _NEGATIVE, for smaller sizes and for holes: so a
    minimum finds the best. There are four minima, so that none waits for the last. The loop ends at the first slot that
    was never used: for a known number of turns LLVM would make vectors, and shuffling those takes longer.
    """
    words, want, base = st.words, size << _WORD, pool * st.slots
    best = second = third = fourth = _MAX
    n = base
    while words[n] != _0:
        best = min(best, words[n] - want)
        second = min(second, words[n + _1] - want)
        third = min(third, words[n + _2] - want)
        fourth = min(fourth, words[n + _3] - want)
        n += _4
    best = min(min(best, second), min(third, fourth))
    return best + want if best < _NEGATIVE else _MAX


@_inlined
def _mark_of(pool: Uint, size: Uint) -> Uint:
    """Where the size classes of ``pool`` with the hash of ``size`` are counted."""
    return pool << _MARK | size * _GOLDEN >> _UPPER


@_inlined
def _lowest_address(st: _State, size_class: Uint) -> Uint:
    """The block of a size class that has the lowest address."""
    cells, begin, low = st.cells, size_class * st.depth, _MAX
    for n in range(st.counts[size_class]):
        low = min(low, cells[begin + n])
    return (low & _ROW) << _STEP


@_inlined
def _insert_block(st: _State, block: Uint) -> None:
    """Add a free (or unmapped) block to its pool."""
    blocks, counts, marks = st.blocks, st.counts, st.marks
    pool, size = blocks[block + _POOL], blocks[block + _SIZE]
    base, mark = pool * st.slots, _mark_of(pool, size)
    word = _best_word(st, pool, size) if marks[mark] != _0 else _MAX
    if word | _SLOT == size << _WORD | _SLOT:
        size_class = base + (word & _SLOT)
    else:
        size_class = base + _new_slot(st, pool, base)
        st.words[size_class], counts[size_class] = size << _WORD | size_class - base, _0
        marks[mark] += _1
    at = counts[size_class]
    if at + _1 == st.depth:
        st.numbers[_FULL] |= _NO_CELLS
    else:
        counts[size_class] = at + _1
    at += size_class * st.depth
    st.cells[at] = blocks[block + _ADDRESS] << _CELL | block >> _STEP
    blocks[block + _PLACE], blocks[block + _CLASS] = at, size_class


@_inlined
def _new_slot(st: _State, pool: Uint, base: Uint) -> Uint:
    """An unused slot of ``pool``, whose slots begin at ``base``."""
    numbers, holes = st.numbers, st.numbers[_HOLES + pool]
    if holes != _0:
        numbers[_HOLES + pool] = holes - _1
        return st.holes[base + holes - _1]
    slot = numbers[_SLOTS + pool]
    if slot + _4 == st.slots:  # the last four stay unused: there a search ends
        numbers[_FULL] |= _NO_SLOTS
    else:
        numbers[_SLOTS + pool] = slot + _1
    return slot


@_inlined
def _erase_block(st: _State, block: Uint) -> None:
    """Take a block out of its pool."""
    blocks, counts = st.blocks, st.counts
    size_class, at = blocks[block + _CLASS], blocks[block + _PLACE]
    left = counts[size_class] - _1
    counts[size_class] = left
    if left != _0:
        last = st.cells[size_class * st.depth + left]
        st.cells[at] = last
        blocks[((last & _ROW) << _STEP) + _PLACE] = at
    else:
        pool = blocks[block + _POOL]
        holes, base = st.numbers[_HOLES + pool], pool * st.slots
        st.words[size_class], st.holes[base + holes] = _HOLE, size_class - base
        st.numbers[_HOLES + pool] = holes + _1
        st.marks[_mark_of(pool, blocks[block + _SIZE])] -= _1
    blocks[block + _PLACE] = _MAX


@_inlined
def _lower_bound(st: _State, pool: Uint, size: Uint) -> Uint:
    """The smallest block of ``pool`` that has ``size`` bytes, the lowest address among equals."""
    word = _best_word(st, pool, size)
    return _NONE if word == _MAX else _lowest_address(st, pool * st.slots + (word & _SLOT))


@_compiled
def _next_block(st: _State, pool: Uint, size: Uint, address: Uint) -> Uint:
    """The block of ``pool`` that follows this size and address, by size and then by address; _NONE: none does."""
    word = _best_word(st, pool, size)
    if word | _SLOT == size << _WORD | _SLOT:
        size_class, low = pool * st.slots + (word & _SLOT), _MAX
        begin, here = size_class * st.depth, address << _CELL | _ROW
        for n in range(st.counts[size_class]):
            cell = st.cells[begin + n]
            low = min(low, cell if cell > here else _MAX)
        if low != _MAX:
            return (low & _ROW) << _STEP
    return _lower_bound(st, pool, size + _MIN_BLOCK_SIZE)


@_compiled
def _sort_pool(st: _State, pool: Uint) -> Uint:
    """How many blocks ``pool`` has; they are in ``st.ordered``, by size and then by address."""
    count, block = _0, _lower_bound(st, pool, _MIN_BLOCK_SIZE)
    while block != _NONE:
        st.ordered[count] = block
        count += _1
        block = _next_block(st, pool, st.blocks[block + _SIZE], st.blocks[block + _ADDRESS])
    return count


# --- addresses ------------------------------------------------------------------------------------------------


@_compiled
def _cuda_malloc(st: _State, size: Uint) -> Uint:
    """The address at which ``cudaMalloc`` puts a segment; 0: the address space is full.

    Addresses order blocks of one size, so they decide which one is taken. Measured on an H100 with driver 580: a new
    segment lies below the older ones, at a whole number of granules. What it leaves of its last granule serves later
    segments; of several such gaps that are large enough, the lowest one does.
    """
    numbers, gaps = st.numbers, st.gaps
    for gap in range(numbers[_GAPS]):
        at = _2 * gap
        if gaps[at + _1] >= size:
            address = gaps[at]
            gaps[at] += size
            gaps[at + _1] -= size
            if gaps[at + _1] == _0:
                numbers[_GAPS] -= _1
                for n in range(at, _2 * numbers[_GAPS]):
                    gaps[n] = gaps[n + _2]
            return address
    region = (size + _ADDRESS_GRANULE - _1) // _ADDRESS_GRANULE * _ADDRESS_GRANULE
    if region >= numbers[_LOWEST]:
        return _0
    numbers[_LOWEST] -= region
    if region > size:
        _add_gap(st, numbers[_LOWEST] + size, region - size)
    return numbers[_LOWEST]


@_compiled
def _add_gap(st: _State, address: Uint, size: Uint) -> None:
    """Add a gap, by its address."""
    gaps, at = st.gaps, _2 * st.numbers[_GAPS]
    if at + _2 * _2 > _U(gaps.size):
        st.numbers[_FULL] |= _NO_ROWS
        return
    while at > _0 and gaps[at - _2] > address:
        gaps[at], gaps[at + _1] = gaps[at - _2], gaps[at - _1]
        at -= _2
    gaps[at], gaps[at + _1] = address, size
    st.numbers[_GAPS] += _1


# --- malloc ---------------------------------------------------------------------------------------------------


@_inlined
def _malloc(st: _State, config: _Config, key: Uint, size: Uint, stream: Uint) -> bool:
    """Serve ``size`` bytes (rounded, more than 0) under ``key``, to ``stream``; False: out of memory."""
    pool = _pool_of(stream, size)
    block = _get_free_block(st, config, size, pool)
    if block == _NONE:
        block = _alloc_with_retries(st, config, size, pool)
        if block == _NONE:
            return False
    remaining = st.blocks[block + _SIZE] - size
    if remaining != _0 and _should_split(config, size, remaining, pool):
        _split(st, block, size, pool)
    st.live[key] = block
    st.numbers[_ALLOCATED] += st.blocks[block + _SIZE]
    return True


@_inlined
def _should_split(config: _Config, size: Uint, remaining: Uint, pool: Uint) -> Any:
    """Whether a request of ``size`` bytes leaves the ``remaining`` bytes of its block to others."""
    if _is_small(pool) or config.expandable:
        return remaining >= _MIN_BLOCK_SIZE
    return remaining > _SMALL_SIZE and size < config.max_split_size


@_inlined
def _get_free_block(st: _State, config: _Config, size: Uint, pool: Uint) -> Uint:
    """``get_free_block``: the smallest free block that is large enough, the lowest address among equals."""
    blocks, block, limit = st.blocks, _lower_bound(st, pool, size), config.max_split_size
    if block == _NONE:
        return block
    if config.expandable:
        # "the size it can expand to, not the size it currently is"
        while True:
            after = _next_block(st, pool, blocks[block + _SIZE], blocks[block + _ADDRESS])
            if after == _NONE or _expandable_size(st, after) >= _expandable_size(st, block):
                break
            block = after
    found = blocks[block + _SIZE]
    if (size < limit and limit <= found) or (size >= limit and found >= size + _LARGE_PAGE):
        return _NONE
    _erase_block(st, block)
    return block


@_inlined
def _expandable_size(st: _State, block: Uint) -> Uint:
    """The size that a free block can expand to (``expandable_size`` in ``get_free_block``)."""
    size, tail = st.blocks[block + _SIZE], st.blocks[block + _NEXT]
    return size + st.blocks[tail + _SIZE] if tail != _NONE and _is_unmapped(st.blocks[tail + _POOL]) else size


@_compiled
def _alloc_with_retries(st: _State, config: _Config, size: Uint, pool: Uint) -> Uint:
    """A block of newly reserved memory: what ``malloc`` tries where no free block will do, before and after releasing
    what is cached."""
    block = _alloc_block(st, config, size, pool)
    if block == _NONE and config.max_split_size != _MAX and _release_available_cached_blocks(st, config, size, pool):
        block = _alloc_block(st, config, size, pool)
    if block == _NONE:
        _release_cached_blocks(st, config)
        block = _alloc_block(st, config, size, pool)
    return block


@_compiled
def _alloc_block(st: _State, config: _Config, size: Uint, pool: Uint) -> Uint:
    """A new segment, where the limit allows it; _NONE: it does not.

    The limit (``set_fraction``) is asked about the whole segment, even where an expandable one would grow by less.
    """
    if _is_small(pool):
        segment = _SMALL_PAGE
    elif size < _MIN_LARGE_ALLOC:
        segment = _LARGE_PAGE
    else:
        segment = (size + _ROUND_LARGE - _1) // _ROUND_LARGE * _ROUND_LARGE
    if st.numbers[_RESERVED] + segment > config.limit:
        return _NONE
    if config.expandable:
        return _try_allocate_expandable_block(st, config, size, pool)
    address = _cuda_malloc(st, segment)
    if address == _0:
        return _NONE
    _count_reserved(st, config, segment)
    return _new_block(st, segment, address, pool)


@_inlined
def _count_reserved(st: _State, config: _Config, size: Uint) -> bool:
    """Reserve ``size`` bytes of the card; False: the limit does not allow it."""
    if st.numbers[_RESERVED] + size > config.limit:
        return False
    st.numbers[_RESERVED] += size
    st.numbers[_SEGMENTS] += _1
    return True


@_inlined
def _split(st: _State, block: Uint, size: Uint, pool: Uint) -> None:
    """Cut ``block`` down to ``size`` bytes. What remains is a free block of ``pool``."""
    blocks, after = st.blocks, st.blocks[block + _NEXT]
    remaining = _new_block(st, blocks[block + _SIZE] - size, blocks[block + _ADDRESS] + size, pool)
    blocks[remaining + _PREVIOUS], blocks[remaining + _NEXT] = block, after
    blocks[after + _PREVIOUS] = remaining
    blocks[block + _NEXT], blocks[block + _SIZE] = remaining, size
    _insert_block(st, remaining)


# --- free and release -----------------------------------------------------------------------------------------


@_inlined
def _free(st: _State, key: Uint) -> None:
    """Free the block of ``key`` and merge it with free neighbours (``free_block``); nothing where it has none."""
    block = st.live[key]
    if block != _NONE:
        st.live[key] = _NONE
        st.numbers[_ALLOCATED] -= st.blocks[block + _SIZE]
        _insert_block(st, _try_merge_blocks(st, block))


@_inlined
def _try_merge_blocks(st: _State, block: Uint) -> Uint:
    """``block`` merged with those of its neighbours that are in the same pool."""
    blocks = st.blocks
    pool, before, after = blocks[block + _POOL], blocks[block + _PREVIOUS], blocks[block + _NEXT]
    if blocks[before + _PLACE] != _MAX and blocks[before + _POOL] == pool:
        _erase_block(st, before)
        block = _join(st, before, block)
    if blocks[after + _PLACE] != _MAX and blocks[after + _POOL] == pool:
        _erase_block(st, after)
        block = _join(st, block, after)
    return block


@_inlined
def _join(st: _State, first: Uint, second: Uint) -> Uint:
    """Two neighbours, in no pool, as one block."""
    blocks, after = st.blocks, st.blocks[second + _NEXT]
    blocks[first + _SIZE] += blocks[second + _SIZE]
    blocks[first + _NEXT] = after
    blocks[after + _PREVIOUS] = first
    _delete_block(st, second)
    return first


@_compiled
def _release_cached_blocks(st: _State, config: _Config) -> None:
    """Give every segment (or page) that holds nothing back to the card.

    Pages are unmapped in the order of their pool; the order in which segments are released leaves no trace.
    """
    for pool in range(_MAPPED_POOLS):
        if config.expandable:
            for n in range(_sort_pool(st, pool)):
                _unmap_block(st, st.ordered[n])
        else:
            base = pool * st.slots
            for size_class in range(base, base + st.numbers[_SLOTS + pool]):
                if st.words[size_class] != _HOLE:
                    at = st.counts[size_class]
                    while at > _0:  # from the last: what is erased is followed by what was looked at
                        at -= _1
                        _release_block(st, (st.cells[size_class * st.depth + at] & _ROW) << _STEP)


@_compiled
def _release_available_cached_blocks(st: _State, config: _Config, size: Uint, pool: Uint) -> bool:
    """Release oversize blocks of this pool: the smallest that is large enough, or else the largest ones; False: all of
    them are too few."""
    wanted = max(size, config.max_split_size)
    enough = _lower_bound(st, pool, wanted)
    if enough != _NONE:
        _release_block(st, enough)
        return True
    last = _sort_pool(st, pool)
    first, total = last, _0
    while first > _0 and st.blocks[st.ordered[first - _1] + _SIZE] >= config.max_split_size and total < wanted:
        first -= _1
        total += st.blocks[st.ordered[first] + _SIZE]
    if total < wanted:
        return False
    while last > first:
        last -= _1
        _release_block(st, st.ordered[last])
    return True


@_compiled
def _release_block(st: _State, block: Uint) -> None:
    """Give a free block back to the card, if it is a whole segment."""
    blocks = st.blocks
    if blocks[block + _PREVIOUS] == _NONE and blocks[block + _NEXT] == _NONE:
        _erase_block(st, block)
        st.numbers[_RESERVED] -= blocks[block + _SIZE]
        _add_gap(st, blocks[block + _ADDRESS], blocks[block + _SIZE])
        _delete_block(st, block)


# --- expandable segments --------------------------------------------------------------------------------------


@_compiled
def _try_allocate_expandable_block(st: _State, config: _Config, size: Uint, pool: Uint) -> Uint:
    """A block of ``size`` bytes made by mapping pages behind a free one, or at the start of a new segment."""
    blocks, block = st.blocks, _find_expandable_block(st, size, pool)
    if block != _NONE and _is_unmapped(blocks[block + _POOL]):
        block = _map_block(st, config, block, min(blocks[block + _SIZE], size))
    while block != _NONE and blocks[block + _SIZE] < size:
        after = blocks[block + _NEXT]
        block = _map_block(st, config, after, min(size - blocks[block + _SIZE], blocks[after + _SIZE]))
    if block != _NONE:
        _erase_block(st, block)
    return block


@_compiled
def _find_expandable_block(st: _State, size: Uint, pool: Uint) -> Uint:
    """The block with the lowest address from which on free and unmapped ones have ``size`` bytes."""
    blocks, unmapped, best, lowest = st.blocks, pool + _MAPPED_POOLS, _NONE, _MAX
    for n in range(_sort_pool(st, unmapped)):
        start = st.ordered[n]
        before = blocks[start + _PREVIOUS]
        if blocks[before + _PLACE] != _MAX:
            start = before
        available, block = _0, start
        while available < size and blocks[block + _PLACE] != _MAX:
            available += blocks[block + _SIZE]
            block = blocks[block + _NEXT]
        if available >= size and blocks[start + _ADDRESS] < lowest:
            best, lowest = start, blocks[start + _ADDRESS]
    if best != _NONE:
        return best
    address = _cuda_malloc(st, _EXPANDABLE_RANGE)
    if address == _0 or size > _EXPANDABLE_RANGE:
        return _NONE
    block = _new_block(st, _EXPANDABLE_RANGE, address, unmapped)
    _insert_block(st, block)
    return block


@_compiled
def _map_block(st: _State, config: _Config, block: Uint, size: Uint) -> Uint:
    """Map the first ``size`` bytes of an unmapped block, in whole pages.

    Returned is the free block that they are now part of; _NONE: the limit does not allow it.
    """
    blocks, pool = st.blocks, st.blocks[block + _POOL] - _MAPPED_POOLS
    page = _page_of(pool)
    size = min((size + page - _1) // page * page, blocks[block + _SIZE])
    if not _count_reserved(st, config, size):
        return _NONE
    _erase_block(st, block)
    if blocks[block + _SIZE] > size:
        _split(st, block, size, pool + _MAPPED_POOLS)
    blocks[block + _POOL] = pool
    block = _try_merge_blocks(st, block)
    _insert_block(st, block)
    return block


@_compiled
def _unmap_block(st: _State, block: Uint) -> None:
    """Give the whole pages inside a free block back to the card; what is left of it stays free."""
    blocks, pool = st.blocks, st.blocks[block + _POOL]
    address, size = blocks[block + _ADDRESS], blocks[block + _SIZE]
    page = _page_of(pool)
    base = address // _EXPANDABLE_RANGE * _EXPANDABLE_RANGE
    start = base + (address - base + page - _1) // page * page
    end = base + (address - base + size) // page * page
    if end <= start:
        return
    _erase_block(st, block)
    st.numbers[_RESERVED] -= end - start
    before, after = blocks[block + _PREVIOUS], blocks[block + _NEXT]
    if start > address:
        head = _new_block(st, start - address, address, pool)
        blocks[head + _PREVIOUS], blocks[before + _NEXT] = before, head
        _insert_block(st, head)
        before = head
    if end < address + size:
        tail = _new_block(st, address + size - end, end, pool)
        blocks[tail + _NEXT], blocks[after + _PREVIOUS] = after, tail
        _insert_block(st, tail)
        after = tail
    blocks[block + _ADDRESS], blocks[block + _SIZE], blocks[block + _POOL] = start, end - start, pool + _MAPPED_POOLS
    blocks[block + _PREVIOUS], blocks[block + _NEXT] = before, after
    blocks[before + _NEXT] = blocks[after + _PREVIOUS] = block
    _insert_block(st, _try_merge_blocks(st, block))


# --- whole runs -----------------------------------------------------------------------------------------------

# Columns of what is told of an interval of events, as Replay has them
_PEAK, _PEAK_EVENT, _PEAK_RESERVED, _ALLOCATED_AFTER, _RESERVED_AFTER = range(5)


@_compiled
def _run(
    st: _State,
    config: _Config,
    events: Any,
    size: Any,
    stream: Any,
    sizes: Uints,
    interval_bounds: Any,
    empty_cache_events: Any,
    limit_from: int,
    first: int,
    last: int,
    block_sizes: Any,
    out: Any,
) -> int:
    """Serve the events of the intervals from ``first`` to before ``last``.

    Returned is how far that went: less than to their end where an event could not be served, -1 where the state was
    full. ``sizes`` are rounded. Written are ``block_sizes`` by key and ``out`` by interval.
    """
    numbers = st.numbers
    unlimited = _Config(config.expandable, config.max_split_size, _MAX)
    emptied = np.searchsorted(empty_cache_events, interval_bounds[first])
    for interval in range(first, last):
        at, end = interval_bounds[interval], interval_bounds[interval + 1]
        now = config if at >= limit_from else unlimited
        peak, peak_event, reserved = _0, -1, numbers[_RESERVED]
        while at < end:
            while emptied < len(empty_cache_events) and empty_cache_events[emptied] <= at:
                _release_cached_blocks(st, now)
                emptied += 1
            stop = min(end, empty_cache_events[emptied]) if emptied < len(empty_cache_events) else end
            for at in range(at, stop):  # noqa: B020 - goes on where the last one stopped
                event = events[at]
                if event < 0:
                    _free(st, _U(~event))
                else:
                    key = _U(event)
                    asked = sizes[size[key]]
                    if asked != _0:
                        if not _malloc(st, now, key, asked, _U(stream[key])):
                            return -1 if numbers[_FULL] else at
                        block_sizes[key] = st.blocks[st.live[key] + _SIZE]
                    reserved = max(reserved, numbers[_RESERVED])
                    if numbers[_ALLOCATED] > peak or peak_event < 0:
                        peak, peak_event = numbers[_ALLOCATED], at
                if numbers[_FULL]:
                    return -1
            at = stop
        out[interval, _PEAK] = peak if peak_event >= 0 else -1
        out[interval, _PEAK_EVENT], out[interval, _PEAK_RESERVED] = peak_event, reserved
        out[interval, _ALLOCATED_AFTER], out[interval, _RESERVED_AFTER] = numbers[_ALLOCATED], numbers[_RESERVED]
    return int(interval_bounds[last])


class Replay(NamedTuple):
    """What serving a run showed. All arrays are int64, sizes in bytes.

    ``served`` is how many events were served: all of them, or up to the one that ran out of memory. ``block_sizes``
    has, by key, the size of each allocation's block. The others have one entry for each interval: ``peak`` the most
    allocated after an event that allocates, and ``peak_event`` the first event with it (both -1 where none allocates);
    ``peak_reserved`` the most reserved; ``allocated_after`` and ``reserved_after`` what is left at its end.

    Where a step was repeated, what is allocated and the blocks are those of the time with the highest peak, what is
    reserved is that of the last time.
    """

    served: int
    block_sizes: Ints
    peak: Ints
    peak_event: Ints
    peak_reserved: Ints
    allocated_after: Ints
    reserved_after: Ints


_states: list[_State] = []
"""States that nobody uses: fresh memory costs more than what is done in it."""


def replay(replay_input: ReplayInput, sizes: Ints, config: AllocatorConfig, limit_from: int = 0) -> Replay:
    """Serve the events of a run with a fresh allocator.

    ``sizes`` are the bytes of :attr:`ReplayInput.size`'s entries (int64). The limit holds from event ``limit_from`` on,
    which is the start of an interval.

    A repeated step is served again as long as it reserved memory the last time, :data:`REPEATS` times at most: a third
    step may reserve more than the second, and lie in other blocks (measured on an H100: NOTES.md).

    Raises :class:`PlanError` where more than half a million blocks are alive.
    """
    rounded = ((sizes + (MIN_BLOCK_SIZE - 1)) // MIN_BLOCK_SIZE * MIN_BLOCK_SIZE).astype(np.uint64)
    rows, keys = 1024 + 2 * replay_input.most_alive, replay_input.size.size
    try:
        st = _states.pop()
    except IndexError:
        st = _state(rows, keys)
    while True:
        if st.ordered.size < rows or st.live.size < keys:
            st = _state(max(rows, st.ordered.size), max(keys, st.live.size), int(st.slots), int(st.depth))
        else:
            _clear(st)
        out = _replay_in(st, replay_input, rounded, _compiled_config(config), limit_from)
        if out.served >= 0:
            _states.append(st)
            return out
        st = _grown(st, int(st.numbers[_FULL]), keys)
        rows = st.ordered.size


def _grown(st: _State, full: int, keys: int) -> _State:
    """A fresh state with twice as much of what ran out.

    Raises :class:`PlanError` where that is more than the bits of a cell or a word can tell.
    """
    rows, slots, depth = st.ordered.size, int(st.slots), int(st.depth)
    if full & int(_NO_ROWS):
        rows *= 2
    if full & int(_NO_SLOTS):
        slots *= 2
    if full & int(_NO_CELLS):
        depth *= 2
    if rows > _MOST_ROWS or slots > _MOST_SLOTS:
        raise PlanError("the step has more than half a million blocks alive", "ask for a smaller batch")
    return _state(rows, max(keys, st.live.size), slots, depth)


def _replay_in(st: _State, replay_input: ReplayInput, sizes: Uints, config: _Config, limit_from: int) -> Replay:
    """:func:`replay` in an empty state; ``served`` is -1 where that was full."""
    bounds, empty_caches, step = (
        replay_input.interval_bounds,
        replay_input.empty_cache_events,
        replay_input.repeated_step,
    )

    def serve(first: int, last: int, block_sizes: Ints, intervals: Ints) -> int:
        run = replay_input.events, replay_input.size, replay_input.stream
        return _run(st, config, *run, sizes, bounds, empty_caches, limit_from, first, last, block_sizes, intervals)

    last = bounds.size - 1
    first = last if step is None else int(np.searchsorted(bounds, step.start, side="right")) - 1
    block_sizes, intervals = np.zeros(replay_input.size.size, np.int64), np.zeros((last, 5), np.int64)
    served = serve(0, first, block_sizes, intervals)
    if step is None or served < step.start:
        return Replay(served, block_sizes, *intervals.T)
    segments = st.numbers[_SEGMENTS]
    served = serve(first, last, block_sizes, intervals)
    for _ in range(REPEATS):
        if served < replay_input.events.size or st.numbers[_SEGMENTS] == segments:
            break
        if (block_sizes[step.freed_from_previous] != block_sizes[step.carried_over]).any():
            break  # a key would have blocks of two sizes
        st.live[step.freed_from_previous], st.live[step.carried_over] = st.live[step.carried_over], _NONE
        segments, other_sizes, again = st.numbers[_SEGMENTS], block_sizes.copy(), intervals.copy()
        served = serve(first, last, other_sizes, again)
        if again[first:, _PEAK].max() > intervals[first:, _PEAK].max():
            block_sizes, intervals = other_sizes, again
        columns = [_PEAK_RESERVED, _RESERVED_AFTER]
        intervals[first:, columns] = again[first:, columns]
    return Replay(served, block_sizes, *intervals.T)


@_compiled
def _tally(events: Any, kind: Any, block_sizes: Any, moments: Any, out: Any) -> None:
    last, row = moments.size, 0
    for at in range(events.size):
        event = events[at]
        if event < 0:
            out[last, kind[~event]] -= block_sizes[~event]
        else:
            out[last, kind[event]] += block_sizes[event]
        if row < last and moments[row] == at:
            for column in range(out.shape[1]):
                out[row, column] = out[last, column]
            row += 1


def tally(
    events: npt.NDArray[np.int32], kind: npt.NDArray[np.int8], block_sizes: Ints, moments: Ints, kinds: int
) -> Ints:
    """Bytes allocated by kind (columns, so many ``kinds``) after each of ``moments`` (rows; events in ascending order).

    ``kind`` has, by key, the number of an allocation's kind, ``block_sizes`` the bytes of its block (:class:`Replay`).
    """
    out = np.zeros((moments.size + 1, kinds), np.int64)
    _tally(events, kind, block_sizes, moments, out)
    return out[:-1]


class CachingAllocator:
    """One device's allocator, request by request. All numbers are bytes, but for keys.

    A key is what a request is known by; there are at most ``keys`` of them, from 0 on. ``peak_allocated`` and
    ``peak_reserved`` are the most since the last reset.
    """

    def __init__(self, config: AllocatorConfig = AllocatorConfig(), keys: int = 1 << 16):
        self._config = _compiled_config(config)
        self._state = _state(4 * keys, keys, int(_SLOT) + 1, 1024)
        self.peak_allocated = self.peak_reserved = 0

    @property
    def allocated(self) -> int:
        """What the blocks that are allocated take now, as ``torch.cuda.memory_allocated``."""
        return int(self._state.numbers[_ALLOCATED])

    @property
    def reserved(self) -> int:
        """What is reserved of the card now, as ``torch.cuda.memory_reserved``."""
        return int(self._state.numbers[_RESERVED])

    def malloc(self, key: int, size: int, stream: int = 0) -> None:
        """Serve ``size`` bytes under ``key``, to ``stream``.

        Raises :class:`OutOfMemory` where CUDA's allocator would, :class:`ValueError` where there are too many blocks.
        """
        if not 0 <= stream < STREAMS:
            raise ValueError(f"a stream is a number below {STREAMS}")
        if not 0 <= key < self._state.live.size or self._state.numbers[_FULL]:
            raise ValueError(f"made for {self._state.live.size} keys")
        if size and not _malloc(self._state, self._config, _U(key), _U(round_size(size)), _U(stream)):
            raise OutOfMemory(int(round_size(size)))
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def reset_peaks(self) -> None:
        """Let the peaks begin with what is allocated and reserved now."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def free(self, key: int) -> None:
        """Free what ``key`` holds."""
        _free(self._state, _U(key))

    def empty_cache(self) -> None:
        """Give back to the card what is not allocated, as ``torch.cuda.empty_cache``."""
        _release_cached_blocks(self._state, self._config)

    def blocks(self) -> list[tuple[int, int]]:
        """(address, size) of every block that is allocated, by address."""
        rows = self._state.live[self._state.live != _NONE]
        blocks = self._state.blocks
        return sorted(zip(blocks[rows + _ADDRESS].tolist(), blocks[rows + _SIZE].tolist(), strict=True))
