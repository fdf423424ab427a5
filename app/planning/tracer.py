"""The tracer that runs a job on the meta device, and the request that it is given."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

from ..catalog.gpus import Gpu
from ..errors import OurFault, Unanswered
from ..job import ADDED_FIELDS, Job, OwnGpu
from ..memory.template import packed
from .fingerprint import NotTraced, can_trace
from .resolve import Kernels, kernels_of


class TraceRequest(NamedTuple):
    """What a :class:`Tracer` needs to run a job.

    ``key`` is everything of the job that shapes its trace (:func:`key_of`), ``job`` the resolved job, ``config`` the
    model's config.json, ``kernels`` the kernels of the card, ``rank`` the rank that is run.
    """

    key: str
    job: Job
    config: dict
    kernels: Kernels
    rank: int = 0


class Tracer(Protocol):
    """Something that runs a job on the meta device.

    ``part`` is ``step`` (for the job's own batch and length), ``general`` (for all that run alike), ``finish``,
    ``load``, ``served`` or ``listed`` (what a server loads, with and without its forward pass).
    """

    one_shot: bool
    """Whether this process answers one question and ends."""

    def trace(self, part: str, request: TraceRequest) -> bytes:
        """What the run leaves: a :class:`Profile`, a :class:`TraceTemplate` or what a server loads, as bytes.
        Raises :class:`PlanError`; :class:`Unanswered` for a fault of ours."""

    def later(self, part: str, request: TraceRequest) -> None:
        """Trace it when there is nothing else to do, and store the result."""


process_is_ours = False
"""Whether this process does nothing but plan, as the command line's: a trace may set what holds for all of it."""


class InProcessTracer:
    """The tracer that runs jobs in this process."""

    one_shot = True

    def trace(self, part: str, request: TraceRequest) -> bytes:
        """As :meth:`Tracer.trace`. Raises :class:`NotTraced` where torch and its libraries are not installed."""
        if not can_trace():
            raise NotTraced
        from ..dryrun import sandbox, served_model
        from ..dryrun.steps import merge_and_save
        from ..dryrun.trace import trace

        if process_is_ours:
            sandbox.hold()
        _, job, config, kernels, rank = request
        try:
            with sandbox.active(), _without_collector():
                if part in ("served", "listed"):
                    return served_model.trace(part, job, config, *kernels)
                if part in ("step", "general"):
                    return trace(job, config, *kernels, general=part == "general", rank=rank).dump()
                return packed(merge_and_save.trace(part, job, config, *kernels).dump())
        except OurFault as fault:  # no answer: a search would take it for one
            traced = {"part": part, "job": job.model_dump(mode="json"), "config": config, "kernels": kernels}
            fault.report.setdefault("traced", traced)
            raise Unanswered(fault) from fault

    def later(self, part: str, request: TraceRequest) -> None:
        """Do nothing: this process ends after its answer."""


@contextmanager
def _without_collector() -> Iterator[None]:
    """Run without Python's cyclic collector, which would search millions of live objects again and again: that is two
    fifths of the time in which a model is built."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


tracer: ContextVar[Tracer] = ContextVar("tracer", default=InProcessTracer())  # noqa: B039 - it holds nothing


def request_of(job: Job, config: dict, card: Gpu | OwnGpu, rank: int = 0) -> TraceRequest:
    """A rank of a job (resolved) as a :class:`Tracer` takes it."""
    kernels = kernels_of(card)
    return TraceRequest(key_of(job, config, kernels, rank), job, config, kernels, rank)


def key_of(job: Job, config: dict, kernels: Kernels, rank: int = 0) -> str:
    """Everything that shapes a profile, as one string (JSON).

    It has the job, except for batch, length and the fields that only read a profile; the config; and the kernels,
    except for the number of multiprocessors. A plain loop is keyed by how many accumulated batches are traced; a
    trainer by how many there are, for it fetches all of them first.
    """
    shape = job.model_dump(
        exclude={"model", "config", "revision", "gpu", "reserve", "allocator", "batch_size", "sequence_length"}
    )
    for name in ADDED_FIELDS:
        if shape[name] == Job.model_fields[name].default:
            del shape[name]
    if not job.whose.fetches_all_batches:
        shape["gradient_accumulation_steps"] = job.batches_run
    capability, _, measured = kernels
    ranks = [rank] if rank else []
    return json.dumps([shape, config, capability, measured, *ranks], sort_keys=True, default=str)
