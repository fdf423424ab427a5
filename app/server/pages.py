"""The pages for a browser: routes that give HTML, and the picture of a result."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlencode

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.datastructures import UploadFile

from ..errors import PlanError
from ..form import to_job
from ..planning.comparison import JOBS
from ..render import html
from ..schema import Comparison
from ..usecases import advise, alive, compare, other_trainers, solve
from .failures import BODY_LIMIT, RESPONSES, status_of
from .response_cache import PARTS, mark_cacheable
from .runner import RequestRunner, runner_of

LENGTHS = 8
"""Tokens: the page's longest sequence is a multiple of it, as kernels and collators like them. Other lengths run
other kernels and are traced each: to the single token the search takes up to three times as long."""
ADDRESS_LIMIT = 8000
"""Characters of a page's address: browsers, proxies and chats take that much. A form that is longer is posted."""

Pairs = list[tuple[str, str]]
"""A form's fields as they were sent, by name."""

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The page of the job in the address; without one, of the first visit."""
    return await _respond(request, request.query_params.multi_items() or list(html.FIRST_VISIT.items()))


@router.post("/", include_in_schema=False)
async def page_of_config(request: Request) -> Response:
    """The page of a form that was posted: under its own address, where that is short enough."""
    pairs = await _posted(request)
    address, too_long = _address(_given(pairs))
    return await _respond(request, pairs) if too_long else RedirectResponse(f"/?{address}", 303)


@router.get("/advice", include_in_schema=False)
async def page_with_advice(request: Request) -> Response:
    """The page with all parts of its advice, for browsers without JavaScript."""
    return await _respond(request, request.query_params.multi_items(), advised=True)


@router.get("/advice/{part}", include_in_schema=False)
async def part_of_advice(request: Request, part: Literal[PARTS]) -> Response:
    """One part of the advice alone, which the page asks for once its answer is there."""
    pairs = request.query_params.multi_items()
    job, values = to_job(pairs), _given(pairs)
    runner = runner_of(request)
    runner.reject_if_full()
    async with runner.aside:
        answer = await runner.plan(job, request)
        found = await _part(runner, part, job, answer, request)
    mark_cacheable(request.scope, job)
    view = html.View(values, answer, None, _address(values)[0], str(request.base_url), more={part: found})
    return HTMLResponse(html.part(view, part))


@router.get("/alive", include_in_schema=False)
async def alive_then(request: Request, event: int) -> Response:
    """What is alive after an event of the timeline, by module: a part of the page."""
    pairs = [pair for pair in request.query_params.multi_items() if pair[0] != "event"]
    runner = runner_of(request)
    runner.reject_if_full()
    return HTMLResponse(html.holders(await runner.run(partial(alive, event=event), to_job(pairs), request)))


@router.get("/picture.png", include_in_schema=False)
async def preview(request: Request) -> Response:
    """The picture of a page's result that previews of its link show."""
    from ..render import picture

    view = await _view_of(request, request.query_params.multi_items() or list(html.FIRST_VISIT.items()))
    image = await anyio.to_thread.run_sync(picture.png, view)
    return Response(image, status_of(view.problem)[0] if view.problem else 200, media_type="image/png")


@router.get("/compare", include_in_schema=False)
async def page_of_several(request: Request) -> Response:
    """The page of a comparison of several results."""
    links, problem = _links(request)
    views = [await _view_of(request, link) for link in links]
    return HTMLResponse(html.comparison(views, problem, str(request.base_url)), 422 if problem else 200)


@router.get("/compare.json", responses=RESPONSES, summary="Hold the jobs of several addresses side by side")
async def several(
    request: Request, job: Annotated[list[str], Query(description="What follows a page's question mark.")]
) -> Comparison:
    """The jobs of several addresses, with their peaks and verdicts."""
    runner = runner_of(request)
    links, problem = _links(request)
    if problem is not None:
        raise problem
    jobs = [to_job(link) for link in links]
    for one in jobs:
        runner.refuse_local(one)
    runner.reject_if_full()
    return JSONResponse(await runner.run(compare, {"jobs": jobs}, request))


@router.get("/accuracy", include_in_schema=False)
def page_of_accuracy() -> Response:
    """The page of every measured row."""
    return HTMLResponse(html.accuracy())


@router.get("/how-it-works", include_in_schema=False)
async def page_of_how(request: Request) -> Response:
    """The page on how it works, with a real plan."""
    return HTMLResponse(html.how(await _view_of(request, list(html.FIRST_VISIT.items()))))


async def _respond(request: Request, pairs: Pairs, advised: bool = False) -> Response:
    """The page of a form; an error is shown at its field, and the rest of the form is kept."""
    view = await _view_of(request, pairs, advised)
    status, headers = status_of(view.problem) if view.problem else (200, {})
    if view.posted:
        headers = {**headers, "hx-replace-url": "false"}
    return HTMLResponse(html.page(view, live="hx-request" in request.headers), status, headers)


async def _view_of(request: Request, pairs: Pairs, advised: bool = False) -> html.View:
    """What a form asks for, planned; an error is part of the view."""
    values = _given(pairs)
    if "config" in values:
        pairs = [pair for pair in pairs if pair[0] != "model"]
    address, posted = _address(values)
    answer, more, problem = None, {}, None
    try:
        if not values.keys() & {"model", "config"}:
            raise PlanError("no model is named", "choose one of the list, or paste its config.json", "model")
        job, runner = to_job(pairs), runner_of(request)
        runner.reject_if_full()
        answer = await runner.plan(job, request)
        for part in html.parts_of(answer) if advised else ():
            more[part] = await _part(runner, part, job, answer, request)
    except PlanError as error:
        problem = error
    return html.View(values, answer, problem, address, str(request.base_url), posted, more)


async def _part(runner: RequestRunner, part: str, job: dict, answer: dict, request: Request) -> Any:
    """A part of the advice on a job that names a card: what would make it fit, how far one of its fields goes, or what
    it takes with the other trainers."""
    if part == "changes":
        return await runner.run(advise, job, request)
    if part == "trainers":
        return await runner.run(other_trainers, job, request)
    limit = {"memory_limit_bytes": answer["fits"][0]["limit"], "multiple_of": LENGTHS if part != "batch_size" else 1}
    return (await runner.run(partial(solve, target=part), {**job, **limit}, request))[part]


def _links(request: Request) -> tuple[list[Pairs], PlanError | None]:
    """The jobs that the links of a comparison hold; and what is wrong with the link that is left out."""
    links, problem = [], None
    for text in request.query_params.getlist("job"):
        pairs = parse_qsl(text.strip().partition("#")[0].rpartition("?")[2])
        if not text.strip():
            continue
        if not pairs:
            problem = PlanError(f"{text.strip()[:80]!r} is no link of a result", "copy one from the address bar", "job")
        elif len(links) == JOBS:
            problem = PlanError(f"more than {JOBS} results are too many", "take one away", "job")
        else:
            links.append(pairs)
    return links, problem


def _given(pairs: Pairs) -> dict[str, str]:
    """The fields that are not left empty."""
    return {key: text for key, text in pairs if text.strip()}


def _address(values: dict[str, str]) -> tuple[str, bool]:
    """The form as a query string; and whether it is too long for one, which then lacks the config."""
    address = urlencode({key: _compact(text) if key == "config" else text for key, text in values.items()})
    if len(address) <= ADDRESS_LIMIT:
        return address, False
    return urlencode({key: text for key, text in values.items() if key != "config"}), "config" in values


def _compact(config: str) -> str:
    """JSON without the blanks between its parts; text that is no JSON as it is."""
    try:
        return json.dumps(json.loads(config), separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError):
        return config


async def _posted(request: Request) -> Pairs:
    """The form as it was sent. A file is the config."""
    form = await request.form(max_files=1, max_part_size=BODY_LIMIT)
    pairs = [(key, value) for key, value in form.multi_items() if isinstance(value, str)]
    for value in form.values():
        if isinstance(value, UploadFile) and value.size:
            text = (await value.read()).decode("utf-8", "replace")
            pairs = [*(pair for pair in pairs if pair[0] != "config"), ("config", text)]
    return pairs
