"""A job planned and held against cards: what every question about fitting is answered from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from app.cards import MEASURED_KERNELS, id_of, known, room, usable
from app.catalog.gpus import Gpu, find_gpu
from app.errors import PlanError
from app.job import Job, OwnGpu
from app.memory.allocator import Settings
from app.memory.breakdown import Phase, Reading, read
from app.memory.event import Books
from app.memory.fit import Room, Verdict, judge, passes
from app.plan import (
    DEFAULT_GPU,
    books_of,
    card_of,
    config_of,
    finish_of,
    kernels_of,
    key_of,
    refuse_unplanned,
    settings_of,
    trace_of,
    with_weights,
)

FITTING = ("fits", "tight")


@dataclass(frozen=True)
class Weighing:
    """A job (resolved) with its card, its books and their reading without a limit."""

    job: Job
    card: Gpu | OwnGpu
    config: dict
    source: dict
    key: str
    settings: Settings
    tables: bool

    @property
    def books(self) -> Books:
        return _books(self.key, self.tables)

    @property
    def facts(self) -> dict:
        """The model's facts, where it was planned with its tables."""
        return trace_of(self.key).facts

    @property
    def reading(self) -> Reading:
        return _reading(self.key, self.settings, self.tables)


def _books(key: str, tables: bool) -> Books:
    return trace_of(key).books if tables else books_of(key)


@lru_cache(maxsize=256)
def _reading(key: str, settings: Settings, tables: bool) -> Reading:
    return read(_books(key, tables), settings)


def weigh(job: Job, tables: bool = False) -> Weighing:
    """``job`` planned; ``tables``: with the tables of its layers. Raises :class:`PlanError`."""
    job = job.resolved()
    refuse_unplanned(job)
    card = card_of(job)
    config, source = config_of(job)
    weighing = Weighing(job, card, config, source, key_of(job, config, card), settings_of(job), tables)
    try:
        weighing.books
    except PlanError as error:
        raise (with_weights(error, job, source) if tables else error) from None
    return weighing


def passes_under(weighing: Weighing, limit: int) -> bool:
    """Whether the step passes the replayed allocator under ``limit`` bytes, the model being there already."""
    return passes(weighing.books, replace(weighing.settings, limit=limit), placed=True)[0]


@lru_cache(maxsize=256)
def _written(key: str, tables: bool) -> dict[str, int]:
    books = _books(key, tables)
    last = max(mark.step for mark in books.marks)
    ends = [mark.at for mark in books.marks[1:]] + [len(books.events)]
    out: dict[str, int] = {}
    for mark, end in zip(books.marks, ends):
        if mark.step == last:
            sizes = (books.allocations[event].size for event in books.events[mark.at : end] if event >= 0)
            out[mark.name] = out.get(mark.name, 0) + sum(sizes)
    return out


def written(weighing: Weighing) -> int:
    """Bytes of all that a steady step takes: what it writes anew, a lower bound of the memory traffic that it causes.

    Of accumulated batches the books hold two at most, for a third is like the second.
    """
    by_phase = _written(weighing.key, weighing.tables)
    batches = weighing.job.gradient_accumulation_steps
    passes = sum(size for name, size in by_phase.items() if name in ("forward", "backward"))
    return sum(by_phase.values()) - passes + passes * batches // min(batches, 2)


def kind_of(job: Job) -> str:
    """The kind of job that its measured error goes by: a key of :data:`app.memory.fit.MEASURED`."""
    return "int8" if job.quantization is not None and job.quantization.type == "int8" else job.method


def verdict_on(weighing: Weighing, card: Gpu | OwnGpu) -> Verdict:
    """The verdict on a card, by the books of the job's own card."""
    space = room(card, weighing.job.reserve, weighing.reading.parts.get("kernel_workspace", 0))
    return _verdict(weighing.key, weighing.settings, weighing.tables, space, kind_of(weighing.job))


@lru_cache(maxsize=8192)
def _verdict(key: str, settings: Settings, tables: bool, space: Room, kind: str) -> Verdict:
    return judge(_books(key, tables), _reading(key, settings, tables), space, kind, settings)


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
    found = _finish(_bare(weighing), weighing.settings)
    if isinstance(found, PlanError):
        raise found
    phases = {phase.name: phase for phase in found}
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


def _bare(weighing: Weighing) -> str:
    method = "full" if weighing.job.method == "full" else "lora"
    job = weighing.job.model_copy(update={**_BARE, "method": method})
    return key_of(job, weighing.config, weighing.card)


@lru_cache(maxsize=256)
def _finish(key: str, settings: Settings) -> list[Phase] | PlanError:
    """The phases of merging and writing, or why they cannot be planned."""
    try:
        return read(finish_of(key), settings).phases
    except PlanError as error:
        return error


def cannot(weighing: Weighing, verdict: Verdict) -> list[str]:
    """What of merging and writing a card with ``verdict`` has no room for, as far as they can be planned."""
    try:
        following = after(weighing)
    except PlanError:
        return []
    needs = asdict(following) if following else {}
    return [name for name, need in needs.items() if need is not None and need > verdict.limit]


def fit_on(weighing: Weighing, card: Gpu | OwnGpu) -> dict:
    """The verdict on a card as the answer has it."""
    verdict = verdict_on(weighing, card)
    return {
        "gpu": id_of(card),
        "name": card.name,
        "memory_bytes": usable(card),
        **asdict(verdict),
        "interval": list(verdict.interval),
        "cannot": cannot(weighing, verdict),
        "same_kernels": kernels_of(card)[0] == kernels_of(weighing.card)[0],
    }


def summary(weighing: Weighing) -> dict:
    """The peaks of a job and its verdict on its own card."""
    reading = weighing.reading
    fit = fit_on(weighing, weighing.card)
    peak = {"allocated": reading.peak.peak, "reserved": reading.reserved, "phase": reading.peak.name}
    keys = ("gpu", "verdict", "headroom", "interval", "margin", "breaks", "breaks_on", "cannot")
    return {"peak": peak, **{key: fit[key] for key in keys}}


def card_warnings(card: Gpu | OwnGpu) -> list[str]:
    out = []
    chip = known(card)
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
