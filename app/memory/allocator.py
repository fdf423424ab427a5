"""PyTorch's CUDA caching allocator, replayed: blocks, segments, reserved bytes, and out of memory under a limit.

Restated from ``c10/cuda/CUDACachingAllocator.cpp`` (class ``DeviceCachingAllocator``) and the constants of
``c10/core/AllocatorConfig.h``; one device, one stream. What is counted is what ``torch.cuda.memory_allocated`` and
``memory_reserved`` count: whole blocks, so the unsplit rest of a block (at most 1 MiB) counts as allocated.

A step has some hundred thousand events and a verdict takes several replays, so the rules are compiled (numba) and the
blocks are rows of arrays: under 100 ns an event where objects took 2000.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from app.memory.rules import LARGE_BUFFER, MIB, Settings, Steady

MIN_BLOCK = 512  # kMinBlockSize: every size is rounded up to a multiple of it
SMALL_SIZE = MIB  # kSmallSize: the largest request served from the small pool
SMALL_BUFFER = 2 * MIB  # kSmallBuffer: a segment of the small pool
MIN_LARGE_ALLOC = 10 * MIB  # kMinLargeAlloc: below it a large segment is LARGE_BUFFER
ROUND_LARGE = 2 * MIB  # kRoundLarge: segments of MIN_LARGE_ALLOC and more
GRANULE = 32 * MIB  # what cudaMalloc takes of the address space at a time
EXPANDABLE_RANGE = 1 << 50  # the address range that an expandable segment may grow into
REPEATS = 8  # of a steady step, at most

# Without numba's reference counts (nothing here makes an array), and with what is called for every event in one piece:
# each alone makes a replay three times as fast.
_compiled = njit(cache=True, _nrt=False)
_inlined = njit(_nrt=False, inline="always")


class OutOfMemory(Exception):
    """The allocator could not serve ``size`` bytes within its limit, even after giving back its cache."""

    def __init__(self, size: int):
        super().__init__(size)
        self.size = size


class _Rules(NamedTuple):
    """:class:`Settings` for compiled code; -1: none."""

    expandable: bool
    split_limit: int
    limit: int


def _rules(settings: Settings) -> _Rules:
    split, limit = (-1 if size is None else size for size in (settings.max_split_size, settings.limit))
    return _Rules(settings.expandable_segments, split, limit)


class _State(NamedTuple):
    """The blocks, one a row, and the sets of those that are free.

    ``blocks`` has the columns below; neighbours are rows (-1: none). A pool is an unordered set of blocks: their
    ``sizes``, ``addresses`` and ``rows``; free small, free large, unmapped small, unmapped large. (PyTorch's are
    ordered by size and address; looking through a hundred numbers takes less time than keeping them in order.)
    ``rests`` are (address, size) of what segments left of their last granule. ``ordered`` is where a pool's order is
    written when it is wanted, ``live`` the row of every key (-1: none).
    """

    blocks: np.ndarray
    sizes: np.ndarray
    addresses: np.ndarray
    rows: np.ndarray
    rests: np.ndarray
    ordered: np.ndarray
    live: np.ndarray
    numbers: np.ndarray


# Columns of _State.blocks. _PLACE: where in its pool, -1: taken. _SPARES is a stack of rows that were blocks once.
_SIZE, _ADDRESS, _PREVIOUS, _NEXT, _PLACE, _MAPPED, _LARGE, _SPARES = range(8)
# Places in _State.numbers; from _FILLED on, how many blocks each pool has
_ALLOCATED, _RESERVED, _OPENED, _LOW, _RESTS, _UNUSED, _ROWS, _FILLED = range(8)
_UNMAPPED = 2  # the first of the two pools of unmapped blocks
_SPARE = 8  # rows that one request may take
_BEYOND = 1 << 62  # more than any size or address


def _state(rows: int, keys: int) -> _State:
    numbers = np.zeros(_FILLED + 4, np.int64)
    numbers[_LOW] = 1 << 60
    pools = (np.zeros((4, rows), np.int64) for _ in range(3))
    rests = np.zeros((2 * rows, 2), np.int64)
    ordered = np.zeros(rows, np.int64)
    return _State(np.zeros((rows, 8), np.int64), *pools, rests, ordered, np.full(keys, -1, np.int64), numbers)


# --- rows and pools -----------------------------------------------------------------------------------------


@_compiled
def round_size(size: int) -> int:
    """Bytes of the block that a request of ``size`` bytes needs (``round_size``, default options)."""
    return MIN_BLOCK if size < MIN_BLOCK else (size + MIN_BLOCK - 1) // MIN_BLOCK * MIN_BLOCK


@_inlined
def _new_row(st, size, address, large):
    numbers = st.numbers
    if numbers[_UNUSED]:
        numbers[_UNUSED] -= 1
        row = st.blocks[numbers[_UNUSED], _SPARES]
    else:
        row = numbers[_ROWS]
        numbers[_ROWS] += 1
    st.blocks[row, _SIZE], st.blocks[row, _ADDRESS], st.blocks[row, _LARGE] = size, address, large
    st.blocks[row, _PREVIOUS] = st.blocks[row, _NEXT] = -1
    st.blocks[row, _PLACE], st.blocks[row, _MAPPED] = -1, True
    return row


@_inlined
def _drop_row(st, row):
    st.blocks[st.numbers[_UNUSED], _SPARES] = row
    st.numbers[_UNUSED] += 1


@_inlined
def _put(st, pool, row):
    at = st.numbers[_FILLED + pool]
    st.sizes[pool, at], st.addresses[pool, at] = st.blocks[row, _SIZE], st.blocks[row, _ADDRESS]
    st.rows[pool, at], st.blocks[row, _PLACE] = row, at
    st.numbers[_FILLED + pool] += 1


@_inlined
def _drop(st, pool, row):
    st.numbers[_FILLED + pool] -= 1
    at, last = st.blocks[row, _PLACE], st.numbers[_FILLED + pool]
    st.sizes[pool, at], st.addresses[pool, at] = st.sizes[pool, last], st.addresses[pool, last]
    st.rows[pool, at] = st.rows[pool, last]
    st.blocks[st.rows[pool, at], _PLACE] = at
    st.blocks[row, _PLACE] = -1


@_inlined
def _first(st, pool, size):
    """The smallest block of ``pool`` that has ``size`` bytes, the lowest address among equals; -1: none."""
    count, best = st.numbers[_FILLED + pool], _BEYOND
    for n in range(count):
        found = st.sizes[pool, n]
        best = min(best, found if found >= size else _BEYOND)
    if best == _BEYOND:
        return -1
    low = _BEYOND
    for n in range(count):
        where = st.addresses[pool, n]
        low = min(low, where if st.sizes[pool, n] == best else _BEYOND)
    for n in range(count):
        if st.addresses[pool, n] == low:
            return st.rows[pool, n]
    return -1


@_compiled
def _after(st, pool, size, address):
    """The block of ``pool`` that comes next, by size and address, after these; -1: none."""
    row, best, low = -1, _BEYOND, _BEYOND
    for n in range(st.numbers[_FILLED + pool]):
        found, where = st.sizes[pool, n], st.addresses[pool, n]
        if (found > size or found == size and where > address) and (found < best or found == best and where < low):
            row, best, low = st.rows[pool, n], found, where
    return row


@_compiled
def _in_order(st, pool):
    """How many blocks ``pool`` has; their rows, by size and address, are in ``st.ordered``."""
    count, size, address = st.numbers[_FILLED + pool], 0, 0
    for n in range(count):
        row = _after(st, pool, size, address)
        st.ordered[n], size, address = row, st.blocks[row, _SIZE], st.blocks[row, _ADDRESS]
    return count


# --- addresses ----------------------------------------------------------------------------------------------


@_compiled
def _address(st, size):
    """Where ``cudaMalloc`` puts a segment; addresses order blocks of equal size, so they decide which one is taken.

    Measured on an H100 with driver 580: new segments lie below the older ones, each on a whole number of granules;
    what a segment leaves of its last granule serves later ones, the lowest such rest that is large enough first.
    """
    numbers, rests = st.numbers, st.rests
    for at in range(numbers[_RESTS]):
        if rests[at, 1] >= size:
            address = rests[at, 0]
            rests[at, 0] += size
            rests[at, 1] -= size
            if rests[at, 1] == 0:
                numbers[_RESTS] -= 1
                for n in range(at, numbers[_RESTS]):
                    rests[n, 0], rests[n, 1] = rests[n + 1, 0], rests[n + 1, 1]
            return address
    region = (size + GRANULE - 1) // GRANULE * GRANULE
    numbers[_LOW] -= region
    if region > size:
        _leave(st, numbers[_LOW] + size, region - size)
    return numbers[_LOW]


@_compiled
def _leave(st, address, size):
    rests, at = st.rests, st.numbers[_RESTS]
    while at > 0 and rests[at - 1, 0] > address:
        rests[at, 0], rests[at, 1] = rests[at - 1, 0], rests[at - 1, 1]
        at -= 1
    rests[at, 0], rests[at, 1] = address, size
    st.numbers[_RESTS] += 1


# --- taking -------------------------------------------------------------------------------------------------


@_inlined
def _malloc(st, rules, key, size):
    """Serve ``size`` bytes under ``key``; False: out of memory."""
    if size == 0:
        return True
    rounded = round_size(size)
    large = 0 if rounded <= SMALL_SIZE else 1
    row = _take_free(st, rules, rounded, large)
    if row < 0:
        row = _new_block(st, rules, rounded, large)
    if row < 0 and rules.split_limit >= 0 and _release_oversize(st, rules, rounded):
        row = _new_block(st, rules, rounded, large)
    if row < 0:
        _empty_cache(st, rules)
        row = _new_block(st, rules, rounded, large)
    if row < 0:
        return False
    rest = st.blocks[row, _SIZE] - rounded
    if rest and _should_split(rules, rounded, rest, large):
        _split(st, row, rounded, True)
    st.live[key] = row
    st.numbers[_ALLOCATED] += st.blocks[row, _SIZE]
    return True


@_inlined
def _should_split(rules, size, rest, large):
    if not large or rules.expandable:
        return rest >= MIN_BLOCK
    return rest > SMALL_SIZE and (rules.split_limit < 0 or size < rules.split_limit)


@_inlined
def _take_free(st, rules, size, large):
    """``get_free_block``: the smallest free block that is large enough, the lowest address among equals; -1: none."""
    row = _first(st, large, size)
    if row < 0:
        return -1
    if rules.expandable:
        # "the size it can expand to, not the size it currently is"
        while True:
            after = _after(st, large, st.blocks[row, _SIZE], st.blocks[row, _ADDRESS])
            if after < 0 or _room(st, after) >= _room(st, row):
                break
            row = after
    limit, found = rules.split_limit, st.blocks[row, _SIZE]
    if limit >= 0:
        if size < limit <= found:
            return -1
        if size >= limit and found >= size + LARGE_BUFFER:
            return -1
    _drop(st, large, row)
    return row


@_inlined
def _room(st, row):
    """The size that a free block can expand to (``expandable_size`` in ``get_free_block``)."""
    tail = st.blocks[row, _NEXT]
    return st.blocks[row, _SIZE] + (st.blocks[tail, _SIZE] if tail >= 0 and not st.blocks[tail, _MAPPED] else 0)


@_compiled
def _new_block(st, rules, size, large):
    """``alloc_block``: a new segment, or -1 where the limit forbids it. A limit (``set_fraction``) is asked about the
    whole segment, also where an expandable one would grow by less."""
    if not large:
        segment = SMALL_BUFFER
    elif size < MIN_LARGE_ALLOC:
        segment = LARGE_BUFFER
    else:
        segment = (size + ROUND_LARGE - 1) // ROUND_LARGE * ROUND_LARGE
    if rules.expandable:
        if rules.limit >= 0 and st.numbers[_RESERVED] + segment > rules.limit:
            return -1
        return _expand(st, rules, size, large)
    if not _reserve(st, rules, segment):
        return -1
    return _new_row(st, segment, _address(st, segment), large)


@_inlined
def _reserve(st, rules, size):
    if rules.limit >= 0 and st.numbers[_RESERVED] + size > rules.limit:
        return False
    st.numbers[_RESERVED] += size
    st.numbers[_OPENED] += 1
    return True


@_inlined
def _split(st, row, size, mapped):
    """Cut ``row`` down to ``size``; what is left is free, or not mapped."""
    large, after = st.blocks[row, _LARGE], st.blocks[row, _NEXT]
    rest = _new_row(st, st.blocks[row, _SIZE] - size, st.blocks[row, _ADDRESS] + size, large)
    st.blocks[rest, _PREVIOUS], st.blocks[rest, _NEXT] = row, after
    if after >= 0:
        st.blocks[after, _PREVIOUS] = rest
    st.blocks[row, _NEXT], st.blocks[row, _SIZE], st.blocks[rest, _MAPPED] = rest, size, mapped
    _put(st, large if mapped else large + _UNMAPPED, rest)


# --- giving back --------------------------------------------------------------------------------------------


@_inlined
def _free(st, key):
    """Give back what ``key`` holds and merge it with free neighbours (``free_block``)."""
    row = st.live[key]
    if row < 0:
        return
    st.live[key] = -1
    st.numbers[_ALLOCATED] -= st.blocks[row, _SIZE]
    _put(st, st.blocks[row, _LARGE], _merge(st, row))


@_inlined
def _merge(st, row):
    pool = st.blocks[row, _LARGE] + (0 if st.blocks[row, _MAPPED] else _UNMAPPED)
    before, after = st.blocks[row, _PREVIOUS], st.blocks[row, _NEXT]
    if before >= 0 and st.blocks[before, _PLACE] >= 0 and st.blocks[before, _MAPPED] == st.blocks[row, _MAPPED]:
        _drop(st, pool, before)
        row = _join(st, before, row)
    if after >= 0 and st.blocks[after, _PLACE] >= 0 and st.blocks[after, _MAPPED] == st.blocks[row, _MAPPED]:
        _drop(st, pool, after)
        row = _join(st, row, after)
    return row


@_inlined
def _join(st, first, second):
    st.blocks[first, _SIZE] += st.blocks[second, _SIZE]
    after = st.blocks[second, _NEXT]
    st.blocks[first, _NEXT] = after
    if after >= 0:
        st.blocks[after, _PREVIOUS] = first
    _drop_row(st, second)
    return first


@_compiled
def _empty_cache(st, rules):
    """``release_cached_blocks``: give back every segment (or page) that holds nothing."""
    for large in range(2):
        for n in range(_in_order(st, large)):
            row = st.ordered[n]
            if rules.expandable:
                _unmap(st, row)
            else:
                _give_whole(st, row)


@_compiled
def _release_oversize(st, rules, size):
    """``release_available_cached_blocks``: give back unsplit blocks, the one that suffices or the largest first."""
    wanted = max(size, rules.split_limit)
    enough = _first(st, 1, wanted)
    if enough >= 0:
        _give_whole(st, enough)
        return True
    last = _in_order(st, 1)
    first, total = last, 0
    while first > 0 and st.blocks[st.ordered[first - 1], _SIZE] >= rules.split_limit and total < wanted:
        first -= 1
        total += st.blocks[st.ordered[first], _SIZE]
    if total < wanted:
        return False
    for n in range(last - 1, first - 1, -1):
        _give_whole(st, st.ordered[n])
    return True


@_compiled
def _give_whole(st, row):
    if st.blocks[row, _PREVIOUS] < 0 and st.blocks[row, _NEXT] < 0:
        _drop(st, st.blocks[row, _LARGE], row)
        st.numbers[_RESERVED] -= st.blocks[row, _SIZE]
        _leave(st, st.blocks[row, _ADDRESS], st.blocks[row, _SIZE])
        _drop_row(st, row)


# --- expandable segments ------------------------------------------------------------------------------------


@_compiled
def _expand(st, rules, size, large):
    """``try_allocate_expandable_block``: map pages behind a free tail, or at the start of a new range; -1: none."""
    row = _expandable_tail(st, size, large)
    if not st.blocks[row, _MAPPED]:
        row = _map(st, rules, row, min(st.blocks[row, _SIZE], size))
    while row >= 0 and st.blocks[row, _SIZE] < size:
        after = st.blocks[row, _NEXT]
        row = _map(st, rules, after, min(size - st.blocks[row, _SIZE], st.blocks[after, _SIZE]))
    if row >= 0:
        _drop(st, large, row)
    return row


@_compiled
def _expandable_tail(st, size, large):
    pool = large + _UNMAPPED
    for n in range(_in_order(st, pool)):
        start = st.ordered[n]
        before = st.blocks[start, _PREVIOUS]
        if before >= 0 and st.blocks[before, _PLACE] >= 0:
            start = before
        room, row = 0, start
        while room < size and row >= 0 and st.blocks[row, _PLACE] >= 0:
            room += st.blocks[row, _SIZE]
            row = st.blocks[row, _NEXT]
        if room >= size:
            return start
    row = _new_row(st, EXPANDABLE_RANGE, _address(st, EXPANDABLE_RANGE), large)
    st.blocks[row, _MAPPED] = False
    _put(st, pool, row)
    return row


@_compiled
def _map(st, rules, row, size):
    large = st.blocks[row, _LARGE]
    page = LARGE_BUFFER if large else SMALL_BUFFER
    size = min((size + page - 1) // page * page, st.blocks[row, _SIZE])
    if not _reserve(st, rules, size):
        return -1
    _drop(st, large + _UNMAPPED, row)
    if st.blocks[row, _SIZE] > size:
        _split(st, row, size, False)
    st.blocks[row, _MAPPED] = True
    row = _merge(st, row)
    _put(st, large, row)
    return row


@_compiled
def _unmap(st, row):
    """``unmap_block``: give back the whole pages inside a free block; what is left of it stays free."""
    large, address, size = st.blocks[row, _LARGE], st.blocks[row, _ADDRESS], st.blocks[row, _SIZE]
    page = LARGE_BUFFER if large else SMALL_BUFFER
    base = address // EXPANDABLE_RANGE * EXPANDABLE_RANGE
    start = base + (address - base + page - 1) // page * page
    end = base + (address - base + size) // page * page
    if end <= start:
        return
    _drop(st, large, row)
    st.numbers[_RESERVED] -= end - start
    before, after = st.blocks[row, _PREVIOUS], st.blocks[row, _NEXT]
    if start > address:
        head = _new_row(st, start - address, address, large)
        st.blocks[head, _PREVIOUS] = before
        if before >= 0:
            st.blocks[before, _NEXT] = head
        _put(st, large, head)
        before = head
    if end < address + size:
        tail = _new_row(st, address + size - end, end, large)
        st.blocks[tail, _NEXT] = after
        if after >= 0:
            st.blocks[after, _PREVIOUS] = tail
        _put(st, large, tail)
        after = tail
    st.blocks[row, _ADDRESS], st.blocks[row, _SIZE], st.blocks[row, _MAPPED] = start, end - start, False
    st.blocks[row, _PREVIOUS], st.blocks[row, _NEXT] = before, after
    if before >= 0:
        st.blocks[before, _NEXT] = row
    if after >= 0:
        st.blocks[after, _PREVIOUS] = row
    _put(st, large + _UNMAPPED, _merge(st, row))


# --- whole streams ------------------------------------------------------------------------------------------


@_compiled
def _run(st, rules, events, start, end, sizes, empties, limited, allocated, reserved, blocks):
    """Serve events ``start`` to ``end``; how far that went: less than ``end`` where one could not be served, or -1
    where rows ran out."""
    numbers, rows = st.numbers, len(st.blocks)
    free = _Rules(rules.expandable, rules.split_limit, -1)
    emptied = np.searchsorted(empties, start)
    for at in range(start, end):
        now = rules if at >= limited else free
        while emptied < empties.size and empties[emptied] <= at:
            _empty_cache(st, now)
            emptied += 1
        event = events[at]
        if event < 0:
            _free(st, ~event)
        else:
            if max(numbers[_ROWS], numbers[_RESTS]) + _SPARE > rows:
                return -1
            before = numbers[_ALLOCATED]
            if not _malloc(st, now, event, sizes[event]):
                return at
            blocks[event] = numbers[_ALLOCATED] - before
        allocated[at], reserved[at] = numbers[_ALLOCATED], numbers[_RESERVED]
    return end


class Replay(NamedTuple):
    """What serving a stream showed. ``served``: how many of its events (all, or one ran out of memory); bytes
    ``allocated`` and ``reserved`` after each, and of the ``blocks`` of each allocation.

    Of a step that was repeated, allocated and blocks are those of the time with the highest moment, reserved those of
    the last time.
    """

    served: int
    allocated: np.ndarray
    reserved: np.ndarray
    blocks: np.ndarray


def replay(
    events: np.ndarray,
    sizes: np.ndarray,
    settings: Settings,
    empties: np.ndarray | None = None,
    limited: int = 0,
    steady: Steady | None = None,
) -> Replay:
    """Feed ``events`` (int32: ``k`` takes ``sizes[k]`` bytes, ``~k`` gives them back) to a fresh allocator.

    ``empties`` are the events before which ``empty_cache`` is called; the limit holds from event ``limited`` on. What
    is ``steady`` is served again as long as it opened segments the last time, :data:`REPEATS` times at most: a third
    step may reserve more than the second, and lie in other blocks (measured on an H100: NOTES.md).
    """
    empties = np.zeros(0, np.int64) if empties is None else empties
    alive = np.cumsum(np.where(events >= 0, 1, -1), dtype=np.int32)
    rows = 1024 + 2 * int(alive.max(initial=0))
    while True:
        found = _replay(_state(rows, sizes.size), events, sizes, _rules(settings), empties, limited, steady)
        if found.served >= 0:
            return found
        rows *= 4


def _replay(st, events, sizes, rules, empties, limited, steady) -> Replay:
    def serve(start, end, *out):
        return _run(st, rules, events, start, end, sizes, empties, limited, *out)

    allocated, reserved = np.zeros((2, events.size), np.int64)
    blocks = np.zeros(sizes.size, np.int64)
    start = events.size if steady is None else steady.start
    served = serve(0, start, allocated, reserved, blocks)
    if served < start or steady is None:
        return Replay(served, allocated, reserved, blocks)
    opened = st.numbers[_OPENED]
    served = serve(start, events.size, allocated, reserved, blocks)
    for _ in range(REPEATS):
        if served < events.size or st.numbers[_OPENED] == opened:
            break
        if (blocks[steady.given] != blocks[steady.left]).any():  # where this stream would be told in two ways
            break
        st.live[steady.given], st.live[steady.left] = st.live[steady.left], -1
        opened, again, others = st.numbers[_OPENED], allocated.copy(), blocks.copy()
        served = serve(start, events.size, again, reserved, others)
        if again[start:].max() > allocated[start:].max():
            allocated, blocks = again, others
    return Replay(served, allocated, reserved, blocks)


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

    def __init__(self, settings: Settings = Settings(), keys: int = 1 << 16):
        self.rules = _rules(settings)
        self._state = _state(4 * keys, keys)
        self.peak_allocated = self.peak_reserved = 0

    @property
    def allocated(self) -> int:
        return int(self._state.numbers[_ALLOCATED])

    @property
    def reserved(self) -> int:
        return int(self._state.numbers[_RESERVED])

    def malloc(self, key: int, size: int) -> None:
        """Serve ``size`` bytes under ``key``. Raises :class:`OutOfMemory` where CUDA's would."""
        numbers = self._state.numbers
        if not 0 <= key < self._state.live.size or max(numbers[_ROWS], numbers[_RESTS]) + _SPARE > len(
            self._state.blocks
        ):
            raise ValueError(f"made for {self._state.live.size} keys")
        if not _malloc(self._state, self.rules, key, size):
            raise OutOfMemory(int(round_size(size)))
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def free(self, key: int) -> None:
        _free(self._state, key)

    def empty_cache(self) -> None:
        _empty_cache(self._state, self.rules)

    def blocks(self) -> list[tuple[int, int]]:
        """(address, size) of every block that is taken, by address."""
        rows = self._state.blocks[self._state.live[self._state.live >= 0]]
        return sorted(zip(rows[:, _ADDRESS].tolist(), rows[:, _SIZE].tolist()))
