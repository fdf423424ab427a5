"""What the allocator is told: its settings, and what of a stream is repeated.

The allocator itself is compiled, and takes 0.3 s to import: whoever only reads what was replayed before does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MIB = 1 << 20
LARGE_BUFFER = 20 * MIB  # kLargeBuffer


@dataclass(frozen=True)
class AllocatorConfig:
    """``PYTORCH_ALLOC_CONF`` as far as it changes the books, and the limit.

    ``limit`` is the bytes that the allocator may reserve (``set_per_process_memory_fraction``, or the bytes
    free on the card); ``None``: no limit. ``max_split_size`` is in bytes.
    """

    expandable_segments: bool = False
    max_split_size: int | None = None
    limit: int | None = None


class RepeatedStep(NamedTuple):
    """What a stream does again and again: its events from ``start`` on. What they give back of before (``given``) is
    what they leave (``left``) the time before, allocation for allocation."""

    start: int
    freed_from_previous: np.ndarray
    carried_over: np.ndarray


class ReplayInput(NamedTuple):
    """What of a script the allocator is fed, whatever the batch and the length.

    ``events`` (int32): ``k`` takes ``sizes[size[k]]`` bytes, ``~k`` gives them back. ``cuts`` divide them into
    stretches: of each the highest moment is told; the last is the number of events, and where the ``steady`` step
    begins is one. Before the events ``empties`` the cache is given back. ``alive``: the most allocations at a time.
    """

    events: np.ndarray
    size: np.ndarray
    interval_bounds: np.ndarray
    empty_cache_events: np.ndarray
    steady: RepeatedStep | None
    alive: int
