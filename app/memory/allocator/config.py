"""What the allocator is given: its configuration, and a run as arrays.

The allocator itself is compiled, and takes 0.3 s to import. Whoever only reads what was replayed before does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MIB = 1 << 20
STREAMS = 8
"""Streams of a process that the allocator keeps pools for, at most."""
LARGE_BUFFER = 20 * MIB
"""Bytes of a segment for requests of 1 to 10 MiB: ``kLargeBuffer`` in
https://github.com/pytorch/pytorch/blob/v2.11.0/c10/core/AllocatorConfig.h"""


@dataclass(frozen=True)
class AllocatorConfig:
    """``PYTORCH_ALLOC_CONF`` as far as it changes memory, and the limit. Bytes.

    ``limit`` is what the allocator may reserve (``set_per_process_memory_fraction``, or what is free on the card).
    ``max_split_size``: blocks from this size on are not split. None: no limit.
    """

    expandable_segments: bool = False
    max_split_size: int | None = None
    limit: int | None = None


class RepeatedStep(NamedTuple):
    """The step that training repeats: the events of a run from ``start`` on.

    It frees what the step before it left alive. ``freed_from_previous`` are the keys of these allocations, in the step
    before it, and ``carried_over`` those that this step leaves in their place: one for one, of the same sizes.
    """

    start: int
    freed_from_previous: npt.NDArray[np.signedinteger[Any]]
    carried_over: npt.NDArray[np.signedinteger[Any]]


class ReplayInput(NamedTuple):
    """A run as the allocator reads it, whatever the batch and the length. A key is the number of an allocation.

    ``events`` (int32): ``k`` allocates ``sizes[size[k]]`` bytes, ``~k`` frees them; ``size`` (int32) has one entry for
    each key, and so has ``stream`` (uint8), the number of its stream. ``interval_bounds`` (int64) divide the events
    into intervals; of each, the highest moment is told. The last bound is the number of events, and the start of the
    ``repeated_step`` is one. ``empty_cache_events`` (int64) are the events before which ``empty_cache`` is called.
    ``most_alive`` is how many allocations are alive at a time, at most.
    """

    events: npt.NDArray[np.int32]
    size: npt.NDArray[np.int32]
    stream: npt.NDArray[np.uint8]
    interval_bounds: npt.NDArray[np.int64]
    empty_cache_events: npt.NDArray[np.int64]
    repeated_step: RepeatedStep | None
    most_alive: int
