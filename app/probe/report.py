"""A measurement beside its plan, as every interface gives it, and as a row of the accuracy table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ..catalog.gpus import Gpu
from ..job import Job, OwnGpu
from ..memory.events import TraceLog
from ..memory.summary import MemorySummary
from ..planning.cards import id_of
from .matching import Match, as_dict
from .recording import OUT_OF_MEMORY, Recording


@dataclass(frozen=True)
class Planned:
    """A job's plan: its trace log, its summary, and the bytes that the process takes beside the allocator.

    ``model`` is the catalogue's name of what is planned; None: the job's own config. ``outside`` is what was known of
    the bytes that the process holds outside the allocator before anything was measured.
    """

    job: Job
    model: str | None
    config: dict
    task: str
    gpu: Gpu | OwnGpu
    trace_log: TraceLog
    summary: MemorySummary
    outside: int

    @property
    def process(self) -> int:
        """Bytes that the process takes, as nvidia-smi shows it."""
        return self.summary.reserved + self.outside


@dataclass
class Probed:
    """A measurement beside its plan."""

    planned: Planned
    recording: Recording
    match: Match


def answer_of(probed: Probed) -> dict:
    """The answer as every interface gives it. Bytes are ``int``; ``percent`` is the plan's error."""
    planned, recording, match = probed.planned, probed.recording, probed.match
    summary = planned.summary
    figures = [
        _figure("placed", summary.placed, recording.placed),
        _figure("allocated", summary.peak.peak, recording.peak("peak_allocated")),
        _figure("reserved", summary.reserved, recording.peak("peak_reserved")),
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
        "phases": _phases(planned, recording),
        "match": as_dict(match),
        "seconds": recording.seconds,
        "date": time.strftime("%Y-%m-%d"),
    }


def _figure(name: str, planned: int, measured: int | None) -> dict:
    out: dict[str, Any] = {"figure": name, "planned": planned, "measured": measured}
    if measured:
        out |= {"difference": planned - measured, "percent": round((planned / measured - 1) * 100, 4)}
    return out


def _phases(planned: Planned, recording: Recording) -> list[dict]:
    """The load, and each phase of the first and of a steady step: what the plan and the card allocate at the peak and
    at the end, reserve, and hold as a process. Steady is the step with the highest peak; what it reserves is what the
    last one did."""
    load = [phase for phase in recording.phases if phase["step"] == 0]
    steps: dict[int, list[dict]] = {}
    for phase in recording.steps:
        steps.setdefault(phase["step"], []).append(phase)
    first, *later = steps.values() or [[]]
    measured = [(phase, phase) for phase in first]
    if later:
        measured += zip(
            max(later, key=lambda step: max(phase["peak_allocated"] for phase in step)), later[-1], strict=False
        )
    if load:  # whose process is read after the cache was emptied, not at the peak
        highest = {name: max(phase[name] for phase in load) for name in ("peak_allocated", "peak_reserved")}
        measured.insert(0, ({**load[-1], **highest}, {**load[-1], **highest, "process": None}))
    out = []
    for phase, (real, last) in zip(planned.summary.phases[0 if load else 1 :], measured, strict=False):
        if (min(phase.step, 2), phase.name) != (min(real["step"], 2), real["name"]) or last["name"] != phase.name:
            break
        out.append(
            {
                "step": phase.step,
                "name": phase.name,
                "peak": _figure("peak", phase.peak, real["peak_allocated"]),
                "end": _figure("end", phase.end, real["allocated_end"]),
                "reserved": _figure("reserved", phase.reserved, last["peak_reserved"]),
                "process": _figure("process", phase.reserved + planned.outside, last["process"]),
            }
        )
    return out


def _broke_in(recording: Recording) -> dict | None:
    if recording.outcome != OUT_OF_MEMORY or not recording.phases:
        return None
    last = recording.phases[-1]
    return {"step": last["step"], "phase": last["name"]}


def row_of(probed: Probed, identity: str) -> dict:
    """One line for the accuracy table (tests/measured): job, stack, card and figures; nobody's paths."""
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
    model = probed.planned.model
    config = {key: value for key, value in recording.job["config"].items() if key != "_name_or_path"}
    return {
        "id": identity,
        "job": {
            **recording.job,
            "model": model,
            "config": None if model else config,
            "gpu": id_of(probed.planned.gpu),
        },
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
