"""The compiled allocator does what its twin in plain Python does: the same bytes, the same blocks, the same errors.

A step is a number: ``n`` takes n bytes, ``-n`` gives back the n-th last block (counted round), 0 empties the cache. The
steps are Hypothesis's, or a real job's: ``tests/measured/streams.jsonl.gz``, described in ``test_allocator.py``.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vramplan.memory.allocator import caching as compiled
from vramplan.memory.allocator.config import AllocatorConfig, ReplayInput

from tests.reference_allocator import MIB, OutOfMemory, ReferenceAllocator

BORDERS = [1, 511, 512, 513, *(n * MIB + off for n in (1, 2, 10, 20, 33) for off in (-1, 0, 1))]
TAKES = st.one_of(st.sampled_from(BORDERS), st.integers(1, MIB), st.integers(MIB, 70 * MIB))
SHORT = st.lists(st.one_of(TAKES, st.integers(-12, 0)), max_size=30)


def history(seed: int) -> list[int]:
    """Three hundred steps of a few sizes each, as a job takes them: far more than Hypothesis would make by itself."""
    random = Random(seed)
    pick = [lambda: random.choice(BORDERS), lambda: random.randint(1, MIB), lambda: random.randint(MIB, 70 * MIB)]
    menu = [random.choice(pick)() for _ in range(random.randint(2, 12))]
    takes = random.choice([0.5, 0.6, 0.7])
    empties = random.choice([0, 0.02, 0.1])

    def step() -> int:
        if random.random() < empties:
            return 0
        return random.choice(menu) if random.random() < takes else -random.randint(1, 40)

    return [step() for _ in range(300)]


STEPS = st.one_of(SHORT, st.builds(history, st.integers(0, 1 << 32)))
SETTINGS = st.builds(
    AllocatorConfig,
    expandable_segments=st.booleans(),
    max_split_size=st.sampled_from([None, 20 * MIB, 33 * MIB]),  # whole MiB, and no less than a large segment
    limit=st.sampled_from([None, 87 * MIB, 152 * MIB]),
)
CUDA_STREAMS = st.integers(1, 3)
A_SMALL_REQUEST_AT_THE_LIMIT = [40 * MIB, 45 * MIB, -1, -1, 1]
OVERSIZE_ONES_THAT_SUFFICE = [20 * MIB, 20 * MIB, 1, -1, -1, -1, 40 * MIB]
TWO_HOLES = [60 * MIB, MIB + 1, 40 * MIB, MIB + 1, -4, -2, 0, 20 * MIB]

STREAMS = [
    json.loads(line)
    for line in gzip.open(Path(__file__).parent / "measured" / "streams.jsonl.gz", "rt", encoding="utf-8")
]


def books(allocator: compiled.CachingAllocator | ReferenceAllocator) -> tuple:
    return allocator.allocated, allocator.reserved, allocator.blocks()


@given(STEPS, SETTINGS, CUDA_STREAMS)
@example(A_SMALL_REQUEST_AT_THE_LIMIT, AllocatorConfig(max_split_size=33 * MIB, limit=87 * MIB), 1)
@example(OVERSIZE_ONES_THAT_SUFFICE, AllocatorConfig(max_split_size=20 * MIB, limit=62 * MIB), 1)
@example(TWO_HOLES, AllocatorConfig(expandable_segments=True), 1)
@settings(max_examples=120, deadline=None)
def test_step_by_step(steps: list[int], how: AllocatorConfig, streams: int):
    """Requests go to the streams in turn."""
    fast, twin = compiled.CachingAllocator(how, len(steps) + 1), ReferenceAllocator(how)
    live = []
    for key, step in enumerate(steps):
        if step > 0:
            block = served_by_twin(twin, step, key % streams)
            if block:
                fast.malloc(key, step, key % streams)
                live.append((key, block))
            else:
                with pytest.raises(compiled.OutOfMemory):
                    fast.malloc(key, step, key % streams)
        elif step == 0:
            fast.empty_cache()
            twin.empty_cache()
        elif live:
            key, block = live.pop(step % len(live))
            fast.free(key)
            twin.free(block)
        assert books(fast) == books(twin)
        assert (
            twin.allocated + sum(block.size for block in twin.cached()) == twin.reserved <= (how.limit or twin.reserved)
        )


def served_by_twin(twin: ReferenceAllocator, size: int, stream: int):
    try:
        return twin.malloc(size, stream)
    except OutOfMemory:
        return None


def replay_input_of(steps: list[int], streams: int) -> tuple[ReplayInput, np.ndarray]:
    """The same steps as :func:`vramplan.memory.allocator.caching.replay` takes them, with a cut after every event."""
    events, sizes, empties, live = [], [], [], []
    for step in steps:
        if step > 0:
            live.append(len(sizes))
            events.append(len(sizes))
            sizes.append(step)
        elif step == 0:
            empties.append(len(events))
        elif live:
            events.append(~live.pop(step % len(live)))
    cuts, numbers = np.arange(len(events) + 1), np.arange(len(sizes), dtype=np.int32)
    stream = (numbers % streams).astype(np.uint8)
    empty_caches = np.array(empties, np.int64)
    replay_input = ReplayInput(np.array(events, np.int32), numbers, stream, cuts, empty_caches, None, len(sizes))
    return replay_input, np.array(sizes, np.int64)


def check_replay(replay_input: ReplayInput, sizes: np.ndarray, how: AllocatorConfig) -> None:
    """One call for the compiled allocator, up to where the memory ends; event by event for the twin."""
    found, twin = compiled.replay(replay_input, sizes, how), ReferenceAllocator(how)
    live, empties = {}, replay_input.empty_cache_events.tolist()
    for at, event in enumerate(replay_input.events.tolist()):
        while empties and empties[0] == at:
            twin.empty_cache()
            del empties[0]
        if event < 0:
            twin.free(live.pop(~event))
        else:
            live[event] = served_by_twin(twin, int(sizes[event]), int(replay_input.stream[event]))
            if not live[event]:
                assert found.served == at
                return
            assert found.block_sizes[event] == live[event].size
        assert (found.allocated_after[at], found.reserved_after[at]) == (twin.allocated, twin.reserved), at
    assert found.served == replay_input.events.size


@given(STEPS, SETTINGS, CUDA_STREAMS)
@example(A_SMALL_REQUEST_AT_THE_LIMIT, AllocatorConfig(max_split_size=33 * MIB, limit=87 * MIB), 1)
@example(OVERSIZE_ONES_THAT_SUFFICE, AllocatorConfig(max_split_size=20 * MIB, limit=62 * MIB), 1)
@example(TWO_HOLES, AllocatorConfig(expandable_segments=True), 1)
@settings(max_examples=80, deadline=None)
def test_a_whole_replay(steps: list[int], how: AllocatorConfig, streams: int):
    replay_input, sizes = replay_input_of(steps, streams)
    if replay_input.events.size:
        check_replay(replay_input, sizes, how)


@pytest.mark.parametrize("limit", [None, 0.98], ids=["free", "limited"])
@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream["id"])
def test_a_recorded_history(stream: dict, limit: float | None):
    """What a real job asked for; also under a limit a little below what it reserved at most."""
    replay_input, sizes = recorded(stream["events"])
    how = AllocatorConfig(**stream["settings"])
    if limit:
        most = int(compiled.replay(replay_input, sizes, how).peak_reserved.max())
        how = AllocatorConfig(**stream["settings"], limit=int(limit * most))
    check_replay(replay_input, sizes, how)


def recorded(events: list) -> tuple[ReplayInput, np.ndarray]:
    events = np.array([event for event in events if not isinstance(event, list)], np.int64)
    taken = events >= 0
    keys = np.where(taken, np.cumsum(taken) - 1, events).astype(np.int32)
    sizes = events[taken]
    numbers = np.arange(sizes.size, dtype=np.int32)
    stream, cuts = np.zeros(sizes.size, np.uint8), np.arange(keys.size + 1)
    return ReplayInput(keys, numbers, stream, cuts, np.zeros(0, np.int64), None, sizes.size), sizes
