"""From a job to its profile: the card, the config, and the dry run, kept by everything that shapes it."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from app.calibration import kernels_found
from app.catalog.gpus import Gpu, find_gpu
from app.catalog.models import find_model
from app.config import refuse_impossible
from app.errors import PlanError
from app.job import Job, OwnGpu, point_of
from app.memory.breakdown import Reading, read
from app.memory.kernels import KernelFacts
from app.memory.profile import Profile
from app.memory.rules import MIB, Settings
from app.memory.script import Script, Stream, packed, unpacked
from app.store import Store, own_path

Kernels = tuple[tuple[int, int], int, KernelFacts]
"""Compute capability, multiprocessors, and what a probe found otherwise."""
Point = tuple[int, int, int]
"""Batch, length and the card's multiprocessors."""
Order = tuple[str, Job, dict, Kernels]
"""What a :class:`Tracer` needs: the key of :func:`key_of`, the job (resolved), its config, and the kernels."""
DEFAULT_GPU = "a100-80gb"
"""The card whose kernels are meant when a job names none."""

HEADER_SECONDS = 8.0
"""Time to count the weights of a checkpoint that cannot be planned."""

_NOT_YET = {
    "strategy": ("single", "several cards are not planned yet", "plan one card's share with strategy single"),
    "gpu_count": (1, "several cards are not planned yet", "set gpu_count to 1"),
    "nodes": (1, "several nodes are not planned yet", "set nodes to 1"),
}


def refuse_unplanned(job: Job) -> None:
    for field, (only, message, hint) in _NOT_YET.items():
        if getattr(job, field) != only:
            raise PlanError(f"`{field}` is {getattr(job, field)!r}: {message}", hint, field)
    if job.attention == "flash_attention_2":
        raise PlanError(
            "flash_attention_2 is a package of its own that is not installed here", "use attention sdpa", "attention"
        )


def card_of(job: Job) -> Gpu | OwnGpu:
    if isinstance(job.gpu, OwnGpu):
        return job.gpu
    return find_gpu(job.gpu or DEFAULT_GPU)


def chip_of(gpu: Gpu | OwnGpu) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors that are traced for a card; an own card has those of the card that it is
    like, else the default card's. Raises :class:`PlanError`."""
    known = gpu if isinstance(gpu, Gpu) else find_gpu(gpu.like or DEFAULT_GPU)
    if known.compute_capability is None:
        raise PlanError(f"{known.name} runs ROCm, whose kernels are not modelled", "choose an NVIDIA card", "gpu")
    return known.compute_capability, known.sm_count or find_gpu(DEFAULT_GPU).sm_count


def kernels_of(gpu: Gpu | OwnGpu) -> Kernels:
    """:func:`chip_of`, and what a probe here found the card's kernels to do otherwise."""
    return *chip_of(gpu), kernels_found(gpu)


def place_of(job: Job, card: Gpu | OwnGpu) -> Point:
    """Where in its profile a job (resolved) on a card is."""
    return *point_of(job), chip_of(card)[1]


def config_of(job: Job) -> tuple[dict, dict]:
    """config.json's object, and where it came from."""
    config, source = _config_of(job)
    refuse_impossible(config)
    return config, source


def _config_of(job: Job) -> tuple[dict, dict]:
    if job.config is not None:
        return job.config, {"kind": "inline", "id": None}
    name = job.model
    known = find_model(name)
    if known is not None:
        return dict(known.config), {"kind": "catalogue", "id": known.id}
    for path in (name, os.path.join(name, "config.json")):
        if os.path.isfile(path):
            return _read_file(path), {"kind": "file", "id": path}
    from app.hub import fetch_config

    return fetch_config(name, job.revision)


def with_weights(error: PlanError, job: Job, source: dict) -> PlanError:
    """``error`` about a model, with what its checkpoint weighs where headers of safetensors files can be read."""
    if error.weights is not None or error.field not in ("model", "config") or source["kind"] not in ("hub", "file"):
        return error
    from app.hub import weights_of

    try:
        place = job.model if source["kind"] == "hub" else os.path.dirname(os.path.abspath(source["id"]))
        counted = weights_of(place, source.get("commit"), seconds=HEADER_SECONDS)
    except PlanError:
        return error
    error.weights = {
        **{key: counted[key] for key in ("parameters", "bytes", "by_dtype")},
        "from": "safetensors headers",
    }
    return error


def _read_file(path: str) -> dict:
    size = os.path.getsize(path)
    if size > 4 * MIB:
        raise PlanError(f"{path} has {size} bytes: no config.json is that large", "name the model's own", "model")
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} cannot be read as JSON: {error}", "name a config.json", "model") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path} holds no JSON object", "name a config.json", "model")
    return data


class Tracer(Protocol):
    """Who runs a job on the meta device. ``part``: ``step`` (for the job's own batch and length), ``general`` (for all
    that run alike), ``finish`` or ``load``; ``key`` is that of :func:`key_of`."""

    alone: bool
    """Whether this process answers one question and ends."""

    def trace(self, part: str, key: str, job: Job, config: dict, kernels: Kernels) -> bytes:
        """What the run leaves: a :class:`Profile`, or a :class:`Script`, as bytes. Raises :class:`PlanError`."""

    def later(self, part: str, key: str, job: Job, config: dict, kernels: Kernels) -> None:
        """Trace it when there is nothing else to do, and :func:`keep` it."""


class Here:
    """Runs jobs in this process."""

    alone = True

    def trace(self, part: str, key: str, job: Job, config: dict, kernels: Kernels) -> bytes:
        from app.dryrun import finish, run

        with _without_collector():
            if part in ("step", "general"):
                return run.trace(job, config, *kernels, general=part == "general").dump()
            return packed(finish.trace(part, job, config, *kernels).dump())

    def later(self, part: str, key: str, job: Job, config: dict, kernels: Kernels) -> None:
        """There is no later here."""


@contextmanager
def _without_collector():
    """Python's cyclic collector off: it would look for garbage among millions of live objects, again and again, and
    takes two fifths of the time in which a model is made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


tracer: ContextVar[Tracer] = ContextVar("tracer", default=Here())

KEPT_EVENTS = 3_000_000
"""Events of the profiles that are kept in memory, some fifteen bytes each."""
REGIONS = 32
"""Profiles of one kind of job that are kept, in memory and on disk: the latest; in memory those that hold for one batch
and length go first."""
ALONE = 4
"""Profiles of a kind that hold for one batch and length each, before one for all that run alike is made: that takes 4
(405B) to 15 times (70M) as long."""
NARROW = 2
"""Of the latter, how many may turn out to hold for few points (a scan that runs once a token holds for one length, a
length of 1 is a kind of its own), before no more are made."""


class _Shelf:
    """What was read from the stores or traced, by kind: in memory, the kinds asked for last."""

    def __init__(self):
        self._kinds: OrderedDict[str, dict[bytes, Profile | Script | PlanError]] = OrderedDict()
        self._events = 0
        self._lock = threading.Lock()
        self.own = Store(own_path())

    def known(self, kind: str, read: Callable[[bytes], Any]) -> list[Any]:
        """What is known of a kind, the latest first."""
        with self._lock:
            here = self._kinds.get(kind)
            if here is not None:
                self._kinds.move_to_end(kind)
                return [*reversed(here.values())]
        return self.look(kind, read)

    def look(self, kind: str, read: Callable[[bytes], Any]) -> list[Any]:
        """The same, with what other processes have stored since."""
        for data in self.stored(kind):
            self._put(kind, data, read)
        with self._lock:
            return [*reversed(self._kinds.get(kind, {}).values())]

    def stored(self, kind: str) -> list[bytes]:
        """What the stores hold of a kind."""
        return [*_pretraced.get(_digest(kind)), *self.own.get(_digest(kind))]

    def keep(self, kind: str, data: bytes, read: Callable[[bytes], Any]) -> Any:
        """Store it, and what it says."""
        self.own.put(_digest(kind), data, REGIONS)
        return self._put(kind, data, read)

    def _put(self, kind: str, data: bytes, read: Callable[[bytes], Any]) -> Any:
        name = sha256(data).digest()
        with self._lock:
            found = self._kinds.get(kind, {}).get(name)
        if found is not None:
            return found
        try:
            said = read(data)
        except ValueError:  # damaged: as if it were not there
            return None
        with self._lock:
            here = self._kinds.setdefault(kind, {})
            self._kinds.move_to_end(kind)
            here[name] = said
            self._events += _events(said)
            while len(here) > REGIONS:
                single = (name for name, one in here.items() if isinstance(one, Profile) and not one.general)
                self._events -= _events(here.pop(next(single, next(iter(here)))))
            while self._events > KEPT_EVENTS and len(self._kinds) > 1:
                _, gone = self._kinds.popitem(last=False)
                self._events -= sum(map(_events, gone.values()))
        return said


PRETRACED = Path(__file__).parent / "catalog" / "profiles.db"
"""The catalogue's usual jobs, traced ahead (:mod:`app.pretrace`)."""
_pretraced = Store(PRETRACED, fixed=True)
_shelf = _Shelf()


def store_in(path: Path) -> None:
    """Keep what is traced from now on in another file."""
    _shelf.own = Store(path)


def _events(said: Profile | Script | PlanError) -> int:
    if isinstance(said, PlanError):
        return 0
    return (said.script if isinstance(said, Profile) else said).events.size


def profile_of(job: Job, config: dict, card: Gpu | OwnGpu) -> Profile:
    """A profile that holds for the job (resolved), known or traced. The first of a kind get one of their own, the next
    one for all that run alike; where that holds for few, there is one each again. Raises :class:`PlanError`."""
    order, point = order_of(job, config, card), place_of(job, card)
    for search in (_shelf.known, _shelf.look):
        known = search(order[0], Profile.load)
        for profile in known:
            if profile.script.holds(*point):
                return profile
    general = [profile for profile in known if profile.general]
    if len(known) - len(general) >= ALONE and sum(not profile.broad for profile in general) < NARROW:
        with suppress(PlanError):
            return keep("general", order[0], tracer.get().trace("general", *order))
    return keep("step", order[0], tracer.get().trace("step", *order))


def generalise(job: Job, config: dict, card: Gpu | OwnGpu) -> None:
    """Have the job (resolved) traced for all that run alike, when there is time, if only one batch and length of its
    kind is known: somebody asked, and may ask for another."""
    order = order_of(job, config, card)
    if not any(profile.general for profile in _shelf.known(order[0], Profile.load)):
        tracer.get().later("general", *order)


def keep(part: str, key: str, data: bytes) -> Any:
    """Keep what a :class:`Tracer` made of a job with this key: what the bytes say."""
    if part in ("step", "general"):
        return _shelf.keep(key, data, Profile.load)
    return _shelf.keep(f"{part} {key}", data, _script)


def order_of(job: Job, config: dict, card: Gpu | OwnGpu) -> Order:
    """A job (resolved) as a :class:`Tracer` takes it."""
    kernels = kernels_of(card)
    return key_of(job, config, kernels), job, config, kernels


def key_of(job: Job, config: dict, kernels: Kernels) -> str:
    """Everything that shapes a profile, as one string: the job without its batch and length and without what only
    reads a profile, the config, the kernels but for the number of multiprocessors. Of accumulated batches it is how
    many are run; a trainer fetches all of them first."""
    shape = job.model_dump(
        exclude={"model", "config", "revision", "gpu", "reserve", "allocator", "batch_size", "sequence_length"}
    )
    if job.trainer == "pytorch":
        shape["gradient_accumulation_steps"] = job.batches_run
    capability, _, measured = kernels
    return json.dumps([shape, config, capability, measured], sort_keys=True, default=str)


def _digest(kind: str) -> str:
    """What a kind is stored under: itself, traced by this engine on this stack."""
    return sha256(f"{engine()} {kind}".encode()).hexdigest()


@lru_cache(maxsize=1)
def engine() -> str:
    """What traces a job: the versions of the stack and the sources of the dry run and the books."""
    here = Path(__file__).parent
    sources = [*sorted((here / "dryrun").glob("*.py")), *sorted((here / "memory").glob("*.py"))]
    told = sha256(json.dumps(stack()).encode())
    for path in (*sources, here / "job.py", here / "config.py", here / "plan.py"):
        told.update(path.read_bytes())
    return told.hexdigest()


def finish_of(job: Job, config: dict, card: Gpu | OwnGpu) -> Stream:
    """Merging and writing what the job trained. Raises :class:`PlanError`."""
    return _stream_of("finish", job, config, card)


def load_of(job: Job, config: dict, card: Gpu | OwnGpu) -> Stream:
    """Placing the job's model alone. Raises :class:`PlanError`."""
    return _stream_of("load", job, config, card)


def _stream_of(part: str, job: Job, config: dict, card: Gpu | OwnGpu) -> Stream:
    order = order_of(job, config, card)
    point = (1, 1, chip_of(card)[1])
    known = _shelf.known(f"{part} {order[0]}", _script)
    script = next((one for one in known if isinstance(one, PlanError) or one.holds(*point)), None)
    if script is None:
        try:
            data = tracer.get().trace(part, *order)
        except PlanError as error:
            data = packed({"refused": error.as_dict()})
        script = keep(part, order[0], data)
    if isinstance(script, PlanError):
        raise script
    return stream_at(script, point)


@lru_cache(maxsize=32)
def stream_at(script: Script, point: Point) -> Stream:
    """``script.at(*point)``, of the latest ones the same object."""
    return script.at(*point)


def _script(data: bytes) -> Script | PlanError:
    told = unpacked(data)
    return PlanError(**told["refused"]) if "refused" in told else Script.load(told, sha256(data).hexdigest())


def reading_of(stream: Stream, settings: Settings) -> Reading:
    """What :func:`~app.memory.breakdown.read` says, or as it is stored. A command line stores it: reading takes numba,
    whose import takes longer than all the rest."""
    kind = f"reading {stream.script.digest} {stream.point} {settings}"
    if tracer.get().alone:
        for data in _shelf.stored(kind):
            with suppress(ValueError):
                return Reading.load(data)
    reading = read(stream, settings)
    if tracer.get().alone:
        _shelf.own.put(_digest(kind), reading.dump(), 1)
    return reading


def settings_of(job: Job) -> Settings:
    split = job.allocator.max_split_size_mb
    return Settings(job.allocator.expandable_segments, None if split is None else split * MIB)


@lru_cache(maxsize=1)
def stack() -> dict[str, str]:
    """The versions that a plan is traced with."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
    return {"vramplan": version("vramplan"), **{name: version(name) for name in names}}
