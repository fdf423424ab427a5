"""The use case: plan a job, look at the card, measure it there, and hold one against the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..catalog.gpus import Gpu, find_gpu
from ..errors import PlanError
from ..job import Job, OwnGpu, read_job
from ..memory.events import TraceLog
from ..memory.kernel_facts import KernelFacts
from ..memory.repeat import Expansion
from ..memory.summary import summarize
from ..memory.template import TraceTemplate
from ..planning.calibration import Facts, is_known, name_of, store
from ..planning.cards import like, outside_of
from ..planning.profile_cache import profile_of
from ..planning.resolve import allocator_config_of, config_of, kernels_of, refuse_unplanned, shape_point_of
from . import card
from .matching import compare
from .process import Child
from .recording import FAILED, OK, Recording
from .report import Planned, Probed, answer_of

SPARE = 512 << 20
"""Bytes of the card that a probe leaves to others, whatever is free."""


def plan_for(data: Any, gpu: Gpu | OwnGpu, layers: int | None = None) -> Planned:
    """The plan of a job on the card that is there, of ``layers`` layers of each stack (None: all).

    Raises :class:`PlanError`.
    """
    job = read_job(data)
    refuse_unplanned(job)
    if job.strategy != "single":
        raise PlanError("a probe runs one process on one card", "set strategy to single, gpu_count to 1", "strategy")
    config, source = config_of(job)
    job = job.resolved(config)
    model = source["id"] if source["kind"] == "catalogue" else None
    named = {"model": None, "config": config, "gpu": gpu.key if isinstance(gpu, Gpu) else gpu}
    job = job.model_copy(update={**named, "gradient_accumulation_steps": job.batches_run})
    from ..dryrun import sandbox
    from ..dryrun.build import prequantized as stored
    from ..dryrun.build.model import base_of
    from ..dryrun.build.model_config import read_config, task_of

    with sandbox.active():
        task = job.task or task_of(read_config(config, job.attention))
        settings = stored.quantization_config_of(config)
        if settings is not None:
            job, _ = stored.as_loaded(job, settings, base_of(config, task, job.dtype, job.attention)[0])
    if layers is None:
        template = profile_of(job, config, gpu).template
    else:
        template = TraceTemplate.of(_log_of_layers(job, config, task, gpu, layers).columns(), [])
    concrete = template.at(shape_point_of(job, gpu))
    outside = outside_of(gpu, job).expected
    return Planned(
        job, model, config, task, gpu, concrete.trace_log(), summarize(concrete, allocator_config_of(job)), outside
    )


def depth_of_plan(planned: Planned) -> int:
    """How many layers the planned model has."""
    from ..dryrun import sandbox
    from ..dryrun.build.model import base_of
    from .extrapolate import depth_of

    job = planned.job
    with sandbox.active():
        return depth_of(base_of(planned.config, planned.task, job.dtype, job.attention)[0])


def _log_of_layers(job: Job, config: dict, task: str, gpu, layers: int) -> TraceLog:
    from ..dryrun import sandbox
    from ..dryrun.build.model import base_of
    from ..dryrun.cuda.card_facts import Card
    from ..dryrun.diagnose import explain_stack_errors
    from ..dryrun.images import images_of
    from ..dryrun.steps.dry_run import dry_run
    from ..dryrun.token_loops import repeat_tokens
    from ..dryrun.trace import with_values
    from .extrapolate import with_layers

    def trace_log(values) -> TraceLog | Expansion:
        with explain_stack_errors(base, job, values is not None):
            return repeat_tokens(dry_run(with_layers(base, layers), job, task, Card(*kernels_of(gpu)), values=values))

    with sandbox.active():
        base, _ = base_of(config, task, job.dtype, job.attention)
        images, _ = images_of(base, job, task)
        found, _ = with_values(trace_log, job, images)
    return found.trace_log() if isinstance(found, Expansion) else found


def gpu_of(name: str, total: int, capability: tuple[int, int]) -> Gpu | OwnGpu:
    """The catalogue's card of NVML's ``name``; else a card of one's own, with the kernels of one of its capability."""
    try:
        return find_gpu(name)
    except PlanError:
        return OwnGpu(name=name, memory_bytes=total, like=like(name, capability))


def request_for(planned: Planned, cap: int, layers: int | None, snapshot: str | None, calibrate: bool) -> dict:
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
        "calibrate": calibrate,
    }


def room_on(state: card.CardState, planned: Planned) -> int:
    """Bytes that the probe's allocator may take: what is free, less the context and what is left to others."""
    return state.free - outside_of(planned.gpu, planned.job).high - SPARE


@dataclass
class Bench:
    """Where jobs are measured, one after the other: the card, and how a measuring process is started.

    ``yes`` tries what is predicted not to fit, ``ask`` is asked about it; ``seconds`` is the time limit of one job.
    ``ahead`` processes import while another measures.
    """

    yes: bool = False
    ask: Callable[[str], bool] | None = None
    seconds: float = 600.0
    tell: Callable[[str, int], None] = lambda *_: None
    start: Callable[[], Child] = Child
    look: Callable[[], card.CardState] = card.look
    ahead: int = 0
    _waiting: list[Child] = field(default_factory=list)

    def probe(self, data: Any, layers: int | None = None, snapshot: str | None = None) -> Probed:
        """Measure a job on this machine's card beside its plan.

        Raises :class:`PlanError`: no card, too little memory, a process that died or took too long.
        """
        state = self.look()
        if state.exclusive and state.others:
            raise PlanError(
                f"{state.name} is in use, and set to serve one process alone",
                "wait for the other, or nvidia-smi --compute-mode=DEFAULT",
            )
        child = self._child()
        try:
            return self._measure(child, state, data, layers, snapshot)
        finally:
            child.end()

    def _measure(self, child: Child, state: card.CardState, data: Any, layers: int | None, snapshot: str | None):
        planned = plan_for(data, gpu_of(state.name, state.total, state.capability), layers)
        cap = room_on(state, planned)
        if cap <= 0:
            raise PlanError(
                f"{state.name} has {_gib(state.free)} of {_gib(state.total)} free{_shared(state)}: too little to probe",
                "free the card first; nvidia-smi lists who holds it",
            )
        self._agree(planned, cap, state)
        import torch

        unknown = not is_known(name_of(planned.gpu), state.driver, torch.__version__)
        request = request_for(planned, cap, layers, snapshot, unknown)
        recording = child.run(request, self.seconds, self.tell)
        if recording.outcome == FAILED:
            raise PlanError(f"the job failed on the card: {recording.reason}", "the stack itself says so")
        if recording.outcome == OK:
            calibrate(planned.gpu, recording)
        return Probed(planned, recording, compare(planned.trace_log, recording.trace_log))

    def _agree(self, planned: Planned, cap: int, state: card.CardState) -> None:
        needed = max(planned.summary.reserved, planned.summary.phases[0].reserved)
        if needed <= cap or self.yes:
            return
        question = (
            f"predicted are {_gib(needed)} for the allocator, and {_gib(cap)} are free for it on {state.name}"
            f"{_shared(state)}: it would run out of memory"
        )
        if self.ask is None or not self.ask(question):
            raise PlanError(question, "--yes tries it all the same; --layers N measures a shorter model")

    def _child(self) -> Child:
        child = self._waiting.pop(0) if self._waiting else self.start()
        while len(self._waiting) < self.ahead:
            self._waiting.append(self.start())
        return child

    def close(self) -> None:
        """End the processes that wait."""
        while self._waiting:
            self._waiting.pop().end()


def _shared(state: card.CardState) -> str:
    if not state.others:
        return ""
    return " beside another process" if state.others == 1 else f" beside {state.others} other processes"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def calibrate(gpu: Gpu | OwnGpu, recording: Recording) -> None:
    """Keep what the card's process held outside the allocator, and how its kernels are."""
    card, found = recording.card, recording.card.get("kernels")
    if card["context"] is None:
        return
    from ..dryrun.cuda.card_facts import Card
    from .kernel_checks import facts_of

    held, kernels = card["context"], (KernelFacts(), [])
    if found is not None:
        kernels = facts_of(found, Card(*kernels_of(gpu)[:2]))
    date = time.strftime("%Y-%m-%d")
    facts = Facts(name_of(gpu), card["driver"], recording.stack["torch"], date, held, held, held, *kernels)
    store(facts, calibrated=found is not None)


def measured(bench: Bench, data: Any, layers: int | None = None, snapshot: str | None = None) -> tuple[dict, Probed]:
    """The answer to a job, and what it was made from; of a model shortened to ``layers``, with what follows for all
    of its layers. Raises :class:`PlanError`."""
    if layers is None:
        probed = bench.probe(data, snapshot=snapshot)
        return answer_of(probed), probed
    from .extrapolate import depths_for, extrapolate

    depths = depths_for(layers)
    short, probed = (bench.probe(data, depth, snapshot) for depth in depths)
    whole = plan_for(data, probed.planned.gpu)
    answer = answer_of(probed)
    if answer["outcome"] == OK == short.recording.outcome:
        planned = short.planned.summary.peak.peak, probed.planned.summary.peak.peak
        found = short.recording.peak("peak_allocated"), probed.recording.peak("peak_allocated")
        count = depth_of_plan(whole)
        beside = probed.recording.peak("peak_reserved") - probed.planned.summary.reserved
        answer["extrapolated"] = {
            "layers": count,
            "measured_layers": list(depths),
            "allocated": extrapolate(depths, planned, found, count, whole.summary.peak.peak),
            "reserved": whole.summary.reserved + beside,
            "growth_planned": planned[1] - planned[0],
            "growth_measured": found[1] - found[0],
        }
    return answer, probed


def from_recording(recording: Recording) -> tuple[dict, Probed]:
    """The answer to a measurement that was recorded elsewhere, beside the plan that is made here."""
    card = recording.card
    gpu = gpu_of(card["name"], card["total_memory"], tuple(card["capability"]))
    planned = plan_for(recording.job, gpu, recording.layers)
    probed = Probed(planned, recording, compare(planned.trace_log, recording.trace_log))
    return answer_of(probed), probed
