"""PyTorch's CUDA caching allocator, replayed: blocks, segments, reserved bytes, and out of memory under a limit.

Restated from ``c10/cuda/CUDACachingAllocator.cpp`` (class ``DeviceCachingAllocator``) and the constants of
``c10/core/AllocatorConfig.h``; one device, one stream. What is counted is what ``torch.cuda.memory_allocated`` and
``memory_reserved`` count: whole blocks, so the unsplit rest of a block (at most 1 MiB) counts as allocated.

A step has some hundred thousand events and a verdict takes several replays, so the rules are compiled (numba) and the
blocks are rows of arrays: 20 to 40 ns an event where objects took 2000. All numbers in there are ``uint64``: numba asks
of every signed index whether it counts from the end. (A ``uint64`` and an ``int64`` make a float: hence the constants.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from ...errors import PlanError
from .config import LARGE_BUFFER, MIB, AllocatorConfig, ReplayInput

MIN_BLOCK = 512  # kMinBlockSize: every size is rounded up to a multiple of it
SMALL_SIZE = MIB  # kSmallSize: the largest request served from the small pool
SMALL_BUFFER = 2 * MIB  # kSmallBuffer: a segment of the small pool
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc: below it a large segment is LARGE_BUFFER
ROUND_LARGE = 2 * MIB  # kRoundLarge: segments of MIN_LARGE_ALLOC and more
GRANULE = 32 * MIB  # what cudaMalloc takes of the address space at a time
ADDRESSES = 1 << 54  # bytes of the address space, which fills from above
EXPANDABLE_RANGE = 1 << 50  # the address range that an expandable segment may grow into
REPEATS = 8  # of a steady step, at most

# Without numba's reference counts (nothing here makes an array), and with what is called for every event in one piece:
# each alone makes a replay three times as fast. Without the interpreter's lock: a server replays on every core.
_compiled = njit(cache=True, _nrt=False, nogil=True)
_inlined = njit(_nrt=False, inline="always")


class OutOfMemory(Exception):
    """The allocator could not serve ``size`` bytes within its limit, even after giving back its cache."""

    def __init__(self, size: int):
        super().__init__(size)
        self.size = size


_U = np.uint64
_0, _1, _2, _3, _4 = map(_U, range(5))
_NONE = _U(0)  # no row; row 0 is a block that is taken, a neighbour of all that have none
_BEYOND = _U((1 << 64) - 1)  # more than any size, address or place: the place of what is taken, a limit that is none
_NOTHING = _U(1 << 63)  # a difference from here on is less than nothing
_MIN, _SMALL, _SMALL_SEGMENT, _LARGE_SEGMENT = map(_U, (MIN_BLOCK, SMALL_SIZE, SMALL_BUFFER, LARGE_BUFFER))
_LARGE_ENOUGH, _ROUND, _GRANULE, _RANGE = map(_U, (MIN_LARGE_ALLOC, ROUND_LARGE, GRANULE, EXPANDABLE_RANGE))


class _Rules(NamedTuple):
    """:class:`AllocatorConfig` for compiled code."""

    expandable: bool
    split_limit: np.uint64
    limit: np.uint64


def _rules(settings: AllocatorConfig) -> _Rules:
    def bytes_of(size: int | None) -> np.uint64:
        return _BEYOND if size is None else _U(max(0, size))

    return _Rules(settings.expandable_segments, bytes_of(settings.max_split_size), bytes_of(settings.limit))


class _State(NamedTuple):
    """The blocks, one a row, and the sets of those that are free.

    ``blocks`` has :data:`_WIDTH` columns a row, named below; a row is known by where it begins. A pool (free small,
    free large, unmapped small, unmapped large) is a set of classes, a class the blocks of one size: a hundred free
    blocks have about eight sizes, so looking through the sizes and then through one class takes less time than keeping
    the pool in order, as PyTorch does. Each pool has ``slots`` of them, of which ``words`` say the size (0: never
    used; _HOLE: no longer) and ``counts`` how many blocks there are; ``holes`` is a stack of those no longer used.
    ``marks`` count a pool's classes by a hash of their size: where there are none, none has to be looked for. A class
    has ``depth`` places in ``cells``, unordered: each holds a block's address and row.

    ``rests`` are pairs of address and size that segments left of their last granule, in order of addresses. ``ordered``
    is where a pool's order is written when it is wanted, ``live`` the row of every key.
    """

    blocks: np.ndarray
    words: np.ndarray
    counts: np.ndarray
    holes: np.ndarray
    marks: np.ndarray
    cells: np.ndarray
    rests: np.ndarray
    ordered: np.ndarray
    live: np.ndarray
    numbers: np.ndarray
    slots: np.uint64
    depth: np.uint64


# Columns of _State.blocks. _PLACE: where in the cells of its _CLASS, _BEYOND: taken. _SPARE: the next unused row
_SIZE, _ADDRESS, _PREVIOUS, _NEXT, _PLACE, _CLASS, _POOL, _SPARE = map(_U, range(8))
_WIDTH = _U(8)
# Places in _State.numbers; from _SLOTS and _HOLES on, those of each pool
_ALLOCATED, _RESERVED, _OPENED, _LOW, _RESTS, _SPARES, _ROWS, _FULL, _SLOTS, _HOLES = map(_U, (*range(9), 12))
_NO_ROWS, _NO_SLOTS, _NO_CELLS = _1, _2, _4  # what numbers[_FULL] says ran out
_UNMAPPED = _2  # the first of the two pools of unmapped blocks
# A word is a size and its slot, a cell an address and its row: sizes and addresses are multiples of 512
_WORD, _SLOT, _HOLE = _1, _U(1023), _1
_CELL, _ROW, _STEP = _U(10), _U((1 << 19) - 1), _U(3)
_MOST_ROWS, _MOST_SLOTS = 1 << 19, 1 << 10
# A mark is the upper bits of a size times the golden ratio (Knuth, The Art of Computer Programming 3, 6.4)
_MARKS = 1 << 8
_GOLDEN, _UPPER, _MARK = _U(0x9E3779B97F4A7C15), _U(56), _U(8)


def _state(rows: int, keys: int, slots: int = 64, depth: int = 256) -> _State:
    def places(count: int) -> np.ndarray:
        return np.zeros(count, np.uint64)

    blocks = np.empty(rows * int(_WIDTH), np.uint64)
    pools = (places(4 * slots) for _ in range(3))
    cells, rests = np.empty(4 * slots * depth, np.uint64), np.empty(4 * rows, np.uint64)
    ordered, marks = np.empty(rows, np.uint64), places(4 * _MARKS)
    found = _State(blocks, *pools, marks, cells, rests, ordered, places(keys), places(16), _U(slots), _U(depth))
    _cleared(found)
    return found


def _cleared(st: _State) -> None:
    for part in (st.words, st.marks, st.live, st.numbers):
        part.fill(0)
    st.blocks[: int(_WIDTH)] = _BEYOND
    st.numbers[int(_LOW)], st.numbers[int(_ROWS)] = ADDRESSES, _WIDTH


# --- rows, classes and pools ----------------------------------------------------------------------------------


@_compiled
def round_size(size: int) -> int:
    """Bytes of the block that a request of ``size`` bytes needs (``round_size``, default options)."""
    return MIN_BLOCK if size < MIN_BLOCK else (size + MIN_BLOCK - 1) // MIN_BLOCK * MIN_BLOCK


@_inlined
def _new_row(st, size, address, pool):
    numbers, blocks = st.numbers, st.blocks
    row = numbers[_SPARES]
    if row != _NONE:
        numbers[_SPARES] = blocks[row + _SPARE]
    else:
        row = numbers[_ROWS]
        if row + _2 * _WIDTH > _U(blocks.size):
            numbers[_FULL] |= _NO_ROWS
        else:
            numbers[_ROWS] = row + _WIDTH
    blocks[row + _SIZE], blocks[row + _ADDRESS], blocks[row + _POOL] = size, address, pool
    blocks[row + _PREVIOUS] = blocks[row + _NEXT] = _NONE
    blocks[row + _PLACE] = _BEYOND
    return row


@_inlined
def _drop_row(st, row):
    st.blocks[row + _SPARE] = st.numbers[_SPARES]
    st.numbers[_SPARES] = row


@_inlined
def _word(st, pool, size):
    """The word of the smallest class of ``pool`` that has at least ``size`` bytes; _BEYOND: none.

    Smaller ones and holes, less what is wanted, are less than nothing: more than any size. Four minima, so that none
    waits for the last; to the first slot that was never used, for a loop of a known number of turns LLVM makes vectors
    that must be shuffled.
    """
    words, want, base = st.words, size << _WORD, pool * st.slots
    best = second = third = fourth = _BEYOND
    n = base
    while words[n] != _0:
        best = min(best, words[n] - want)
        second = min(second, words[n + _1] - want)
        third = min(third, words[n + _2] - want)
        fourth = min(fourth, words[n + _3] - want)
        n += _4
    best = min(min(best, second), min(third, fourth))
    return best + want if best < _NOTHING else _BEYOND


@_inlined
def _mark(pool, size):
    return pool << _MARK | size * _GOLDEN >> _UPPER


@_inlined
def _lowest(st, its):
    """The row of the block of a class that has the lowest address."""
    cells, begin, low = st.cells, its * st.depth, _BEYOND
    for n in range(st.counts[its]):
        low = min(low, cells[begin + n])
    return (low & _ROW) << _STEP


@_inlined
def _put(st, row):
    blocks, counts, marks = st.blocks, st.counts, st.marks
    pool, size = blocks[row + _POOL], blocks[row + _SIZE]
    base, mark = pool * st.slots, _mark(pool, size)
    word = _word(st, pool, size) if marks[mark] != _0 else _BEYOND
    if word | _SLOT == size << _WORD | _SLOT:
        its = base + (word & _SLOT)
    else:
        its = base + _new_slot(st, pool, base)
        st.words[its], counts[its] = size << _WORD | its - base, _0
        marks[mark] += _1
    at = counts[its]
    if at + _1 == st.depth:
        st.numbers[_FULL] |= _NO_CELLS
    else:
        counts[its] = at + _1
    at += its * st.depth
    st.cells[at] = blocks[row + _ADDRESS] << _CELL | row >> _STEP
    blocks[row + _PLACE], blocks[row + _CLASS] = at, its


@_inlined
def _new_slot(st, pool, base):
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
def _drop(st, row):
    blocks, counts = st.blocks, st.counts
    its, at = blocks[row + _CLASS], blocks[row + _PLACE]
    left = counts[its] - _1
    counts[its] = left
    if left != _0:
        last = st.cells[its * st.depth + left]
        st.cells[at] = last
        blocks[((last & _ROW) << _STEP) + _PLACE] = at
    else:
        pool = blocks[row + _POOL]
        holes, base = st.numbers[_HOLES + pool], pool * st.slots
        st.words[its], st.holes[base + holes] = _HOLE, its - base
        st.numbers[_HOLES + pool] = holes + _1
        st.marks[_mark(pool, blocks[row + _SIZE])] -= _1
    blocks[row + _PLACE] = _BEYOND


@_inlined
def _first(st, pool, size):
    """The smallest block of ``pool`` that has ``size`` bytes, the lowest address among equals."""
    word = _word(st, pool, size)
    return _NONE if word == _BEYOND else _lowest(st, pool * st.slots + (word & _SLOT))


@_compiled
def _after(st, pool, size, address):
    """The block of ``pool`` that comes next, by size and address, after these."""
    word = _word(st, pool, size)
    if word | _SLOT == size << _WORD | _SLOT:
        its, low = pool * st.slots + (word & _SLOT), _BEYOND
        begin, here = its * st.depth, address << _CELL | _ROW
        for n in range(st.counts[its]):
            cell = st.cells[begin + n]
            low = min(low, cell if cell > here else _BEYOND)
        if low != _BEYOND:
            return (low & _ROW) << _STEP
    return _first(st, pool, size + _MIN)


@_compiled
def _in_order(st, pool):
    """How many blocks ``pool`` has; their rows, by size and address, are in ``st.ordered``."""
    count, row = _0, _first(st, pool, _MIN)
    while row != _NONE:
        st.ordered[count] = row
        count += _1
        row = _after(st, pool, st.blocks[row + _SIZE], st.blocks[row + _ADDRESS])
    return count


# --- addresses ------------------------------------------------------------------------------------------------


@_compiled
def _address(st, size):
    """Where ``cudaMalloc`` puts a segment; addresses order blocks of equal size, so they decide which one is taken.
    0: the address space is full.

    Measured on an H100 with driver 580: new segments lie below the older ones, each on a whole number of granules;
    what a segment leaves of its last granule serves later ones, the lowest such rest that is large enough first.
    """
    numbers, rests = st.numbers, st.rests
    for rest in range(numbers[_RESTS]):
        at = _2 * rest
        if rests[at + _1] >= size:
            address = rests[at]
            rests[at] += size
            rests[at + _1] -= size
            if rests[at + _1] == _0:
                numbers[_RESTS] -= _1
                for n in range(at, _2 * numbers[_RESTS]):
                    rests[n] = rests[n + _2]
            return address
    region = (size + _GRANULE - _1) // _GRANULE * _GRANULE
    if region >= numbers[_LOW]:
        return _0
    numbers[_LOW] -= region
    if region > size:
        _leave(st, numbers[_LOW] + size, region - size)
    return numbers[_LOW]


@_compiled
def _leave(st, address, size):
    rests, at = st.rests, _2 * st.numbers[_RESTS]
    if at + _2 * _2 > _U(rests.size):
        st.numbers[_FULL] |= _NO_ROWS
        return
    while at > _0 and rests[at - _2] > address:
        rests[at], rests[at + _1] = rests[at - _2], rests[at - _1]
        at -= _2
    rests[at], rests[at + _1] = address, size
    st.numbers[_RESTS] += _1


# --- taking ---------------------------------------------------------------------------------------------------


@_inlined
def _malloc(st, rules, key, size):
    """Serve ``size`` bytes (rounded, more than 0) under ``key``; False: out of memory."""
    large = _0 if size <= _SMALL else _1
    row = _take_free(st, rules, size, large)
    if row == _NONE:
        row = _open(st, rules, size, large)
        if row == _NONE:
            return False
    rest = st.blocks[row + _SIZE] - size
    if rest != _0 and _should_split(rules, size, rest, large):
        _split(st, row, size, large)
    st.live[key] = row
    st.numbers[_ALLOCATED] += st.blocks[row + _SIZE]
    return True


@_inlined
def _should_split(rules, size, rest, large):
    if large == _0 or rules.expandable:
        return rest >= _MIN
    return rest > _SMALL and size < rules.split_limit


@_inlined
def _take_free(st, rules, size, large):
    """``get_free_block``: the smallest free block that is large enough, the lowest address among equals."""
    blocks, row, limit = st.blocks, _first(st, large, size), rules.split_limit
    if row == _NONE:
        return row
    if rules.expandable:
        # "the size it can expand to, not the size it currently is"
        while True:
            after = _after(st, large, blocks[row + _SIZE], blocks[row + _ADDRESS])
            if after == _NONE or _room(st, after) >= _room(st, row):
                break
            row = after
    found = blocks[row + _SIZE]
    if size < limit and limit <= found or size >= limit and found >= size + _LARGE_SEGMENT:
        return _NONE
    _drop(st, row)
    return row


@_inlined
def _room(st, row):
    """The size that a free block can expand to (``expandable_size`` in ``get_free_block``)."""
    size, tail = st.blocks[row + _SIZE], st.blocks[row + _NEXT]
    return size + st.blocks[tail + _SIZE] if tail != _NONE and st.blocks[tail + _POOL] >= _UNMAPPED else size


@_compiled
def _open(st, rules, size, large):
    """What ``malloc`` tries where no free block will do: a segment, before and after giving back what is cached."""
    row = _new_block(st, rules, size, large)
    if row == _NONE and large != _0 and rules.split_limit != _BEYOND and _release_oversize(st, rules, size):
        row = _new_block(st, rules, size, large)
    if row == _NONE:
        _empty_cache(st, rules)
        row = _new_block(st, rules, size, large)
    return row


@_compiled
def _new_block(st, rules, size, large):
    """``alloc_block``: a new segment, where the limit allows it. A limit (``set_fraction``) is asked about the whole
    segment, also where an expandable one would grow by less."""
    if large == _0:
        segment = _SMALL_SEGMENT
    elif size < _LARGE_ENOUGH:
        segment = _LARGE_SEGMENT
    else:
        segment = (size + _ROUND - _1) // _ROUND * _ROUND
    if st.numbers[_RESERVED] + segment > rules.limit:
        return _NONE
    if rules.expandable:
        return _expand(st, rules, size, large)
    address = _address(st, segment)
    if address == _0:
        return _NONE
    _reserve(st, rules, segment)
    return _new_row(st, segment, address, large)


@_inlined
def _reserve(st, rules, size):
    if st.numbers[_RESERVED] + size > rules.limit:
        return False
    st.numbers[_RESERVED] += size
    st.numbers[_OPENED] += _1
    return True


@_inlined
def _split(st, row, size, pool):
    """Cut ``row`` down to ``size``; what is left goes to ``pool``."""
    blocks, after = st.blocks, st.blocks[row + _NEXT]
    rest = _new_row(st, blocks[row + _SIZE] - size, blocks[row + _ADDRESS] + size, pool)
    blocks[rest + _PREVIOUS], blocks[rest + _NEXT] = row, after
    blocks[after + _PREVIOUS] = rest
    blocks[row + _NEXT], blocks[row + _SIZE] = rest, size
    _put(st, rest)


# --- giving back ----------------------------------------------------------------------------------------------


@_inlined
def _free(st, key):
    """Give back what ``key`` holds and merge it with free neighbours (``free_block``)."""
    row = st.live[key]
    if row != _NONE:
        st.live[key] = _NONE
        st.numbers[_ALLOCATED] -= st.blocks[row + _SIZE]
        _put(st, _merge(st, row))


@_inlined
def _merge(st, row):
    blocks = st.blocks
    pool, before, after = blocks[row + _POOL], blocks[row + _PREVIOUS], blocks[row + _NEXT]
    if blocks[before + _PLACE] != _BEYOND and blocks[before + _POOL] == pool:
        _drop(st, before)
        row = _join(st, before, row)
    if blocks[after + _PLACE] != _BEYOND and blocks[after + _POOL] == pool:
        _drop(st, after)
        row = _join(st, row, after)
    return row


@_inlined
def _join(st, first, second):
    blocks, after = st.blocks, st.blocks[second + _NEXT]
    blocks[first + _SIZE] += blocks[second + _SIZE]
    blocks[first + _NEXT] = after
    blocks[after + _PREVIOUS] = first
    _drop_row(st, second)
    return first


@_compiled
def _empty_cache(st, rules):
    """``release_cached_blocks``: give back every segment (or page) that holds nothing. Pages in order; the order of
    segments leaves no trace."""
    for large in range(_2):
        if rules.expandable:
            for n in range(_in_order(st, large)):
                _unmap(st, st.ordered[n])
        else:
            base = large * st.slots
            for its in range(base, base + st.numbers[_SLOTS + large]):
                if st.words[its] != _HOLE:
                    at = st.counts[its]
                    while at > _0:  # from the last: what is dropped is followed by what was looked at
                        at -= _1
                        _give_whole(st, (st.cells[its * st.depth + at] & _ROW) << _STEP)


@_compiled
def _release_oversize(st, rules, size):
    """``release_available_cached_blocks``: give back unsplit blocks, the one that suffices or the largest first."""
    wanted = max(size, rules.split_limit)
    enough = _first(st, _1, wanted)
    if enough != _NONE:
        _give_whole(st, enough)
        return True
    last = _in_order(st, _1)
    first, total = last, _0
    while first > _0 and st.blocks[st.ordered[first - _1] + _SIZE] >= rules.split_limit and total < wanted:
        first -= _1
        total += st.blocks[st.ordered[first] + _SIZE]
    if total < wanted:
        return False
    while last > first:
        last -= _1
        _give_whole(st, st.ordered[last])
    return True


@_compiled
def _give_whole(st, row):
    blocks = st.blocks
    if blocks[row + _PREVIOUS] == _NONE and blocks[row + _NEXT] == _NONE:
        _drop(st, row)
        st.numbers[_RESERVED] -= blocks[row + _SIZE]
        _leave(st, blocks[row + _ADDRESS], blocks[row + _SIZE])
        _drop_row(st, row)


# --- expandable segments --------------------------------------------------------------------------------------


@_compiled
def _expand(st, rules, size, large):
    """``try_allocate_expandable_block``: map pages behind a free tail, or at the start of a new range."""
    blocks, row = st.blocks, _expandable_tail(st, size, large)
    if row != _NONE and blocks[row + _POOL] >= _UNMAPPED:
        row = _map(st, rules, row, min(blocks[row + _SIZE], size))
    while row != _NONE and blocks[row + _SIZE] < size:
        after = blocks[row + _NEXT]
        row = _map(st, rules, after, min(size - blocks[row + _SIZE], blocks[after + _SIZE]))
    if row != _NONE:
        _drop(st, row)
    return row


@_compiled
def _expandable_tail(st, size, large):
    blocks, pool, best, low = st.blocks, large + _UNMAPPED, _NONE, _BEYOND
    for n in range(_in_order(st, pool)):
        start = st.ordered[n]
        before = blocks[start + _PREVIOUS]
        if blocks[before + _PLACE] != _BEYOND:
            start = before
        room, row = _0, start
        while room < size and blocks[row + _PLACE] != _BEYOND:
            room += blocks[row + _SIZE]
            row = blocks[row + _NEXT]
        if room >= size and blocks[start + _ADDRESS] < low:
            best, low = start, blocks[start + _ADDRESS]
    if best != _NONE:
        return best
    address = _address(st, _RANGE)
    if address == _0 or size > _RANGE:
        return _NONE
    row = _new_row(st, _RANGE, address, pool)
    _put(st, row)
    return row


@_compiled
def _map(st, rules, row, size):
    blocks, large = st.blocks, st.blocks[row + _POOL] - _UNMAPPED
    page = _LARGE_SEGMENT if large != _0 else _SMALL_SEGMENT
    size = min((size + page - _1) // page * page, blocks[row + _SIZE])
    if not _reserve(st, rules, size):
        return _NONE
    _drop(st, row)
    if blocks[row + _SIZE] > size:
        _split(st, row, size, large + _UNMAPPED)
    blocks[row + _POOL] = large
    row = _merge(st, row)
    _put(st, row)
    return row


@_compiled
def _unmap(st, row):
    """``unmap_block``: give back the whole pages inside a free block; what is left of it stays free."""
    blocks, large = st.blocks, st.blocks[row + _POOL]
    address, size = blocks[row + _ADDRESS], blocks[row + _SIZE]
    page = _LARGE_SEGMENT if large != _0 else _SMALL_SEGMENT
    base = address // _RANGE * _RANGE
    start = base + (address - base + page - _1) // page * page
    end = base + (address - base + size) // page * page
    if end <= start:
        return
    _drop(st, row)
    st.numbers[_RESERVED] -= end - start
    before, after = blocks[row + _PREVIOUS], blocks[row + _NEXT]
    if start > address:
        head = _new_row(st, start - address, address, large)
        blocks[head + _PREVIOUS], blocks[before + _NEXT] = before, head
        _put(st, head)
        before = head
    if end < address + size:
        tail = _new_row(st, address + size - end, end, large)
        blocks[tail + _NEXT], blocks[after + _PREVIOUS] = after, tail
        _put(st, tail)
        after = tail
    blocks[row + _ADDRESS], blocks[row + _SIZE], blocks[row + _POOL] = start, end - start, large + _UNMAPPED
    blocks[row + _PREVIOUS], blocks[row + _NEXT] = before, after
    blocks[before + _NEXT] = blocks[after + _PREVIOUS] = row
    _put(st, _merge(st, row))


# --- whole streams --------------------------------------------------------------------------------------------

# What is told of a stretch of events, as Replay has it
_PEAK, _EVENT, _MOST, _LEFT, _KEPT = range(5)


@_compiled
def _run(st, rules, events, size, sizes, interval_bounds, empty_cache_events, limited, first, last, blocks, out):
    """Serve the events of the stretches from ``first`` to ``last``; how far that went: less than to their end where one
    could not be served, or -1 where rows or places ran out."""
    numbers = st.numbers
    free, emptied = (
        _Rules(rules.expandable, rules.split_limit, _BEYOND),
        np.searchsorted(empty_cache_events, interval_bounds[first]),
    )
    for stretch in range(first, last):
        at, end = interval_bounds[stretch], interval_bounds[stretch + 1]
        now = rules if at >= limited else free
        peak, event, most = _0, -1, numbers[_RESERVED]
        while at < end:
            while emptied < len(empty_cache_events) and empty_cache_events[emptied] <= at:
                _empty_cache(st, now)
                emptied += 1
            stop = min(end, empty_cache_events[emptied]) if emptied < len(empty_cache_events) else end
            for at in range(at, stop):
                key = events[at]
                if key < 0:
                    _free(st, _U(~key))
                else:
                    key = _U(key)
                    asked = sizes[size[key]]
                    if asked != _0:
                        if not _malloc(st, now, key, asked):
                            return -1 if numbers[_FULL] else at
                        blocks[key] = st.blocks[st.live[key] + _SIZE]
                    most = max(most, numbers[_RESERVED])
                    if numbers[_ALLOCATED] > peak or event < 0:
                        peak, event = numbers[_ALLOCATED], at
                if numbers[_FULL]:
                    return -1
            at = stop
        out[stretch, _PEAK] = peak if event >= 0 else -1
        out[stretch, _EVENT], out[stretch, _MOST] = event, most
        out[stretch, _LEFT], out[stretch, _KEPT] = numbers[_ALLOCATED], numbers[_RESERVED]
    return interval_bounds[last]


class Replay(NamedTuple):
    """What serving a course showed. ``served``: how many of its events (all, or one ran out of memory).

    Of each stretch between two cuts, bytes: ``peak``, the most allocated after an event that takes memory, and
    ``event``, the first such one (both -1 where none takes any); ``most``, the most reserved; ``left`` and ``kept``,
    allocated and reserved at its end. ``blocks``: the bytes of each allocation's block.

    Of a step that was repeated, allocated and blocks are those of the time with the highest moment, reserved those of
    the last time.
    """

    served: int
    blocks: np.ndarray
    peak: np.ndarray
    event: np.ndarray
    most: np.ndarray
    left: np.ndarray
    kept: np.ndarray


_states: list[_State] = []
"""States that nobody uses: fresh memory costs more than what is done in it."""


def replay(replay_input: ReplayInput, sizes: np.ndarray, settings: AllocatorConfig, limited: int = 0) -> Replay:
    """Feed ``course`` with these ``sizes`` (bytes; int64) to a fresh allocator. The limit holds from ``limited`` on,
    which is one of its cuts.

    What is steady is served again as long as it opened segments the last time, :data:`REPEATS` times at most: a third
    step may reserve more than the second, and lie in other blocks (measured on an H100: NOTES.md).

    Raises :class:`PlanError` where more than half a million blocks are alive.
    """
    sizes = (sizes + (MIN_BLOCK - 1)) // MIN_BLOCK * MIN_BLOCK
    rows, keys = 1024 + 2 * replay_input.alive, replay_input.size.size
    try:
        st = _states.pop()
    except IndexError:
        st = _state(rows, keys)
    while True:
        if st.ordered.size < rows or st.live.size < keys:
            st = _state(max(rows, st.ordered.size), max(keys, st.live.size), int(st.slots), int(st.depth))
        else:
            _cleared(st)
        found = _replay(st, replay_input, sizes.astype(np.uint64), _rules(settings), limited)
        if found.served >= 0:
            _states.append(st)
            return found
        st = _larger(st, int(st.numbers[_FULL]), keys)
        rows = st.ordered.size


def _larger(st: _State, full: int, keys: int) -> _State:
    """A fresh state with twice as much of what ran out. Raises :class:`PlanError` where that is more than an index
    can tell."""
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


def _replay(st: _State, replay_input: ReplayInput, sizes: np.ndarray, rules: _Rules, limited: int) -> Replay:
    def serve(first: int, last: int, *out: np.ndarray) -> int:
        interval_bounds, empty_cache_events = replay_input.interval_bounds, replay_input.empty_cache_events
        return _run(
            st,
            rules,
            replay_input.events,
            replay_input.size,
            sizes,
            interval_bounds,
            empty_cache_events,
            limited,
            first,
            last,
            *out,
        )

    steady, last = replay_input.steady, replay_input.interval_bounds.size - 1
    blocks, stretches = np.zeros(replay_input.size.size, np.int64), np.zeros((last, 5), np.int64)
    first = (
        last if steady is None else int(np.searchsorted(replay_input.interval_bounds, steady.start, side="right")) - 1
    )
    served = serve(0, first, blocks, stretches)
    if steady is None or served < steady.start:
        return Replay(served, blocks, *stretches.T)
    opened = st.numbers[_OPENED]
    served = serve(first, last, blocks, stretches)
    for _ in range(REPEATS):
        if served < replay_input.events.size or st.numbers[_OPENED] == opened:
            break
        if (
            blocks[steady.freed_from_previous] != blocks[steady.carried_over]
        ).any():  # where this stream would be told in two ways
            break
        st.live[steady.freed_from_previous], st.live[steady.carried_over] = st.live[steady.carried_over], _NONE
        opened, others, again = st.numbers[_OPENED], blocks.copy(), stretches.copy()
        served = serve(first, last, others, again)
        if again[first:, _PEAK].max() > stretches[first:, _PEAK].max():
            blocks, stretches = others, again
        stretches[first:, (_MOST, _KEPT)] = again[first:, (_MOST, _KEPT)]
    return Replay(served, blocks, *stretches.T)


@_compiled
def _tally(events, kind, blocks, moments, out):
    last, row = moments.size, 0
    for at in range(events.size):
        event = events[at]
        if event < 0:
            out[last, kind[~event]] -= blocks[~event]
        else:
            out[last, kind[event]] += blocks[event]
        if row < last and moments[row] == at:
            for column in range(out.shape[1]):
                out[row, column] = out[last, column]
            row += 1


def tally(events: np.ndarray, kind: np.ndarray, blocks: np.ndarray, moments: np.ndarray, kinds: int) -> np.ndarray:
    """Bytes alive by kind (columns) after each of ``moments`` (rows, in order): ``blocks`` are those of a
    :class:`Replay`, ``kind`` is each allocation's, of so many ``kinds``."""
    out = np.zeros((moments.size + 1, kinds), np.int64)
    _tally(events, kind, blocks, moments, out)
    return out[:-1]


class CachingAllocator:
    """One device's allocator, request by request. ``allocated``, ``reserved``: bytes now; ``peak_*`` since the last
    reset; ``keys``: how many there may be."""

    def __init__(self, settings: AllocatorConfig = AllocatorConfig(), keys: int = 1 << 16):
        self.rules = _rules(settings)
        self._state = _state(4 * keys, keys, int(_SLOT) + 1, 1024)
        self.peak_allocated = self.peak_reserved = 0

    @property
    def allocated(self) -> int:
        return int(self._state.numbers[_ALLOCATED])

    @property
    def reserved(self) -> int:
        return int(self._state.numbers[_RESERVED])

    def malloc(self, key: int, size: int) -> None:
        """Serve ``size`` bytes under ``key``. Raises :class:`OutOfMemory` where CUDA's would."""
        if not 0 <= key < self._state.live.size or self._state.numbers[_FULL]:
            raise ValueError(f"made for {self._state.live.size} keys")
        if size and not _malloc(self._state, self.rules, _U(key), _U(round_size(size))):
            raise OutOfMemory(int(round_size(size)))
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def free(self, key: int) -> None:
        _free(self._state, _U(key))

    def empty_cache(self) -> None:
        _empty_cache(self._state, self.rules)

    def blocks(self) -> list[tuple[int, int]]:
        """(address, size) of every block that is taken, by address."""
        rows = self._state.live[self._state.live != _NONE]
        blocks = self._state.blocks
        return sorted(zip(blocks[rows + _ADDRESS].tolist(), blocks[rows + _SIZE].tolist()))
