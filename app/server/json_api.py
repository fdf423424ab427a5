"""The HTTP API: routes that take and give JSON."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from .. import __version__
from ..catalog.gpus import all_gpus, parts_of
from ..catalog.models import find_model, search_models
from ..errors import PlanError
from ..form import to_job
from ..hub.model_search import search
from ..planning.comparison import jobs_of
from ..planning.fingerprint import can_trace
from ..render import accuracy
from ..render.comparison_csv import to_csv
from ..schema import Advice, Answer, Comparison, GpuRow, Health, Line, ModelRow, Progress, Serving, Solved
from ..serving.server_plan import model_read
from ..usecases import advise, compare, failure, serving, solve, unwrap
from .bodies import BatchBody, CompareBody, JobBody, ServingBody, SolveBody
from .failures import RESPONSES
from .response_cache import mark_cacheable
from .runner import runner_of

BATCH_LIMIT = 1000
"""Jobs of one batch."""
HUB_LIMIT = 20
"""Models that the Hub's search is asked for."""
TARGETS = "batch_size, sequence_length, r (the adapters' rank), accumulation_free_batch, gpu, gpu_count or model"

router = APIRouter()


@router.post("/estimate", response_model=Answer, responses=RESPONSES, summary="Plan one job")
async def estimate(request: Request, job: JobBody, all_layers: bool = False, other_trainers: bool = False) -> Response:
    """The plan of one job; with `other_trainers` what it takes with the others, too."""
    runner = runner_of(request)
    runner.reject_if_full()
    answer = await runner.plan(job, request, all_layers=all_layers, trainers=other_trainers)
    mark_cacheable(request.scope, job)
    return JSONResponse(answer)


@router.get("/estimate.json", response_model=Answer, responses=RESPONSES, summary="Plan the job of a page's address")
async def estimate_address(request: Request) -> Response:
    """The plan of the job that a page's address holds."""
    runner = runner_of(request)
    runner.reject_if_full()
    return JSONResponse(await runner.plan(to_job(request.query_params.multi_items()), request))


@router.post(
    "/estimate/batch",
    response_model=list[Answer | Line],
    responses=RESPONSES,
    summary="Plan many jobs; each gets its answer or its error",
)
async def batch(request: Request, items: BatchBody) -> Response:
    """The plans of up to 1000 jobs, in order; a job that cannot be planned is an `error` in its place."""
    if not isinstance(items, list):
        raise PlanError("a batch is a list of jobs", 'send [{"model": "…"}, {"id": 1, "job": {"model": "…"}}]')
    if len(items) > BATCH_LIMIT:
        raise PlanError(f"a batch of {len(items)} jobs is too long", f"send at most {BATCH_LIMIT} at once")
    runner = runner_of(request)
    runner.reject_if_full()
    out = []
    for item in items:
        tag, job = unwrap(item)
        try:
            out.append({**tag, **await runner.plan(job, request)})
        except PlanError as error:
            out.append({**tag, **failure(error)})
    return JSONResponse(out)


@router.post(
    "/solve", response_model=Solved, responses=RESPONSES, summary="Find the largest that fits, or the smallest card"
)
async def largest(
    request: Request, job: SolveBody, target: Annotated[str, Query(alias="for", description=TARGETS)] = "batch_size"
) -> Response:
    """The largest batch, length or rank that fits; or the smallest card, or the largest model."""
    tag, job = unwrap(job)
    runner = runner_of(request)
    runner.reject_if_full()
    found = await runner.run(partial(solve, target=target), job, request)
    mark_cacheable(request.scope, job)
    return JSONResponse({**tag, **found})


@router.post("/advise", response_model=Advice, responses=RESPONSES, summary="Find what makes a job fit its card")
async def advice(request: Request, job: JobBody) -> Response:
    """The single changes that make a job fit its card, each planned."""
    runner = runner_of(request)
    runner.reject_if_full()
    found = await runner.run(advise, job, request)
    mark_cacheable(request.scope, job)
    return JSONResponse(found)


@router.post("/compare", response_model=Comparison, responses=RESPONSES, summary="Hold jobs side by side")
async def side_by_side(
    request: Request, what: CompareBody, form: Annotated[Literal["json", "csv"], Query(alias="format")] = "json"
) -> Response:
    """Up to six jobs, or one varied, with their peaks and verdicts; as JSON or as CSV."""
    runner = runner_of(request)
    for _, job in jobs_of(what):
        runner.refuse_local(job)
    runner.reject_if_full()
    rows = await runner.run(compare, what, request)
    return JSONResponse(rows) if form == "json" else Response(to_csv(rows), media_type="text/csv")


@router.post(
    "/serving", response_model=Serving, responses=RESPONSES, summary="Plan a server: does it start, with what cache"
)
async def server_plan(request: Request, asked: ServingBody) -> Response:
    """What the command of a server takes of a card, and how much it leaves to the KV cache."""
    runner = runner_of(request)
    runner.refuse_local({"model": model_read(asked)})
    runner.reject_if_full()
    return JSONResponse(await runner.run(serving, asked, request))


@router.get("/gpus", summary="The cards of the catalogue, the smallest first")
async def gpus() -> list[GpuRow]:
    """The cards of the catalogue."""
    return [GpuRow(**asdict(card), parts=parts_of(card)) for card in all_gpus()]


@router.get("/models", responses={422: RESPONSES[422]}, summary="Models by name: the catalogue's, then the Hub's")
def models(
    response: Response,
    q: Annotated[str, Query(max_length=200, description="Words of a model's name.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000, description="Of each source.")] = 20,
) -> list[ModelRow]:
    """The header `hub-search` says whether the Hub `answered`; `unanswered`, the catalogue's are all there is."""
    rows = [
        ModelRow(
            id=m.id,
            source="catalogue",
            parameters=m.parameters,
            model_type=m.config["model_type"],
            aliases=list(m.aliases),
        )
        for m in search_models(q, limit)
    ]
    found = search(q, min(limit, HUB_LIMIT))
    response.headers["hub-search"] = "unanswered" if found is None else "answered"
    return rows + [ModelRow(id=id, source="hub") for id in found or () if find_model(id) is None]


@router.get("/progress/{request_id}", summary="What is being done for the request that came with this X-Request-Id")
async def progress(request: Request, request_id: str) -> Progress:
    """What is being done for a request that is under way."""
    return Progress(**runner_of(request).progress(request_id))


@router.get("/health", summary="Whether the service is up")
async def health(request: Request) -> Health:
    """Whether the service is up, how many jobs wait, and whether it can trace."""
    return Health(version=__version__, waiting=runner_of(request).waiting, can_trace=can_trace())


@router.get("/accuracy.json", summary="Every measured row beside its plan")
def measured() -> dict[str, Any]:
    """Every measured row beside its plan, as the page of accuracy shows it."""
    return accuracy.tables()
