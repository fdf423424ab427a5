"""The replayed allocator: against histories that a real one served, and against what must hold of any history.

``tests/measured/streams.jsonl.gz``: allocations and releases recorded by ``torch.cuda.memory._record_memory_history``
on an H100 (torch 2.11.0+cu130), with every segment that was opened or given back: ``n`` takes n bytes, ``~k`` gives
back the k-th, ``[n]`` opened a segment (or mapped pages) of n bytes, ``[-n]`` gave one back.
"""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vramplan.memory.allocator.caching import (
    LARGE_BUFFER,
    MIB,
    REPEATS,
    AllocatorConfig,
    CachingAllocator,
    OutOfMemory,
    replay,
    round_size,
)
from vramplan.memory.allocator.config import RepeatedStep, ReplayInput

STREAMS = [
    json.loads(line)
    for line in gzip.open(Path(__file__).parent / "measured" / "streams.jsonl.gz", "rt", encoding="utf-8")
]


@pytest.mark.parametrize(
    "stream", STREAMS, ids=lambda s: f"{s['id']}{'-' + '-'.join(s['settings']) if s['settings'] else ''}"
)
def test_reserved_at_every_step(stream):
    """Reserved follows the real allocator's through tens of thousands of events."""
    allocator = CachingAllocator(AllocatorConfig(**stream["settings"]))
    allocator.malloc(0, 4)  # the recording began after the process had touched the card: one small segment
    real = allocator.reserved
    taken, given_back, worst, peak, run_replay = 1, False, 0, 0, 0
    for event in stream["events"]:
        if isinstance(event, list):
            real += event[0]
            if event[0] < 0 and not given_back:
                allocator.empty_cache()
            given_back = event[0] < 0
            continue
        given_back = False
        if event >= 0:
            allocator.malloc(taken, event)
            taken += 1
            worst = max(worst, abs(allocator.reserved - real))
            peak, run_replay = max(peak, real), max(run_replay, allocator.reserved)
        else:
            allocator.free(~event + 1)
    # Which address cudaMalloc gives decides ties, and a process that ran other jobs has holes in its address space:
    # at no moment does that make a difference of more than a large segment (two where blocks are not split).
    assert worst <= (2 if "max_split_size" in stream["settings"] else 1) * LARGE_BUFFER
    assert run_replay == pytest.approx(peak, rel=0.005)


SIZES = st.one_of(st.integers(1, 4096), st.integers(1, 3 * MIB), st.integers(MIB, 80 * MIB))
STEPS = st.lists(st.one_of(SIZES, st.integers(-60, -1)), max_size=120)
SETTINGS = st.sampled_from(
    [
        AllocatorConfig(),
        AllocatorConfig(expandable_segments=True),
        AllocatorConfig(max_split_size=32 * MIB),
        AllocatorConfig(limit=200 * MIB),
        AllocatorConfig(expandable_segments=True, limit=200 * MIB),
    ]
)

FREE = SETTINGS.filter(lambda how: how.limit is None)


@given(STEPS, SETTINGS)
@settings(max_examples=200, deadline=None)
def test_allocated_is_the_sum_of_the_blocks(steps, how):
    """Whatever is asked for: blocks do not overlap, limits are kept, and a free gives back what its malloc took.

    A block's size is read off ``allocated`` itself, so this does not show that it is right: the twin in
    ``test_allocator_reference.py`` does. Negative numbers free an earlier allocation, counted from the last.
    """
    allocator = CachingAllocator(how)
    live: list[int] = []
    sizes: dict[int, int] = {}
    for number, step in enumerate(steps):
        if step < 0:
            if -step <= len(live):
                key = live.pop(step)
                allocator.free(key)
                del sizes[key]
            continue
        before = allocator.allocated
        try:
            allocator.malloc(number, step)
        except OutOfMemory as error:
            assert how.limit is not None and error.size == round_size(step)
            assert allocator.allocated == before
            continue
        live.append(number)
        sizes[number] = allocator.allocated - before
        assert sizes[number] >= round_size(step)
        assert sizes[number] <= round_size(step) + (
            0 if how.expandable_segments else max(MIB, 20 * MIB if how.max_split_size else MIB)
        )
        assert allocator.allocated == sum(sizes.values()) <= allocator.reserved
        assert how.limit is None or allocator.reserved <= how.limit
        blocks = allocator.blocks()
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(blocks)), "blocks overlap"
    for key in live:
        allocator.free(key)
    allocator.empty_cache()
    assert allocator.allocated == 0 and allocator.reserved == 0


def test_blocks_count_whole():
    """The unsplit rest of a block (at most 1 MiB) counts as allocated: 35 MiB in a segment of 36."""
    allocator = CachingAllocator()
    allocator.malloc(0, 35 * MIB)
    assert allocator.allocated == allocator.reserved == 36 * MIB


def test_cache_is_given_back_before_out_of_memory():
    """``release_cached_blocks`` and a second try come before the error (``DeviceCachingAllocator::malloc``)."""
    allocator = CachingAllocator(AllocatorConfig(limit=64 * MIB))
    allocator.malloc(0, 40 * MIB)
    allocator.free(0)
    allocator.malloc(1, 60 * MIB)
    assert allocator.reserved == 60 * MIB
    with pytest.raises(OutOfMemory):
        allocator.malloc(2, 10 * MIB)


@pytest.mark.parametrize("sizes", [[1024] * 1500, [512 * n for n in range(1, 700)], [MIB * n for n in range(2, 300)]])
def test_any_number_of_free_blocks_and_sizes(sizes):
    """Every other one is given back, so that none merge; then all are asked for again, the largest first."""
    count = len(sizes)
    sizes = np.array([*sizes, *sorted(sizes[::2], reverse=True)], np.int64)
    events = np.array([*range(count), *(~n for n in range(0, count, 2)), *range(count, sizes.size)], np.int32)
    numbers = np.arange(sizes.size, dtype=np.int32)
    stream = np.zeros(sizes.size, np.uint8)
    replay_input = ReplayInput(events, numbers, stream, np.arange(events.size + 1), np.zeros(0, int), None, count)
    found = replay(replay_input, sizes, AllocatorConfig())
    allocator = CachingAllocator()
    for at, event in enumerate(events.tolist()):
        allocator.free(~event) if event < 0 else allocator.malloc(event, int(sizes[event]))
        assert (found.allocated_after[at], found.reserved_after[at]) == (allocator.allocated, allocator.reserved)
    assert found.served == events.size


def test_a_large_job_before_leaves_room_for_many_sizes():
    """The arrays of a large replay are used again. Many sizes of free blocks are no sign that rows ran out."""
    count = 100_000
    events, one_size = np.arange(count, dtype=np.int32), np.zeros(count, np.int32)
    stream = np.zeros(count, np.uint8)
    large = ReplayInput(events, one_size, stream, np.array([0, count]), np.zeros(0, int), None, count)
    assert replay(large, np.array([512], np.int64), AllocatorConfig()).served == count
    test_any_number_of_free_blocks_and_sizes([512 * n for n in range(1, 700)])


@given(st.lists(SIZES, max_size=20), st.lists(SIZES, min_size=1, max_size=12), st.permutations(range(12)), FREE)
@settings(max_examples=200, deadline=None)
def test_a_steady_step_is_served_as_long_as_it_opens_segments(before, own, order, how):
    """Against request by request: two steps of the same requests, of which the last is carried into the next step."""
    own, first = [*own, 1000], len(before)
    order = [n for n in order if n < len(own) - 1]
    takes = [first + n for n in range(len(own))]
    step = [*takes, *(~takes[n] for n in order)]  # the last one taken stays
    again = [event + len(own) if event >= 0 else event - len(own) for event in step]
    events = np.array([*range(first), *step, ~takes[-1], *again], np.int32)
    sizes = np.array([*before, *own, *own], np.int64)
    given = RepeatedStep(first + len(step), np.array([takes[-1]]), np.array([takes[-1] + len(own)]))
    numbers = np.arange(sizes.size, dtype=np.int32)
    cuts, stream = np.arange(events.size + 1), np.zeros(sizes.size, np.uint8)
    replay_input = ReplayInput(events, numbers, stream, cuts, np.zeros(0, int), given, sizes.size)
    found = replay(replay_input, sizes, how)

    allocator = CachingAllocator(how)
    opened, key, names = [], len(sizes), {}

    def serve(part):
        nonlocal key
        for event in part:
            if event < 0:
                allocator.free(names.pop(~event))
                continue
            key, names[event] = key + 1, key
            reserved = allocator.reserved
            allocator.malloc(names[event], int(sizes[event]))
            opened.append(allocator.reserved > reserved)

    serve(events[: given.start])
    for _ in range(1 + REPEATS):
        opened.clear()
        serve(events[given.start :])
        if not any(opened):
            break
        names[given.freed_from_previous[0]] = names.pop(given.carried_over[0])
    assert found.served == events.size
    assert found.reserved_after[-1] == allocator.reserved
    assert found.peak.max() == allocator.peak_allocated
