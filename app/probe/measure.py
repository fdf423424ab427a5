"""The use case: plan a job, look at the card, measure it there, and hold one against the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from app.catalog.gpus import Gpu, all_gpus, find_gpu
from app.errors import PlanError
from app.job import Job, OwnGpu, read_job
from app.memory.breakdown import Reading, read
from app.memory.event import Books
from app.memory.overheads import context
from app.plan import books_of, config_of, kernels_of, key_of, refuse_unplanned, settings_of
from app.probe import card
from app.probe.compare import Match, as_dict, compare
from app.probe.process import Child
from app.probe.recording import FAILED, OUT_OF_MEMORY, Recording

SPARE = 512 << 20
"""Bytes of the card that a probe leaves to others, whatever is free."""
SECONDS = 600
"""The default time limit of one measurement."""


@dataclass(frozen=True)
class Planned:
    """What a job's plan says: its books, read, and the bytes that the process takes beside the allocator."""

    job: Job
    config: dict
    task: str
    gpu: Gpu | OwnGpu
    books: Books
    reading: Reading

    @property
    def process(self) -> int:
        return self.reading.reserved + context(kernels_of(self.gpu)[0]).expected


@dataclass
class Probed:
    """A measurement beside its plan."""

    planned: Planned
    recording: Recording
    match: Match


def plan_for(data: Any, gpu: Gpu | OwnGpu | None = None, layers: int | None = None) -> Planned:
    """The plan of a job on the card that is there (None: the job's own), of ``layers`` layers (None: all).

    Raises :class:`PlanError`.
    """
    job = read_job(data).resolved()
    refuse_unplanned(job)
    if gpu is None:
        gpu = job.gpu if isinstance(job.gpu, OwnGpu) else find_gpu(job.gpu or "h100-80gb")
    config, _ = config_of(job)
    job = job.model_copy(update={"model": None, "config": config, "gpu": gpu.key if isinstance(gpu, Gpu) else gpu})
    from app.dryrun.model import read_config, task_of

    task = job.task or task_of(read_config(config, job.attention))
    books = books_of(key_of(job, config, gpu)) if layers is None else _books_of_layers(job, config, task, gpu, layers)
    return Planned(job, config, task, gpu, books, read(books, settings_of(job)))


def _books_of_layers(job: Job, config: dict, task: str, gpu, layers: int) -> Books:
    import torch

    from app.dryrun.cuda import Card
    from app.dryrun.model import build_base, read_config
    from app.dryrun.step import dry_run
    from app.probe.layers import with_layers

    base = build_base(read_config(config, job.attention), task, getattr(torch, job.dtype))
    return dry_run(with_layers(base, layers), job, task, Card(*kernels_of(gpu)))


def gpu_of(name: str, total: int) -> Gpu | OwnGpu:
    """The catalogue's card of NVML's ``name``: by its name, else the one whose name it begins with and whose memory is
    nearest; a card of one's own where there is none."""
    try:
        return find_gpu(name)
    except PlanError:
        words = set(name.lower().replace("-", " ").split())
        near = [g for g in all_gpus() if _letters(g.key) and _letters(g.key) & words]
        near = [g for g in near if abs(g.total_memory / total - 1) < 0.1]
        if near:
            return min(near, key=lambda g: abs(g.total_memory - total))
        return OwnGpu(name=name, memory_bytes=total)


def _letters(key: str) -> set[str]:
    return {word for word in key.split("-") if any(c.isdigit() for c in word) and not word.endswith("gb")}


def request_for(planned: Planned, cap: int, layers: int | None, snapshot: str | None = None) -> dict:
    """What a measuring process is asked to do."""
    allocator = planned.job.allocator
    settings = [f"expandable_segments:{allocator.expandable_segments}"]
    if allocator.max_split_size_mb is not None:
        settings.append(f"max_split_size_mb:{allocator.max_split_size_mb}")
    return {
        "job": planned.job.model_dump(mode="json", exclude={"gpu"}),
        "task": planned.task,
        "layers": layers,
        "cap": cap,
        "allocator": ",".join(settings),
        "snapshot": snapshot,
    }


def room_on(state: card.CardState, planned: Planned) -> int:
    """Bytes that the probe's allocator may take: what is free, less the context and what is left to others."""
    return state.free - context(kernels_of(planned.gpu)[0]).high - SPARE


def probe(
    data: Any,
    *,
    layers: int | None = None,
    yes: bool = False,
    ask: Callable[[str], bool] | None = None,
    seconds: float = SECONDS,
    snapshot: str | None = None,
    tell: Callable[[str, int], None] = lambda *_: None,
    child: Callable[[], Child] = Child,
    look: Callable[[], card.CardState] = card.look,
) -> Probed:
    """Measure a job on this machine's card beside its plan.

    A job that is predicted not to fit what is free is tried only if ``yes``, or if ``ask`` says so. Raises
    :class:`PlanError`: no card, too little memory, a process that died or took longer than ``seconds``.
    """
    state = look()
    planned = plan_for(data, gpu_of(state.name, state.total), layers)
    cap = room_on(state, planned)
    if cap <= 0:
        raise PlanError(_crowded(state), "free the card first; nvidia-smi lists who holds it")
    needed = max(planned.reading.reserved, planned.reading.phases[0].reserved)
    if needed > cap and not yes:
        question = (
            f"predicted are {_gib(needed)} for the allocator, and {_gib(cap)} are free for it on {state.name}"
            f"{_shared(state)}: it would run out of memory"
        )
        if ask is None or not ask(question):
            raise PlanError(question, "--yes tries it all the same; --layers N measures a shorter model")
    recording = child().run(request_for(planned, cap, layers, snapshot), seconds, tell)
    if recording.outcome == FAILED:
        raise PlanError(f"the job failed on the card: {recording.reason}", "the stack itself says so; change the job")
    return Probed(planned, recording, compare(planned.books, recording.books))


def _crowded(state: card.CardState) -> str:
    return f"{state.name} has {_gib(state.free)} free of {_gib(state.total)}{_shared(state)}: too little to measure"


def _shared(state: card.CardState) -> str:
    return f", the rest being held by {state.others} other processes" if state.others else ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


# --- the answer ---------------------------------------------------------------------------------------------


def answer_of(probed: Probed) -> dict:
    """The answer as every interface gives it. Bytes are ``int``, ``percent`` is the plan's error of what was measured."""
    planned, recording, match = probed.planned, probed.recording, probed.match
    reading = planned.reading
    figures = [
        _figure("placed", reading.placed, recording.placed),
        _figure("allocated", reading.peak.peak, recording.peak("peak_allocated")),
        _figure("reserved", reading.reserved, recording.peak("peak_reserved")),
        _figure("process", planned.process, recording.peak("process")),
    ]
    return {
        "outcome": recording.outcome,
        "reason": recording.reason,
        "broke_in": _broke_in(recording),
        "job": planned.job.model_dump(mode="json", exclude={"config"}),
        "layers": recording.layers,
        "card": recording.card,
        "stack": recording.stack,
        "figures": figures,
        "phases": _phases(reading, recording),
        "match": as_dict(match),
        "seconds": recording.seconds,
        "date": time.strftime("%Y-%m-%d"),
    }


def _figure(name: str, planned: int, measured: int | None) -> dict:
    out: dict[str, Any] = {"figure": name, "planned": planned, "measured": measured}
    if measured:
        out |= {"difference": planned - measured, "percent": round((planned / measured - 1) * 100, 4)}
    return out


def _phases(reading: Reading, recording: Recording) -> list[dict]:
    """Each phase of the first and of a steady step: the plan's peak and end, and the card's."""
    planned = [phase for phase in reading.phases if phase.step > 0]
    measured = [phase for phase in recording.steps if phase["step"] <= 2]
    out = []
    for phase, real in zip(planned, measured):
        if (phase.step, phase.name) != (real["step"], real["name"]):
            break
        out.append(
            {
                "step": phase.step,
                "name": phase.name,
                "peak": _figure("peak", phase.peak, real["peak_allocated"]),
                "end": _figure("end", phase.end, real["allocated_end"]),
            }
        )
    return out


def _broke_in(recording: Recording) -> dict | None:
    if recording.outcome != OUT_OF_MEMORY or not recording.phases:
        return None
    last = recording.phases[-1]
    return {"step": last["step"], "phase": last["name"]}


def row_of(probed: Probed, identity: str) -> dict:
    """One line for the accuracy table (tests/measured): the job, the stack, the card and its figures; nobody's paths."""
    recording = probed.recording
    steps: dict[int, dict] = {}
    for phase in recording.steps:
        step = steps.setdefault(phase["step"], {})
        name = phase["name"]
        if name == "forward":
            step.setdefault("start_alloc", phase["allocated_start"])
        end, peak = _ROW[name]
        step |= {key: phase[field] for key, field in ((end, "allocated_end"), (peak, "peak_allocated")) if key}
    plain = recording.job["trainer"] == "pytorch" and recording.job["method"] != "inference"
    config = {key: value for key, value in recording.job["config"].items() if key not in ("_name_or_path",)}
    return {
        "id": identity,
        "job": {**recording.job, "model": None, "config": config, "gpu": _key(probed.planned.gpu)},
        "layers": recording.layers,
        "stack": recording.stack,
        "gpu": {key: recording.card[key] for key in ("name", "total_memory", "driver", "cuda", "cudnn")},
        "measured": {
            "placed_allocated": recording.placed,
            "peak_allocated": recording.peak("peak_allocated"),
            "peak_reserved": recording.peak("peak_reserved"),
            "peak_process": recording.peak("process"),
            "optimizer_state": recording.optimizer_state,
            "trainable_parameters": recording.trainable_parameters,
            "steps": list(steps.values()) if plain else [],
        },
        "matched": round(probed.match.share, 6),
        "date": time.strftime("%Y-%m-%d"),
    }


_ROW = {
    "forward": ("after_forward", "peak_forward"),
    "backward": ("after_backward", "peak_backward"),
    "optimizer": (None, "peak_optim"),
    "end": ("end_alloc", None),
    "generate": (None, None),
}


def _key(gpu: Gpu | OwnGpu):
    return gpu.key if isinstance(gpu, Gpu) else asdict(gpu)
