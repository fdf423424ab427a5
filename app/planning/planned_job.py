"""A job with its profile, and the verdicts on cards: every question about fitting is answered from these."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple
from weakref import ref

from ..catalog.gpus import Gpu, find_gpu
from ..errors import PlanError, Unanswered
from ..job import Job, OwnGpu
from ..memory.allocator.config import AllocatorConfig
from ..memory.budget import MemoryBudget
from ..memory.events import KINDS
from ..memory.fit import Verdict, fits_under_limit, verdict_for
from ..memory.profile import Profile
from ..memory.sizes import ShapePoint
from ..memory.summary import MemorySummary, Phase
from ..memory.template import ConcreteTrace
from . import fault_reports
from .cards import MEASURED_KERNELS, budget_on, id_of, known, usable, with_card_memory
from .profile_cache import concrete_at, fits_under, merge_and_save_of, profile_of, summary_of
from .resolve import (
    DEFAULT_GPU,
    allocator_config_of,
    card_of,
    chip_of,
    config_of,
    refuse_unplanned,
    shape_point_of,
    with_checkpoint_weights,
    with_processor,
)

FITTING = ("fits", "tight")


class RankClass(NamedTuple):
    """Ranks that allocate alike: which they are in words, and the first and the last of them."""

    name: str
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class PlannedJob:
    """A job (resolved) with its card, and the profile that holds for it: on many cards, for the ranks of a class.

    ``ranks`` are those of its class, and ``classes`` all the classes of the job, this one among them, by rank; both are
    empty on one card.
    """

    job: Job
    card: Gpu | OwnGpu
    config: dict
    source: dict
    profile: Profile
    ranks: RankClass | None = None
    classes: tuple[PlannedJob, ...] = ()

    @property
    def settings(self) -> AllocatorConfig:
        """The allocator's settings that the job names."""
        return allocator_config_of(self.job)

    @property
    def facts(self) -> dict:
        """What the trace tells of the model: class, parameters, attention, …"""
        return self.profile.facts

    @cached_property
    def point(self) -> ShapePoint:
        """Batch, length and multiprocessors at which the profile is asked."""
        return shape_point_of(self.job, self.card)

    @property
    def concrete(self) -> ConcreteTrace:
        """The trace at the job's point."""
        return concrete_at(self.profile.template, self.point)

    @property
    def summary(self) -> MemorySummary:
        """The summary of the job without a memory limit."""
        return _summary(ref(self.profile), self.point, self.settings)

    @cached_property
    def after_bytes(self) -> dict[str, int]:
        """Bytes that merging and writing take (:class:`After`), as far as there is either and it can be planned."""
        try:
            found = after(self)
        except PlanError:
            return {}
        except Unanswered as given_up:
            fault_reports.go_on_without(given_up)
            return {}
        return {name: need for name, need in asdict(found).items() if need is not None} if found else {}


@lru_cache(maxsize=64)
def _summary(profile: ref[Profile], point: ShapePoint, settings: AllocatorConfig) -> MemorySummary:
    """By weak reference, so that this cache keeps no profile alive that the profile cache has dropped."""
    return summary_of(concrete_at(_alive(profile).template, point), settings)


def _alive(profile: ref[Profile]) -> Profile:
    found = profile()
    assert found is not None  # whoever asks holds it
    return found


def plan_job(job: Job) -> PlannedJob:
    """The plan of a job: its card, its config and a profile that holds for it. Raises :class:`PlanError`."""
    refuse_unplanned(job)
    card = card_of(job)
    config, source = config_of(job)
    job = with_card_memory(with_processor(job, config, source).resolved(config), card)
    try:
        planned = PlannedJob(job, card, config, source, profile_of(job, config, card))
        return planned if job.strategy == "single" else _worst_rank(planned)
    except PlanError as error:
        raise with_checkpoint_weights(error, job, source) from None


def _worst_rank(planned: PlannedJob) -> PlannedJob:
    """The plan of the class of ranks that needs most, from the plan of rank 0."""
    job, config, card = planned.job, planned.config, planned.card
    whole = [("every rank", 0, job.gpu_count - 1)]
    classes = [RankClass(*row) for row in planned.facts.get("rank_classes", whole)]
    profiles = [planned.profile, *(profile_of(job, config, card, row.first) for row in classes[1:])]
    plans = tuple(replace(planned, profile=own, ranks=row) for own, row in zip(profiles, classes, strict=True))
    worst = max(plans, key=lambda plan: (plan.summary.reserved, plan.summary.peak.peak))
    return replace(worst, classes=plans)


def step_fits_under(planned: PlannedJob, limit: int) -> bool:
    """Whether the step passes the replayed allocator under ``limit`` bytes, with the model already loaded."""
    return fits_under_limit(planned.concrete, replace(planned.settings, limit=limit), placed=True)[0]


def written(planned: PlannedJob) -> int:
    """Bytes that a steady step allocates. It writes each of them, so they are a lower bound of its memory traffic.

    Where batches are accumulated, the trace has the passes of :attr:`~vramplan.job.Job.batches_run` of them; a
    trainer's trace has the inputs of all.
    """
    concrete, marks = planned.concrete, planned.concrete.template.marks
    last = max(mark.step for mark in marks)
    ends = [mark.at for mark in marks[1:]] + [concrete.template.events.size]
    total = passes = 0
    for mark, end in zip(marks, ends, strict=False):
        if mark.step == last:
            events = concrete.template.events[mark.at : end]
            taken = events[events >= 0]
            total += int(concrete.sizes[taken].sum())
            if mark.name in ("forward", "backward"):
                made = taken[concrete.template.kind[taken] != KINDS.index("inputs")]
                passes += int(concrete.sizes[made].sum())
    job = planned.job
    return total - passes + passes * job.gradient_accumulation_steps // job.batches_run


def kind_of(job: Job) -> str:
    """The kind of job by which measured errors are grouped: a key of :data:`vramplan.memory.fit.MEASURED`."""
    return job.quantizer.measured_as or job.method if job.quantizer is not None else job.method


def verdict_on(planned: PlannedJob, card: Gpu | OwnGpu) -> Verdict:
    """The verdict on a card, from the trace for the job's own card."""
    budget = budget_on(card, planned.job.reserve, planned.summary.parts.get("kernel_workspace", 0), planned.job)
    return _verdict(ref(planned.profile), planned.point, planned.settings, budget, kind_of(planned.job))


@lru_cache(maxsize=4096)
def _verdict(
    profile: ref[Profile], point: ShapePoint, settings: AllocatorConfig, space: MemoryBudget, kind: str
) -> Verdict:
    return verdict_for(
        concrete_at(_alive(profile).template, point),
        _summary(profile, point, settings),
        space,
        kind,
        settings,
        fits_under,
    )


@dataclass(frozen=True)
class After:
    """The peaks of what follows a training, in allocated bytes.

    ``merge`` is merging the adapter in 16 bit, in a process of its own (None: nothing to merge); ``save`` is writing
    what was trained, including what the training still holds.
    """

    merge: int | None
    save: int


def after(planned: PlannedJob) -> After | None:
    """The peaks of merging and writing; None: the job trains nothing. Raises :class:`PlanError`."""
    job = planned.job
    if job.method == "inference":
        return None
    method = "full" if job.method == "full" else "lora"
    concrete = merge_and_save_of(job.model_copy(update={**_BARE, "method": method}), planned.config, planned.card)
    phases = {phase.name: phase for phase in _finish(concrete, planned.settings)}
    save, end = phases["save"], planned.summary.phases[-1].end
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
def _finish(concrete: ConcreteTrace, settings: AllocatorConfig) -> list[Phase]:
    return summary_of(concrete, settings).phases


def cannot(planned: PlannedJob, verdict: Verdict) -> list[str]:
    """Those of ``merge`` and ``save`` that do not fit a card with this verdict, as far as they can be planned; none of
    a job that does not even load."""
    if verdict.breaks == "load":
        return []
    return [name for name, need in planned.after_bytes.items() if need > verdict.limit]


def fit_on(planned: PlannedJob, card: Gpu | OwnGpu) -> dict:
    """The verdict on a card as the answer's JSON object."""
    verdict = verdict_on(planned, card)
    return {
        "gpu": id_of(card),
        "name": card.name,
        "memory_bytes": usable(card),
        **vars(verdict),
        "interval": list(verdict.interval),
        "cannot": cannot(planned, verdict),
        "same_kernels": chip_of(card)[0] == chip_of(planned.card)[0],
    }


def summary(planned: PlannedJob, card: Gpu | OwnGpu | None = None) -> dict:
    """The peaks of a job and its verdict on a card, its own if none is given."""
    summary = planned.summary
    fit = fit_on(planned, card or planned.card)
    peak = {"allocated": summary.peak.peak, "reserved": summary.reserved, "phase": summary.peak.name}
    keys = ("gpu", "verdict", "headroom", "interval", "margin", "breaks", "breaks_on", "cannot")
    return {"peak": peak, **{key: fit[key] for key in keys}}


def card_warnings(job: Job, card: Gpu | OwnGpu) -> list[str]:
    """The warnings about a card, and about the job on it."""
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
