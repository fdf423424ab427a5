"""Streams of the meta device: which one is current when something is allocated. Nothing runs, so nothing is waited for.

PyTorch gives a freed block back to the pool of the stream that it was allocated on (Note [Streams] in
``memory/allocator/caching.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import OurFault
from ...memory.allocator.config import STREAMS


class Event:
    """An event that has passed."""

    def __init__(self, *args: Any, **kwargs: Any):
        """As ``torch.cuda.Event``."""

    def record(self, stream: Stream | None = None) -> None:
        """It passes at once."""

    def wait(self, stream: Stream | None = None) -> None:
        """It has passed."""

    def query(self) -> bool:
        """It has passed."""
        return True

    def synchronize(self) -> None:
        """It has passed."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds: none."""
        return 0.0


class Stream:
    """A stream that everything waits for already; ``number`` is what the allocator knows it by."""

    def __init__(self, number: int):
        self.number = self.stream_id = number
        self.device = torch.device("meta")

    def record_event(self, event: Event | None = None) -> Event:
        """An event that has passed."""
        return event or Event()

    def wait_event(self, event: Event) -> None:
        """It has passed."""

    def wait_stream(self, stream: Stream) -> None:
        """It has nothing to do."""

    def synchronize(self) -> None:
        """It has nothing to do."""

    def query(self) -> bool:
        """It has nothing to do."""
        return True


class Streams:
    """``torch.cuda``, as far as who works with streams asks it; ``observer`` is told which one is current.

    ``torch.cuda.Stream`` hands out streams of a pool of 32, one after the other; here there are
    :data:`~vramplan.memory.allocator.config.STREAMS`, for each is a pool of its own.
    """

    Event = Event

    def __init__(self, observer: Any):
        self._observer = observer
        self._current = self._default = Stream(0)
        self._made = 0
        self.empty_cache = observer.empty_cache

    def Stream(self, *args: Any, **kwargs: Any) -> Stream:
        """One more stream."""
        self._made += 1
        if self._made >= STREAMS:
            raise OurFault(f"a program makes more than {STREAMS} streams")
        return Stream(self._made)

    def current_stream(self, device: Any = None) -> Stream:
        """The stream that is current."""
        return self._current

    def default_stream(self, device: Any = None) -> Stream:
        """The stream with which a program begins."""
        return self._default

    def current_device(self) -> torch.device:
        """The only one."""
        return torch.device("meta")

    def device_count(self) -> int:
        """One a process."""
        return 1

    def set_device(self, device: Any) -> None:
        """There is only one."""

    def synchronize(self, device: Any = None) -> None:
        """Nothing runs."""

    def is_available(self) -> bool:
        """It is there."""
        return True

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        """``stream`` is current while the context lasts; None: as before."""
        before = self._current
        self.set_stream(stream or before)
        try:
            yield
        finally:
            self.set_stream(before)

    def set_stream(self, stream: Stream) -> None:
        """``stream`` is current from now on."""
        self._current, self._observer.stream = stream, stream.number

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        """There is only one device."""
        yield


def streams_of(observer: Any) -> Streams:
    """The streams of a dry run's device; ``observer.stream`` is the number of the current one."""
    return Streams(observer)
