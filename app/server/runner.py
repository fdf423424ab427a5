"""The runner of a server's requests: each gets a thread or a place in a bounded queue, its progress can be asked for,
and work for a client that has left is stopped."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from starlette.requests import Request

from ..catalog.models import find_model
from ..errors import OurFault, PlanError, Unanswered
from ..job import Job
from ..planning.tracer import TraceRequest, tracer
from ..usecases import other_trainers, plan
from .trace_pool import QUEUE_LIMIT, Abandoned, Busy, Ended, RequestHandle, TracePool

log = logging.getLogger("vramplan")
THREADS = 8
"""Requests that are served at a time: more than there are cores, for most of them wait for a trace."""
HANDLES = 1024
"""Requests whose progress can be asked for at a time."""


@dataclass(frozen=True)
class PooledTracer:
    """The :class:`~vramplan.planning.tracer.Tracer` of one request: it traces in the server's pool."""

    pool: TracePool
    handle: RequestHandle
    one_shot = False

    def trace(self, part: str, request: TraceRequest) -> bytes:
        """As :meth:`vramplan.planning.tracer.Tracer.trace`, in the pool."""
        try:
            return self.pool.trace(part, request, self.handle)
        except (Abandoned, Busy, Ended, OurFault) as error:
            raise Unanswered(error) from None

    def later(self, part: str, request: TraceRequest) -> None:
        """As :meth:`vramplan.planning.tracer.Tracer.later`, in the pool."""
        self.pool.later(part, request)


class RequestRunner:
    """The runner of use cases on threads. ``local_files``: a job's model may be a path on this machine.

    ``aside`` limits how many requests for what nobody has asked for explicitly (the page's own advice) run at a time:
    fewer than there are trace processes, so that an explicit request finds one free.
    """

    def __init__(self, local_files: bool, pool: TracePool | None = None):
        self.local_files, self.pool = local_files, pool or TracePool()
        self.threads = anyio.CapacityLimiter(THREADS)
        self.aside = anyio.CapacityLimiter(max(1, self.pool.slots - 1))
        self._handles: dict[str, RequestHandle] = {}

    @property
    def waiting(self) -> int:
        """Requests and traces in the queue."""
        return self.threads.statistics().tasks_waiting + self.pool.waiting

    def reject_if_full(self) -> None:
        """Raise :class:`Busy` where the queue is full."""
        if self.threads.statistics().tasks_waiting >= QUEUE_LIMIT:
            raise Busy

    def progress(self, name: str) -> dict[str, Any]:
        """What is being done for the request of this id; an unknown request counts as done."""
        handle = self._handles.get(name)
        if handle is None:
            return {"state": "done", "line": 0, "doing": "", "seconds": 0.0}
        in_flight, seconds = handle.in_flight, round(time.monotonic() - handle.since, 2)
        if in_flight is not None and in_flight.started is not None:
            return {"state": "running", "line": 0, "doing": in_flight.doing or "starting", "seconds": seconds}
        return {"state": "waiting", "line": self.waiting, "doing": "", "seconds": seconds}

    async def plan(
        self, job: Any, request: Request | None = None, *, all_layers: bool = False, trainers: bool = False
    ) -> dict:
        """The answer to ``job``; with ``trainers`` what it takes with the others. Raises :class:`PlanError`."""
        answer = await self.run(partial(plan, all_layers=all_layers), job, request)
        if trainers:
            answer["other_trainers"] = await self.run(other_trainers, job, request)
        return answer

    async def run(self, use_case: Callable[[Any], Any], job: Any, request: Request | None = None) -> Any:
        """The result of ``use_case`` for ``job``, computed on a thread. Its traces are ended when the client leaves."""
        self.refuse_local(job)
        async with self._handle(request) as handle:

            def served() -> Any:
                if handle.left:
                    raise Abandoned
                tracer.set(PooledTracer(self.pool, handle))
                try:
                    return use_case(job)
                except Unanswered as given_up:
                    raise given_up.error from None
                except OurFault as fault:
                    log.error("%s (report %s)", fault.message, fault.name)
                    raise

            return await anyio.to_thread.run_sync(served, limiter=self.threads)

    @asynccontextmanager
    async def _handle(self, request: Request | None) -> AsyncIterator[RequestHandle]:
        handle = RequestHandle()
        name = request.headers.get("x-request-id", "")[:64] if request is not None else ""
        if name and len(self._handles) < HANDLES:
            self._handles[name] = handle
        try:
            if request is None:
                yield handle
                return
            problem: PlanError | None = None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_watch, request, handle)
                try:
                    yield handle
                except PlanError as error:  # raised below, for here it would be part of an exception group
                    problem = error
                tasks.cancel_scope.cancel()
            if problem is not None:
                raise problem
        finally:
            if self._handles.get(name) is handle:
                del self._handles[name]

    def refuse_local(self, job: Any) -> None:
        """Raise :class:`PlanError` for a job whose model would be read from this server's disk."""
        name = job.model if isinstance(job, Job) else job.get("model") if isinstance(job, dict) else None
        if self.local_files or not isinstance(name, str) or find_model(name) is not None:
            return
        if name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or os.path.exists(name):
            raise PlanError("this server reads no files of its own", "send the config.json as `config`", "model")


async def _watch(request: Request, handle: RequestHandle) -> None:
    """Note when the client leaves: the body was read, so the next message is the end of the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    handle.left = True


def runner_of(request: Request) -> RequestRunner:
    """The runner of the application that a request came to."""
    return request.app.state.runner
