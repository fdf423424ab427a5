"""Where a server's visitors are received: each gets a thread, a line that has an end, word of what is being done for
it, and nothing is done any more for one who has left."""

from __future__ import annotations

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

from app.batch import plan
from app.catalog.models import find_model
from app.errors import PlanError, Unanswered
from app.job import Job
from app.plan import Kernels, tracer
from app.workers import LINE, Abandoned, Busy, Pool, Ticket

THREADS = 8
"""Visitors who are served at a time: more than there are cores, for most wait for a trace."""
TICKETS = 1024
"""Requests in progress whose tickets are known."""


@dataclass(frozen=True)
class _Window:
    """The :class:`~app.plan.Tracer` of one visitor."""

    pool: Pool
    ticket: Ticket
    alone = False

    def trace(self, part: str, key: str, job: Job, config: dict, kernels: Kernels) -> bytes:
        try:
            return self.pool.trace(part, key, job, config, kernels, self.ticket)
        except (Abandoned, Busy) as error:
            raise Unanswered(error) from None

    def later(self, part: str, key: str, job: Job, config: dict, kernels: Kernels) -> None:
        self.pool.later(part, key, job, config, kernels)


class Desk:
    """Use cases are run here. ``local_files``: a job's model may be a path on this machine.

    ``aside`` limits what nobody asked for yet: to less at a time than there are traces, so that one who asks finds one.
    """

    def __init__(self, local_files: bool, pool: Pool | None = None):
        self.local_files, self.pool = local_files, pool or Pool()
        self.threads = anyio.CapacityLimiter(THREADS)
        self.aside = anyio.CapacityLimiter(max(1, self.pool.slots - 1))
        self._tickets: dict[str, Ticket] = {}

    @property
    def waiting(self) -> int:
        """Visitors and traces in line."""
        return self.threads.statistics().tasks_waiting + self.pool.waiting

    def admit(self) -> None:
        """Raise :class:`Busy` where the line is full."""
        if self.threads.statistics().tasks_waiting >= LINE:
            raise Busy

    def progress(self, name: str) -> dict[str, Any]:
        """What is being done for the request that came with this ticket; an unknown one's is done."""
        ticket = self._tickets.get(name)
        if ticket is None:
            return {"state": "done", "line": 0, "doing": "", "seconds": 0.0}
        flight, seconds = ticket.flight, round(time.monotonic() - ticket.since, 2)
        if flight is not None and flight.started is not None:
            return {"state": "running", "line": 0, "doing": flight.doing or "starting", "seconds": seconds}
        return {"state": "waiting", "line": self.waiting, "doing": "", "seconds": seconds}

    async def plan(self, job: Any, request: Request | None = None, *, all_layers: bool = False) -> dict:
        """The answer to ``job``. Raises :class:`PlanError`."""
        return await self.run(partial(plan, all_layers=all_layers), job, request)

    async def run(self, use_case: Callable[[Any], Any], job: Any, request: Request | None = None) -> Any:
        """What ``use_case`` makes of ``job``, on a thread. What it has traced for it ends when the visitor leaves."""
        self.refuse_local(job)
        async with self._ticket(request) as ticket:

            def served() -> Any:
                if ticket.left:
                    raise Abandoned
                tracer.set(_Window(self.pool, ticket))
                try:
                    return use_case(job)
                except Unanswered as given_up:
                    raise given_up.error from None

            return await anyio.to_thread.run_sync(served, limiter=self.threads)

    @asynccontextmanager
    async def _ticket(self, request: Request | None) -> AsyncIterator[Ticket]:
        ticket = Ticket()
        name = request.headers.get("x-ticket", "")[:64] if request is not None else ""
        if name and len(self._tickets) < TICKETS:
            self._tickets[name] = ticket
        try:
            if request is None:
                yield ticket
                return
            problem: PlanError | None = None
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_watch, request, ticket)
                try:
                    yield ticket
                except PlanError as error:  # not as part of a group of exceptions
                    problem = error
                tasks.cancel_scope.cancel()
            if problem is not None:
                raise problem
        finally:
            if self._tickets.get(name) is ticket:
                del self._tickets[name]

    def refuse_local(self, job: Any) -> None:
        """Raise :class:`PlanError` for a job whose model would be read from this server's disk."""
        name = job.model if isinstance(job, Job) else job.get("model") if isinstance(job, dict) else None
        if self.local_files or not isinstance(name, str) or find_model(name) is not None:
            return
        if name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1 or os.path.exists(name):
            raise PlanError("this server reads no files of its own", "send the config.json as `config`", "model")


async def _watch(request: Request, ticket: Ticket) -> None:
    """Note when the visitor leaves: the body was read, so what comes next is the end of the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.left = True
