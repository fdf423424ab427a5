"""The route that runs a job on the server's own GPU, where its operator allows that."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import anyio
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from ..errors import OurFault
from ..job import Job
from ..resources import PACKAGE
from ..schema import Failure, Probe
from .bodies import JobBody
from .failures import RESPONSES, Forbidden
from .runner import runner_of
from .trace_pool import Busy

PROBES_WAITING = 2
"""Probes in line; each takes seconds to minutes of the card."""


def probe_router(allowed: bool) -> APIRouter:
    """The route ``POST /probe``, which refuses unless it is ``allowed``. Runs one probe at a time."""
    router, slot = APIRouter(), anyio.CapacityLimiter(1)

    @router.post(
        "/probe",
        response_model=Probe,
        responses={**RESPONSES, 403: {"model": Failure, "description": "The server runs no probes."}},
        summary="Run one job on the server's GPU, beside its plan",
    )
    async def probe_one(
        request: Request,
        job: JobBody,
        yes: Annotated[bool, Query(description="Try what is predicted not to fit.")] = False,
        layers: Annotated[int | None, Query(ge=2, description="Measure so many layers, and extrapolate.")] = None,
    ) -> Response:
        if not allowed:
            raise Forbidden
        runner_of(request).refuse_local(job)
        if slot.statistics().tasks_waiting >= PROBES_WAITING:
            raise Busy
        async with slot:
            return await _probed(job, yes, layers)

    return router


async def _probed(job: Job, yes: bool, layers: int | None) -> Response:
    """The answer of a probe in a process of its own, which is the planner's too: plans go on beside it."""
    command = [sys.executable, "-m", __package__.partition(".")[0], "probe", "--job", "-", "--json"]
    command += ["--yes"] if yes else []
    command += [] if layers is None else ["--layers", str(layers)]
    text = job.model_dump_json(exclude_unset=True)
    done = await anyio.run_process(command, input=text.encode(), check=False, cwd=PACKAGE.parent)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise OurFault(f"the probe ended with {done.returncode}") from None
    return JSONResponse(answer, 422 if "error" in answer else 200)
