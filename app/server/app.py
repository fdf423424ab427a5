"""The web application: the page, the HTTP API, and what starts and ends with them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import anyio
import anyio.to_thread
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.middleware.gzip import GZipMiddleware

from .. import __version__
from ..errors import PlanError
from ..form import to_job
from ..render import html
from ..resources import folder
from . import json_api, pages
from .failures import add_handlers
from .middleware import Guard
from .probe_api import probe_router
from .response_cache import ResponseCache
from .runner import RequestRunner


def create_app(
    *, local_files: bool = False, warm: bool = False, allow_probe: bool = False, hosts: frozenset[str] | None = None
) -> FastAPI:
    """The application. ``local_files``: a job's model may be a path; ``warm``: plan the first visit's job early;
    ``allow_probe``: clients may run jobs on this machine's GPU; ``hosts``: the names that it goes by (None: any)."""
    runner = RequestRunner(local_files)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            if warm:
                tasks.start_soon(_plan_first_visit, runner)
                tasks.start_soon(anyio.to_thread.run_sync, runner.pool.ready)
            yield
        runner.pool.close()

    app = FastAPI(
        title="vramplan",
        version=__version__,
        summary="Will it fit? The GPU memory of a training step, from config.json alone.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.runner = runner
    app.add_middleware(GZipMiddleware, minimum_size=2000)
    app.add_middleware(ResponseCache)
    app.add_middleware(Guard, hosts=hosts)
    add_handlers(app)
    app.mount("/static", StaticFiles(directory=folder("static")), name="static")
    for router in (json_api.router, probe_router(allow_probe), pages.router):
        app.include_router(router)
    return app


async def _plan_first_visit(runner: RequestRunner) -> None:
    with suppress(PlanError):
        await runner.plan(to_job(html.FIRST_VISIT.items()))
