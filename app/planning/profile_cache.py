"""Profiles that were traced, in memory and on disk: whoever asks again gets what is there."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from ..catalog.gpus import Gpu
from ..errors import Limited, PlanError, Unanswered
from ..job import Job, OwnGpu
from ..memory.allocator.config import AllocatorConfig
from ..memory.fit import fits_under_limit
from ..memory.profile import Profile
from ..memory.sizes import ShapePoint
from ..memory.summary import MemorySummary, summarize
from ..memory.template import ConcreteTrace, TraceTemplate, packed, unpacked
from ..resources import CATALOG
from . import fault_reports
from .fingerprint import NotTraced, cache_key, shipped_key, use_shipped
from .profile_store import Store, own_path
from .resolve import chip_of, shape_point_of
from .tracer import TraceRequest, request_of, tracer

T = TypeVar("T")
Trace = Profile | TraceTemplate | PlanError
Load = Callable[[bytes], Any]
"""How bytes become a trace. Raises :class:`ValueError` where they are damaged."""

KEPT_EVENTS = 3_000_000
"""Events of the profiles that are kept in memory, some fifteen bytes each."""
TRACES_PER_KIND = 32
"""Profiles of one kind of job that are kept, in memory and on disk: the latest; in memory those that hold for one batch
and length go first."""
POINT_PROFILES_BEFORE_GENERAL = 4
"""Profiles of a kind that hold for one batch and length each, before one for all that run alike is made: that takes 4
(405B) to 15 times (70M) as long."""
NARROW_GENERALS_TOLERATED = 2
"""Of the latter, how many may turn out to hold for few points (a scan that runs once a token holds for one length, a
length of 1 is a kind of its own), before no more are made."""


class ProfileCache:
    """Traces that are known, by kind of job: in memory the kinds that were asked for last, else on disk.

    A kind is the key of a :class:`~vramplan.planning.tracer.TraceRequest`, with the part that was traced before it.
    Its traces hold for different batches and lengths.
    """

    def __init__(self) -> None:
        self._kinds: OrderedDict[str, dict[bytes, Trace]] = OrderedDict()
        self._events = 0
        self._lock = threading.Lock()
        self.own = Store(own_path(), key=cache_key)

    def find(self, kind: str, load: Load, holds: Callable[[Any], bool]) -> Any:
        """The first known trace of a kind for which ``holds`` is true; None: there is none. Looks in memory first,
        then in the file that the package brings along, then in the user's own cache."""
        for search in (self.in_memory, self._load_shipped, self._load_own):
            for trace in search(kind, load):
                if holds(trace):
                    return trace
        return None

    def in_memory(self, kind: str, load: Load | None = None) -> list[Any]:
        """The traces of a kind that are in memory, the latest first."""
        with self._lock:
            if kind in self._kinds:
                self._kinds.move_to_end(kind)
            return [*reversed(self._kinds.get(kind, {}).values())]

    def stored(self, kind: str) -> Iterator[bytes]:
        """The bytes that the files hold of a kind."""
        yield from shipped(kind)
        yield from self.own.get(kind)

    def put(self, kind: str, data: bytes, load: Load) -> Any:
        """Store the bytes of a trace; returns the trace."""
        self.own.put(kind, data, TRACES_PER_KIND)
        return self._keep(kind, data, load)

    def _load_shipped(self, kind: str, load: Load) -> list[Any]:
        return self._load(kind, shipped(kind), load)

    def _load_own(self, kind: str, load: Load) -> list[Any]:
        return self._load(kind, self.own.get(kind), load)

    def _load(self, kind: str, entries: list[bytes], load: Load) -> list[Any]:
        for data in entries:
            with suppress(ValueError):  # a damaged entry counts as absent
                self._keep(kind, data, load)
        return self.in_memory(kind)

    def _keep(self, kind: str, data: bytes, load: Load) -> Any:
        digest = sha256(data).digest()
        with self._lock:
            known = self._kinds.get(kind, {}).get(digest)
        if known is not None:
            return known
        trace = load(data)
        with self._lock:
            traces = self._kinds.setdefault(kind, {})
            self._kinds.move_to_end(kind)
            traces[digest] = trace
            self._events += _event_count(trace)
            self._drop_oldest(traces)
        return trace

    def _drop_oldest(self, traces: dict[bytes, Trace]) -> None:
        """Keep the limits: of one kind, traces that hold for one point go first; of all kinds, the oldest."""
        while len(traces) > TRACES_PER_KIND:
            single = (
                digest for digest, one in traces.items() if isinstance(one, Profile) and not one.covers_other_batches
            )
            self._events -= _event_count(traces.pop(next(single, next(iter(traces)))))
        while self._events > KEPT_EVENTS and len(self._kinds) > 1:
            _, dropped = self._kinds.popitem(last=False)
            self._events -= sum(map(_event_count, dropped.values()))


SHIPPED = CATALOG / "profiles.db"
"""The catalogue's usual jobs, traced ahead (:mod:`vramplan.planning.pretrace`)."""
_shipped = Store(SHIPPED, fixed=True, key=shipped_key)


def shipped(kind: str) -> list[bytes]:
    """What the package brings along of a kind; nothing where another stack is installed and can trace."""
    return _shipped.get(kind) if use_shipped() else []


_profiles = ProfileCache()


def build_shipped(path: Path) -> None:
    """Keep what is traced from now on in a file of the kind that the package brings along."""
    _profiles.own = Store(path, key=shipped_key)


def _event_count(trace: Trace) -> int:
    if isinstance(trace, PlanError):
        return 0
    return (trace.template if isinstance(trace, Profile) else trace).events.size


def profile_of(job: Job, config: dict, card: Gpu | OwnGpu, rank: int = 0) -> Profile:
    """A profile that holds for a rank of a resolved job on a card, known or traced now. Raises :class:`PlanError`.

    The first jobs of a kind get a profile for their own point. The next job gets a general profile, for all points at
    which the software does the same; where general profiles cover few points, each job gets its own again.
    """
    request, point = request_of(job, config, card, rank), shape_point_of(job, card)
    found: Profile | None = _profiles.find(request.key, Profile.load, lambda profile: profile.template.holds(point))
    if found is None and _general_is_due(_profiles.in_memory(request.key)):
        try:
            found = store_trace("general", request, tracer.get().trace("general", request))
        except PlanError:
            pass
        except Unanswered as given_up:
            fault_reports.go_on_without(given_up)
    return found or store_trace("step", request, tracer.get().trace("step", request))


def _general_is_due(profiles: list[Profile]) -> bool:
    general = [profile for profile in profiles if profile.covers_other_batches]
    narrow = sum(not profile.covers_many_points for profile in general)
    return len(profiles) - len(general) >= POINT_PROFILES_BEFORE_GENERAL and narrow < NARROW_GENERALS_TOLERATED


def trace_general_later(job: Job, config: dict, card: Gpu | OwnGpu) -> None:
    """Have a general profile of a resolved job traced when there is time: who asked once may ask for another point."""
    request = request_of(job, config, card)
    if not any(profile.covers_other_batches for profile in _profiles.in_memory(request.key)):
        tracer.get().later("general", request)


def store_trace(part: str, request: TraceRequest, data: bytes) -> Any:
    """Store what a :class:`~vramplan.planning.tracer.Tracer` made of a request; returns the trace."""
    if part in ("step", "general"):
        return _profiles.put(request.key, data, Profile.load)
    return _profiles.put(f"{part} {request.key}", data, _load_template)


def merge_and_save_of(job: Job, config: dict, card: Gpu | OwnGpu) -> ConcreteTrace:
    """The trace of merging and writing what a resolved job trained. Raises :class:`PlanError`."""
    return _part_of("finish", job, config, card)


def load_of(job: Job, config: dict, card: Gpu | OwnGpu) -> ConcreteTrace:
    """The trace of placing the model of a resolved job alone. Raises :class:`PlanError`."""
    return _part_of("load", job, config, card)


def _part_of(part: str, job: Job, config: dict, card: Gpu | OwnGpu) -> ConcreteTrace:
    request, point = request_of(job, config, card), ShapePoint(1, 1, chip_of(card)[1])
    known = _profiles.find(f"{part} {request.key}", _load_template, lambda one: _answers(one, point))
    if known is None:
        try:
            data = tracer.get().trace(part, request)
        except (NotTraced, Limited):  # of this machine at this time: nothing to remember
            raise
        except PlanError as error:
            data = packed({"refused": error.as_dict()})
        known = store_trace(part, request, data)
    if isinstance(known, PlanError):
        raise known
    return concrete_at(known, point)


def _answers(trace: TraceTemplate | PlanError, point: ShapePoint) -> bool:
    return isinstance(trace, PlanError) or trace.holds(point)


@lru_cache(maxsize=32)
def concrete_at(template: TraceTemplate, point: ShapePoint) -> ConcreteTrace:
    """``template.at(point)``; the latest answers are the same objects."""
    return template.at(point)


def _load_template(data: bytes) -> TraceTemplate | PlanError:
    told = unpacked(data)
    return PlanError(**told["refused"]) if "refused" in told else TraceTemplate.load(told, sha256(data).hexdigest())


def summary_of(concrete: ConcreteTrace, settings: AllocatorConfig) -> MemorySummary:
    """The summary of a trace, without a memory limit."""
    return _computed(
        f"reading {concrete.template.digest} {concrete.point} {settings}",
        MemorySummary.load,
        lambda: summarize(concrete, settings),
        MemorySummary.dump,
    )


def fits_under(concrete: ConcreteTrace, settings: AllocatorConfig) -> tuple[bool, str | None]:
    """Whether a trace passes the replayed allocator under ``settings.limit``; else the phase that does not."""
    return _computed(
        f"limit {concrete.template.digest} {concrete.point} {settings}",
        _load_fits,
        lambda: fits_under_limit(concrete, settings),
        lambda found: packed({"fits": list(found)}),
    )


def _load_fits(data: bytes) -> tuple[bool, str | None]:
    passes, phase = unpacked(data)["fits"]
    return passes, phase


def _computed(kind: str, load: Callable[[bytes], T], compute: Callable[[], T], dump: Callable[[T], bytes]) -> T:
    """What a replay of a trace shows: stored, else computed now. A replay imports numba, which takes longer than all
    else that a command does; so a command stores the result. A server has numba and looks only at what the package
    brings along."""
    one_shot = tracer.get().one_shot
    for data in _profiles.stored(kind) if one_shot else shipped(kind):
        with suppress(ValueError):  # a damaged entry counts as absent
            return load(data)
    found = compute()
    if one_shot:
        _profiles.own.put(kind, dump(found), 1)
    return found
