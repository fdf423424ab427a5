"""The ASGI middleware around every request: who may ask, headers of the response, a limit on the size of the body."""

from __future__ import annotations

import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import BODY_LIMIT, refusal

DRAINED = 16 * BODY_LIMIT
"""Bytes of a refused request that are still read, so that its sender gets to read why."""
POLICY = "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'"
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-cache",
}
"""Headers of every response that does not set them itself."""


class Guard:
    """Middleware that adds :data:`HEADERS` to responses and refuses bodies of more than :data:`BODY_LIMIT` bytes, what
    another site's page asks for, and requests to another host than ``hosts`` (None: any), as a rebound name's are."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None = None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        with_headers = _adding_headers(send)
        headers = dict(scope["headers"])
        if self.hosts is not None and _host(headers) not in self.hosts:
            return await refusal(421)(scope, receive, with_headers)
        if _from_another_site(headers):
            return await refusal(403)(scope, receive, with_headers)
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > DRAINED:
            return await refusal(413)(scope, receive, with_headers)
        await self.app(scope, _limited(receive), with_headers)


def _host(headers: dict[bytes, bytes]) -> str:
    """The host that a request names, without its port and the brackets of IPv6."""
    return re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).strip("[]").lower()


def _from_another_site(headers: dict[bytes, bytes]) -> bool:
    """Whether a page of another site asks, as a browser tells (https://www.w3.org/TR/fetch-metadata/). A link that
    somebody follows is none."""
    link = headers.get(b"sec-fetch-mode") == b"navigate" and headers.get(b"sec-fetch-dest") == b"document"
    return headers.get(b"sec-fetch-site") == b"cross-site" and not link


def _limited(receive: Receive) -> Receive:
    """``receive``, which raises 413 once the body is too large."""
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken <= BODY_LIMIT:
            return message
        while message.get("more_body") and taken < DRAINED:  # a browser that is still sending hears no answer
            message = await receive()
            taken += len(message.get("body", b""))
        raise HTTPException(413)

    return limited


def _adding_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> Any:
        if message["type"] == "http.response.start":
            given = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *(pair for pair in HEADERS.items() if pair[0] not in given)]
        await send(message)

    return with_headers
