"""A job planned and held against cards: what every question about fitting is answered from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from weakref import ref

from app.cards import MEASURED_KERNELS, id_of, known, room, usable
from app.catalog.gpus import Gpu, find_gpu
from app.errors import PlanError
from app.job import Job, OwnGpu
from app.memory.breakdown import Phase, Reading
from app.memory.event import KINDS
from app.memory.fit import Verdict, judge, passes
from app.memory.overheads import Room
from app.memory.profile import Profile
from app.memory.rules import Settings
from app.memory.script import Stream
from app.plan import (
    DEFAULT_GPU,
    Point,
    card_of,
    chip_of,
    config_of,
    finish_of,
    place_of,
    profile_of,
    reading_of,
    refuse_unplanned,
    settings_of,
    stream_at,
    with_weights,
)

FITTING = ("fits", "tight")


@dataclass(frozen=True, eq=False)
class Weighing:
    """A job (resolved) with its card, and the profile that holds for it."""

    job: Job
    card: Gpu | OwnGpu
    config: dict
    source: dict
    profile: Profile

    @property
    def settings(self) -> Settings:
        return settings_of(self.job)

    @property
    def facts(self) -> dict:
        return self.profile.facts

    @cached_property
    def point(self) -> Point:
        return place_of(self.job, self.card)

    @property
    def stream(self) -> Stream:
        return stream_at(self.profile.script, self.point)

    @property
    def reading(self) -> Reading:
        """The stream without a limit."""
        return _reading(ref(self.profile), self.point, self.settings)

    @cached_property
    def following(self) -> dict[str, int]:
        """Bytes that merging and writing take (:class:`After`), as far as there is either and it can be planned."""
        try:
            found = after(self)
        except PlanError:
            return {}
        return {name: need for name, need in asdict(found).items() if need is not None} if found else {}


@lru_cache(maxsize=64)
def _reading(profile: ref[Profile], point: Point, settings: Settings) -> Reading:
    """By reference, as the verdicts: what is remembered keeps no profile that the shelf has given up."""
    return reading_of(stream_at(profile().script, point), settings)


def weigh(job: Job) -> Weighing:
    """``job`` planned. Raises :class:`PlanError`."""
    job = job.resolved()
    refuse_unplanned(job)
    card = card_of(job)
    config, source = config_of(job)
    try:
        return Weighing(job, card, config, source, profile_of(job, config, card))
    except PlanError as error:
        raise with_weights(error, job, source) from None


def passes_under(weighing: Weighing, limit: int) -> bool:
    """Whether the step passes the replayed allocator under ``limit`` bytes, the model being there already."""
    return passes(weighing.stream, replace(weighing.settings, limit=limit), placed=True)[0]


def written(weighing: Weighing) -> int:
    """Bytes of all that a steady step takes: what it writes anew, a lower bound of the memory traffic that it causes.

    Of accumulated batches the books hold the passes of :attr:`~app.job.Job.batches_run`, and of a trainer what all of
    them are fetched into.
    """
    stream, marks = weighing.stream, weighing.stream.script.marks
    last = max(mark.step for mark in marks)
    ends = [mark.at for mark in marks[1:]] + [stream.script.events.size]
    total = passes = 0
    for mark, end in zip(marks, ends):
        if mark.step == last:
            events = stream.script.events[mark.at : end]
            taken = events[events >= 0]
            total += int(stream.sizes[taken].sum())
            if mark.name in ("forward", "backward"):
                made = taken[stream.script.kind[taken] != KINDS.index("inputs")]
                passes += int(stream.sizes[made].sum())
    job = weighing.job
    return total - passes + passes * job.gradient_accumulation_steps // job.batches_run


def kind_of(job: Job) -> str:
    """The kind of job that its measured error goes by: a key of :data:`app.memory.fit.MEASURED`."""
    return "int8" if job.quantization is not None and job.quantization.type == "int8" else job.method


def verdict_on(weighing: Weighing, card: Gpu | OwnGpu) -> Verdict:
    """The verdict on a card, by the books of the job's own card."""
    space = room(card, weighing.job.reserve, weighing.reading.parts.get("kernel_workspace", 0))
    return _verdict(ref(weighing.profile), weighing.point, weighing.settings, space, kind_of(weighing.job))


@lru_cache(maxsize=4096)
def _verdict(profile: ref[Profile], point: Point, settings: Settings, space: Room, kind: str) -> Verdict:
    return judge(stream_at(profile().script, point), _reading(profile, point, settings), space, kind, settings)


@dataclass(frozen=True)
class After:
    """What follows a training: bytes allocated at the highest moment of merging the adapter in 16 bit (a process of its
    own; None: nothing to merge) and of writing what was trained, beside what the training holds."""

    merge: int | None
    save: int


def after(weighing: Weighing) -> After | None:
    """What merging and writing take; None: the job trains nothing. Raises :class:`PlanError`."""
    job = weighing.job
    if job.method == "inference":
        return None
    method = "full" if job.method == "full" else "lora"
    stream = finish_of(job.model_copy(update={**_BARE, "method": method}), weighing.config, weighing.card)
    phases = {phase.name: phase for phase in _finish(stream, weighing.settings)}
    save, end = phases["save"], weighing.reading.phases[-1].end
    if job.lora is None:
        return After(None, end + save.peak - save.start)
    return After(max(phases["merge"].peak, save.peak), end)


_BARE = {
    "quantization": None,
    "prepare_for_kbit_training": False,
    "gradient_checkpointing": "off",
    "trainer": "pytorch",
    "mixed_precision": "no",
    "optimizer": "sgd",
    "batch_size": 1,
    "sequence_length": None,
    "gradient_accumulation_steps": 1,
}
"""What does not matter to merging and writing, or is not there any more: the base is merged in its load dtype."""


@lru_cache(maxsize=64)
def _finish(stream: Stream, settings: Settings) -> list[Phase]:
    return reading_of(stream, settings).phases


def cannot(weighing: Weighing, verdict: Verdict) -> list[str]:
    """What of merging and writing a card with ``verdict`` has no room for, as far as they can be planned."""
    return [name for name, need in weighing.following.items() if need > verdict.limit]


def fit_on(weighing: Weighing, card: Gpu | OwnGpu) -> dict:
    """The verdict on a card as the answer has it."""
    verdict = verdict_on(weighing, card)
    return {
        "gpu": id_of(card),
        "name": card.name,
        "memory_bytes": usable(card),
        **vars(verdict),
        "interval": list(verdict.interval),
        "cannot": cannot(weighing, verdict),
        "same_kernels": chip_of(card)[0] == chip_of(weighing.card)[0],
    }


def summary(weighing: Weighing) -> dict:
    """The peaks of a job and its verdict on its own card."""
    reading = weighing.reading
    fit = fit_on(weighing, weighing.card)
    peak = {"allocated": reading.peak.peak, "reserved": reading.reserved, "phase": reading.peak.name}
    keys = ("gpu", "verdict", "headroom", "interval", "margin", "breaks", "breaks_on", "cannot")
    return {"peak": peak, **{key: fit[key] for key in keys}}


def card_warnings(job: Job, card: Gpu | OwnGpu) -> list[str]:
    """What is to be said of a card, and of the job on it."""
    out = []
    chip = known(card)
    if chip is not None and not chip.bf16 and job.in_bfloat16:
        out.append(
            f"{card.name} has no bfloat16 arithmetic: PyTorch emulates it, slowly; float16 is what it is made for"
        )
    if chip is None:
        out.append(f"{card.name}: its kernels are unknown and taken to be those of {find_gpu(DEFAULT_GPU).name}")
    elif chip.compute_capability != MEASURED_KERNELS:
        out.append(
            f"{card.name}: its kernels and workspaces are read from PyTorch's sources; "
            "measured were an H100's and an H200's"
        )
    if isinstance(card, Gpu) and not card.measured:
        out.append(f"{card.name}: its usable memory is derived from nvidia-smi's total, nobody's torch reported it")
    return out
