"""Errors as HTTP responses: one status and one JSON shape for each, whoever raised them."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ..errors import OurFault, PlanError
from ..schema import Failure
from ..usecases import failure
from .trace_pool import Busy, Ended

BODY_LIMIT = 4 << 20
"""Bytes of a request. A config.json has kilobytes."""
RETRY_SECONDS = 5
"""When a client that is refused because the server is busy should come back."""

RESPONSES: dict[int | str, dict] = {
    422: {"model": Failure, "description": "The job cannot be planned, or is none."},
    413: {"model": Failure, "description": "The request is too large."},
    500: {"model": Failure, "description": "A fault of the planner."},
    503: {
        "model": Failure,
        "description": "Too many jobs wait, or the trace was ended; Retry-After says when to come back.",
    },
}
"""The error responses of the endpoints that plan, as the OpenAPI document has them."""


class Forbidden(PlanError):
    """The error of a server that does not run jobs on its GPU."""

    def __init__(self) -> None:
        super().__init__("this server runs no probes", "start one that does: vramplan serve --allow-probe")


def status_of(error: PlanError) -> tuple[int, dict[str, str]]:
    """The HTTP status of an error, and the headers that go with it."""
    if isinstance(error, (Busy, Ended)):
        return 503, {"retry-after": str(RETRY_SECONDS)}
    if isinstance(error, Forbidden):
        return 403, {}
    return (500 if isinstance(error, OurFault) else 422), {}


def refusal(status: int) -> JSONResponse:
    """The response to a request that reaches no endpoint."""
    messages = {
        403: ("this page belongs to another site", "ask from the page of this server, or without a browser"),
        404: ("there is nothing at this address", "see /openapi.json for what there is"),
        405: ("this address does not take that method", "see /openapi.json for what it takes"),
        413: (f"the request has more than {BODY_LIMIT} bytes", "send less: no config.json is that large"),
        421: ("this server does not go by that name", "start it with the name: vramplan serve --allow-host NAME"),
    }
    error = PlanError(*messages.get(status, ("the request cannot be read", "see /openapi.json")))
    return JSONResponse(failure(error), status)


def add_handlers(app: FastAPI) -> None:
    """Answer every error of an application in the one shape."""
    app.add_exception_handler(PlanError, _on_plan_error)
    app.add_exception_handler(RequestValidationError, _on_malformed)
    app.add_exception_handler(HTTPException, _on_http)


async def _on_plan_error(_: Request, error: PlanError) -> Response:
    status, headers = status_of(error)
    return JSONResponse(failure(error), status, headers)


async def _on_malformed(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    reason = first.get("ctx", {}).get("error") if first["type"] == "json_invalid" else None
    what = f"the body is not JSON: {reason}" if reason else f"the request: {first['msg'][0].lower()}{first['msg'][1:]}"
    return await _on_plan_error(request, PlanError(what, "send a job as JSON; /openapi.json has its schema"))


async def _on_http(_: Request, error: HTTPException) -> Response:
    return refusal(error.status_code)
