"""The page and the HTTP API. Every error leaves through one handler."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlencode

import anyio
import anyio.to_thread
from fastapi import Body, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field, WrapValidator
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware

from .. import __version__
from ..catalog.gpus import all_gpus, parts_of
from ..catalog.models import find_model, search_models
from ..errors import PlanError
from ..form import to_job
from ..hub import client as hub
from ..job import Job, read_job
from ..planning.comparison import JOBS, jobs_of
from ..render import accuracy, html
from ..render.comparison_csv import to_csv
from ..resources import PACKAGE, folder
from ..schema import Advice, Answer, Comparison, Failure, GpuRow, Health, Line, ModelRow, Probe, Progress, Solved
from ..usecases import Unexpected, advise, alive, compare, failure, solve, unwrap
from .response_cache import PARTS, ResponseCache, mark_cacheable
from .runner import RequestRunner
from .trace_pool import Busy

BODY_LIMIT = 4 << 20
"""Bytes of a request. A config.json has kilobytes."""
DRAINED = 16 * BODY_LIMIT
"""Bytes of a request that is refused which are still read, so that its sender comes to read why."""
PROBES_WAITING = 2
"""Probes in line; each takes seconds to minutes of the card."""
BATCH_LIMIT = 1000
HUB_LIMIT = 20
"""Models that the Hub's search is asked for."""
LENGTHS = 8
"""Tokens: the page's longest sequence is a multiple of it, as kernels and collators like them. Other lengths run
otherwise, and are traced otherwise: to the single token the search takes up to three times as long."""
ADDRESS_LIMIT = 8000
"""Characters of a page's address: browsers, proxies and chats take that much. A form that is longer is posted."""
POLICY = "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'"
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-cache",
}

EXAMPLES = {
    "qlora": {
        "summary": "QLoRA of an 8B model on a 24 GB card",
        "value": {"model": "llama-3.1-8b", "method": "qlora", "sequence_length": 2048, "gpu": "rtx-4090"},
    },
    "full": {
        "summary": "A config of one's own, trained in full on a card of one's own",
        "value": {
            "config": {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 512,
                "intermediate_size": 1376,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "vocab_size": 32000,
            },
            "method": "full",
            "batch_size": 8,
            "gpu": {"name": "my card", "memory_bytes": 12 << 30},
        },
    },
}
BATCH_EXAMPLES = {
    "two": {
        "summary": "A job, and a job with an id",
        "value": [EXAMPLES["qlora"]["value"], {"id": "own", "job": EXAMPLES["full"]["value"]}],
    }
}

SOLVE_EXAMPLES = {
    "batch": {
        "summary": "The largest batch in 20 GiB",
        "value": {**EXAMPLES["qlora"]["value"], "memory_limit_bytes": 20 << 30},
    }
}


class LimitedJob(Job):
    """A job, and how much memory there is where its card is not meant."""

    memory_limit_bytes: int | None = Field(None, description="What the allocator may hold, instead of the job's card.")
    multiple_of: int | None = Field(None, description="Only multiples of it are sought.")
    prices: dict[str, float] | None = Field(None, description="By card: priced cards are ranked, for=gpu.")


class Comparable(BaseModel):
    """`jobs`, or a `job` and what of it to vary."""

    jobs: list[Job] | None = Field(None, description="At most six.")
    job: Job | None = None
    over: dict[str, list] | None = Field(None, description="Values by dotted field: every combination is planned.")


JobBody = Annotated[Job, WrapValidator(lambda value, _: read_job(value)), Body(openapi_examples=EXAMPLES)]
"""A Job, documented by its schema and read by :func:`read_job`, whose errors name the nearest field."""
SolveBody = Annotated[LimitedJob, WrapValidator(lambda value, _: value), Body(openapi_examples=SOLVE_EXAMPLES)]
TARGETS = "batch_size, sequence_length, r (the adapters' rank), accumulation_free_batch, gpu or model"
COMPARE_EXAMPLES = {
    "over": {
        "summary": "One job over methods and cards",
        "value": {
            "job": {"model": "llama-3.1-8b", "sequence_length": 2048},
            "over": {"method": ["lora", "qlora"], "gpu": ["rtx-4090", "a100-40gb"]},
        },
    }
}
CompareBody = Annotated[Comparable, WrapValidator(lambda value, _: value), Body(openapi_examples=COMPARE_EXAMPLES)]
Items = Annotated[list[Job | dict], WrapValidator(lambda value, _: value), Body(openapi_examples=BATCH_EXAMPLES)]
ERRORS = {
    422: {"model": Failure, "description": "The job cannot be planned, or is none."},
    413: {"model": Failure, "description": "The request is too large."},
    500: {"model": Failure, "description": "A fault of the planner."},
    503: {"model": Failure, "description": "Too many jobs wait; Retry-After says when to come back."},
}


class Forbidden(PlanError):
    """The server does not run jobs on its GPU."""

    def __init__(self):
        super().__init__("this server runs no probes", "start one that does: vramplan serve --allow-probe")


class Guard:
    """Middleware: the headers of every response, and an end to bodies that are too large."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        taken = 0

        async def limited():
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken <= BODY_LIMIT:
                return message
            while message.get("more_body") and taken < DRAINED:  # a browser that is still sending hears no answer
                message = await receive()
                taken += len(message.get("body", b""))
            raise HTTPException(413)

        async def with_headers(message):
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in HEADERS.items() if pair[0] not in given)]
            await send(message)

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > DRAINED:
            return await _refuse(413)(scope, receive, with_headers)
        await self.app(scope, limited, with_headers)


def _refuse(status: int) -> JSONResponse:
    messages = {
        404: ("there is nothing at this address", "see /openapi.json for what there is"),
        405: ("this address does not take that method", "see /openapi.json for what it takes"),
        413: (f"the request has more than {BODY_LIMIT} bytes", "send less: no config.json is that large"),
    }
    error = PlanError(*messages.get(status, ("the request cannot be read", "see /openapi.json")))
    return JSONResponse(failure(error), status)


def _status(error: PlanError) -> tuple[int, dict[str, str]]:
    if isinstance(error, Busy):
        return 503, {"retry-after": "5"}
    if isinstance(error, Forbidden):
        return 403, {}
    return (500 if isinstance(error, Unexpected) else 422), {}


async def _on_plan_error(_: Request, error: PlanError) -> Response:
    status, headers = _status(error)
    return JSONResponse(failure(error), status, headers)


async def _on_malformed(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    reason = first.get("ctx", {}).get("error") if first["type"] == "json_invalid" else None
    what = f"the body is not JSON: {reason}" if reason else f"the request: {first['msg'][0].lower()}{first['msg'][1:]}"
    return await _on_plan_error(request, PlanError(what, "send a job as JSON; /openapi.json has its schema"))


async def _on_http(_: Request, error: HTTPException) -> Response:
    return _refuse(error.status_code)


def create_app(*, local_files: bool = False, warm: bool = False, allow_probe: bool = False) -> FastAPI:
    """The application. ``local_files``: a job's model may be a path; ``warm``: plan the first visit's job early;
    ``allow_probe``: visitors may run jobs on this machine's GPU."""
    runner = RequestRunner(local_files)

    async def warm_up() -> None:
        with suppress(PlanError):
            await runner.plan(to_job(html.FIRST_VISIT.items()))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            if warm:
                tasks.start_soon(warm_up)
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
    app.add_middleware(GZipMiddleware, minimum_size=2000)
    app.add_middleware(ResponseCache)
    app.add_middleware(Guard)
    app.add_exception_handler(PlanError, _on_plan_error)
    app.add_exception_handler(RequestValidationError, _on_malformed)
    app.add_exception_handler(HTTPException, _on_http)
    app.mount("/static", StaticFiles(directory=folder("static")), name="static")
    _add_api(app, runner)
    _add_probe(app, runner, allow_probe)
    _add_page(app, runner)
    return app


def _add_api(app: FastAPI, runner: RequestRunner) -> None:
    @app.post("/estimate", response_model=Answer, responses=ERRORS, summary="Plan one job")
    async def estimate(request: Request, job: JobBody, all_layers: bool = False) -> Response:
        runner.reject_if_full()
        answer = await runner.plan(job, request, all_layers=all_layers)
        mark_cacheable(request.scope, job)
        return JSONResponse(answer)

    @app.get("/estimate.json", response_model=Answer, responses=ERRORS, summary="Plan the job of a page's address")
    async def estimate_address(request: Request) -> Response:
        runner.reject_if_full()
        return JSONResponse(await runner.plan(to_job(request.query_params.multi_items()), request))

    @app.post(
        "/estimate/batch",
        response_model=list[Answer | Line],
        responses=ERRORS,
        summary="Plan many jobs; each gets its answer or its error",
    )
    async def batch(request: Request, items: Items) -> Response:
        if not isinstance(items, list):
            raise PlanError("a batch is a list of jobs", 'send [{"model": "…"}, {"id": 1, "job": {"model": "…"}}]')
        if len(items) > BATCH_LIMIT:
            raise PlanError(f"a batch of {len(items)} jobs is too long", f"send at most {BATCH_LIMIT} at once")
        runner.reject_if_full()
        out = []
        for item in items:
            tag, job = unwrap(item)
            try:
                out.append({**tag, **await runner.plan(job, request)})
            except PlanError as error:
                out.append({**tag, **failure(error)})
        return JSONResponse(out)

    @app.post(
        "/solve", response_model=Solved, responses=ERRORS, summary="Find the largest that fits, or the smallest card"
    )
    async def largest(
        request: Request, job: SolveBody, target: Annotated[str, Query(alias="for", description=TARGETS)] = "batch_size"
    ) -> Response:
        tag, job = unwrap(job)
        runner.reject_if_full()
        found = await runner.run(partial(solve, target=target), job, request)
        mark_cacheable(request.scope, job)
        return JSONResponse({**tag, **found})

    @app.post("/advise", response_model=Advice, responses=ERRORS, summary="Find what makes a job fit its card")
    async def advice(request: Request, job: JobBody) -> Response:
        runner.reject_if_full()
        found = await runner.run(advise, job, request)
        mark_cacheable(request.scope, job)
        return JSONResponse(found)

    @app.post("/compare", response_model=Comparison, responses=ERRORS, summary="Hold jobs side by side")
    async def side_by_side(
        request: Request, what: CompareBody, form: Annotated[Literal["json", "csv"], Query(alias="format")] = "json"
    ) -> Response:
        for _, job in jobs_of(what):
            runner.refuse_local(job)
        runner.reject_if_full()
        rows = await runner.run(compare, what, request)
        return JSONResponse(rows) if form == "json" else Response(to_csv(rows), media_type="text/csv")

    @app.get("/gpus", summary="The cards of the catalogue, the smallest first")
    async def gpus() -> list[GpuRow]:
        return [GpuRow(**asdict(card), parts=parts_of(card)) for card in all_gpus()]

    @app.get("/models", responses={422: ERRORS[422]}, summary="Models by name: the catalogue's, then the Hub's")
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
        found = hub.search(q, min(limit, HUB_LIMIT))
        response.headers["hub-search"] = "unanswered" if found is None else "answered"
        return rows + [ModelRow(id=id, source="hub") for id in found or () if find_model(id) is None]

    @app.get("/progress/{ticket}", summary="What is being done for the request that came with this X-RequestHandle")
    async def progress(ticket: str) -> Progress:
        return Progress(**runner.progress(ticket))

    @app.get("/health", summary="Whether the service is up")
    async def health() -> Health:
        return Health(version=__version__, waiting=runner.waiting)


def _add_probe(app: FastAPI, runner: RequestRunner, allowed: bool) -> None:
    slot = anyio.CapacityLimiter(1)

    @app.post(
        "/probe",
        response_model=Probe,
        responses={**ERRORS, 403: {"model": Failure, "description": "The server was started without --allow-probe."}},
        summary="Run one job on the server's GPU, beside its plan",
    )
    async def probe_one(
        job: JobBody,
        yes: Annotated[bool, Query(description="Try what is predicted not to fit.")] = False,
        layers: Annotated[int | None, Query(ge=2, description="Measure so many layers, and extrapolate.")] = None,
    ) -> Response:
        if not allowed:
            raise Forbidden
        runner.refuse_local(job)
        if slot.statistics().tasks_waiting >= PROBES_WAITING:
            raise Busy
        command = [sys.executable, "-m", __package__.partition(".")[0], "probe", "--job", "-", "--json"]
        command += ["--yes"] if yes else []
        command += [] if layers is None else ["--layers", str(layers)]
        text = job.model_dump_json(exclude_unset=True)
        async with slot:  # a process of its own: the planner's, and plans go on beside it
            done = await anyio.run_process(command, input=text.encode(), check=False, cwd=PACKAGE.parent)
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            raise Unexpected(RuntimeError(f"the probe ended with {done.returncode}")) from None
        return JSONResponse(answer, 422 if "error" in answer else 200)


def _add_page(app: FastAPI, runner: RequestRunner) -> None:
    async def view_of(request: Request, pairs: list[tuple[str, str]], advised: bool = False) -> html.View:
        """What the form holds, planned; a problem is part of the view."""
        values = _given(pairs)
        if "config" in values:
            pairs = [pair for pair in pairs if pair[0] != "model"]
        address, posted = _address(values)
        answer, more, problem = None, {}, None
        try:
            if not values.keys() & {"model", "config"}:
                raise PlanError("no model is named", "choose one of the list, or paste its config.json", "model")
            job = to_job(pairs)
            runner.reject_if_full()
            answer = await runner.plan(job, request)
            for part in html.parts_of(answer) if advised else ():
                more[part] = await _part(runner, part, job, answer, request)
        except PlanError as error:
            problem = error
        return html.View(values, answer, problem, address, str(request.base_url), posted, more)

    async def respond(request: Request, pairs: list[tuple[str, str]], advised: bool = False) -> Response:
        """An error is rendered at its field, the rest of the form kept."""
        view = await view_of(request, pairs, advised)
        status, headers = _status(view.problem) if view.problem else (200, {})
        if view.posted:
            headers = {**headers, "hx-replace-url": "false"}
        return HTMLResponse(html.page(view, live="hx-request" in request.headers), status, headers)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return await respond(request, request.query_params.multi_items() or list(html.FIRST_VISIT.items()))

    @app.post("/", include_in_schema=False)
    async def page_of_config(request: Request) -> Response:
        pairs = await _posted(request)
        address, too_long = _address(_given(pairs))
        return await respond(request, pairs) if too_long else RedirectResponse(f"/?{address}", 303)

    @app.get("/advice", include_in_schema=False)
    async def page_with_advice(request: Request) -> Response:
        return await respond(request, request.query_params.multi_items(), advised=True)

    @app.get("/advice/{part}", include_in_schema=False)
    async def part_of_advice(request: Request, part: Literal[PARTS]) -> Response:
        """One part of it alone: what the page asks for by itself once its answer is there."""
        pairs = request.query_params.multi_items()
        job, values = to_job(pairs), _given(pairs)
        runner.reject_if_full()
        async with runner.aside:
            answer = await runner.plan(job, request)
            found = await _part(runner, part, job, answer, request)
        mark_cacheable(request.scope, job)
        view = html.View(values, answer, None, _address(values)[0], str(request.base_url), more={part: found})
        return HTMLResponse(html.part(view, part))

    @app.get("/alive", include_in_schema=False)
    async def alive_then(request: Request, event: int) -> Response:
        """What is alive after an event of the timeline, by module: a part of the page."""
        pairs = [pair for pair in request.query_params.multi_items() if pair[0] != "event"]
        runner.reject_if_full()
        return HTMLResponse(html.holders(await runner.run(partial(alive, event=event), to_job(pairs), request)))

    @app.get("/picture.png", include_in_schema=False)
    async def preview(request: Request) -> Response:
        """The picture of a page's result that previews of its link show."""
        from ..render import picture

        view = await view_of(request, request.query_params.multi_items() or list(html.FIRST_VISIT.items()))
        image = await anyio.to_thread.run_sync(picture.png, view)
        return Response(image, _status(view.problem)[0] if view.problem else 200, media_type="image/png")

    @app.get("/compare", include_in_schema=False)
    async def page_of_several(request: Request) -> Response:
        links, problem = _links(request)
        views = [await view_of(request, link) for link in links]
        return HTMLResponse(html.comparison(views, problem, str(request.base_url)), 422 if problem else 200)

    @app.get("/compare.json", responses=ERRORS, summary="Hold the jobs of several addresses side by side")
    async def several(
        request: Request, job: Annotated[list[str], Query(description="What follows a page's question mark.")]
    ) -> Comparison:
        links, problem = _links(request)
        if problem is not None:
            raise problem
        jobs = [to_job(link) for link in links]
        for one in jobs:
            runner.refuse_local(one)
        runner.reject_if_full()
        return JSONResponse(await runner.run(compare, {"jobs": jobs}, request))

    @app.get("/accuracy", include_in_schema=False)
    def page_of_accuracy() -> Response:
        return HTMLResponse(html.accuracy())

    @app.get("/accuracy.json", summary="Every measured row beside its plan")
    def measured() -> dict[str, Any]:
        return accuracy.tables()

    @app.get("/how-it-works", include_in_schema=False)
    async def page_of_how(request: Request) -> Response:
        return HTMLResponse(html.how(await view_of(request, list(html.FIRST_VISIT.items()))))


def _links(request: Request) -> tuple[list[list[tuple[str, str]]], PlanError | None]:
    """The jobs that the links of a comparison hold, as pairs; and what is wrong with the one that is left out."""
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


def _given(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """The fields that are not left empty."""
    return {key: text for key, text in pairs if text.strip()}


def _address(values: dict[str, str]) -> tuple[str, bool]:
    """The form as a query string; and whether it is too long for one, which then lacks the config."""
    address = urlencode({key: _compact(text) if key == "config" else text for key, text in values.items()})
    if len(address) <= ADDRESS_LIMIT:
        return address, False
    return urlencode({key: text for key, text in values.items() if key != "config"}), "config" in values


def _compact(config: str) -> str:
    """JSON without the blanks between its parts; what is no JSON as it is."""
    try:
        return json.dumps(json.loads(config), separators=(",", ":"), ensure_ascii=False)
    except (ValueError, RecursionError):
        return config


async def _part(runner: RequestRunner, part: str, job: dict, answer: dict, request: Request) -> Any:
    """A part of the advice on a job that names a card: what would make it fit, or how far one of its fields goes."""
    if part == "changes":
        return await runner.run(advise, job, request)
    limit = {"memory_limit_bytes": answer["fits"][0]["limit"], "multiple_of": LENGTHS if part != "batch_size" else 1}
    return (await runner.run(partial(solve, target=part), {**job, **limit}, request))[part]


async def _posted(request: Request) -> list[tuple[str, str]]:
    """The form as it was sent. A file is the config."""
    form = await request.form(max_files=1, max_part_size=BODY_LIMIT)
    pairs = [(key, value) for key, value in form.multi_items() if isinstance(value, str)]
    for value in form.values():
        if isinstance(value, UploadFile) and value.size:
            text = (await value.read()).decode("utf-8", "replace")
            pairs = [*(pair for pair in pairs if pair[0] != "config"), ("config", text)]
    return pairs
