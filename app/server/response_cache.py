"""The cache of responses, as the bytes that were sent: the same request again is a look-up and plans nothing.

The endpoint that made a response says whether it may be kept: :func:`mark_cacheable`. What a probe finds out about a
card changes answers, so the time of the last probe is part of the key.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..catalog.models import find_model
from ..planning.calibration import last_stored

LIMIT = 16 << 20
"""Bytes of requests and responses that are kept."""
LARGEST = 1 << 16
"""Bytes of the largest request body that is looked up."""
PARTS = ("changes", "batch_size", "sequence_length", "trainers")
"""The parts of the page's advice: what would make a job fit, the largest batch, the largest length."""
PATHS = dict.fromkeys(("/estimate", "/solve", "/advise"), "POST") | {f"/advice/{part}": "GET" for part in PARTS}
"""The paths whose responses are kept, and their methods."""


def mark_cacheable(scope: Scope, job: Any) -> None:
    """Say that the response to a request about ``job`` may be kept. It may not where the config comes from a folder or
    the Hub: that may change."""
    told = job if isinstance(job, dict) else vars(job)
    name = told.get("model")
    if told.get("config") is not None or name is None or find_model(name) is not None:
        scope["vramplan.keep"] = True


class ResponseCache:
    """Middleware that answers requests for :data:`PATHS` again from what it kept."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self._answers: OrderedDict[tuple, list[Message]] = OrderedDict()
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or PATHS.get(scope["path"]) != scope["method"]:
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0" if scope["method"] == "GET" else b"")
        if not length.isdigit() or int(length) > LARGEST:
            return await self.app(scope, receive, send)
        first = await receive()
        body = first.get("body", b"")
        if first.get("more_body"):
            return await self.app(scope, _after(first, receive), send)
        zipped = any(name == b"accept-encoding" and b"gzip" in value for name, value in scope["headers"])
        question = (scope["path"], scope["query_string"], zipped, last_stored(), body)
        known = self._answers.get(question)
        if known is not None:
            self._answers.move_to_end(question)
            for message in known:
                await send(message)
            return
        said: list[Message] = []

        async def heard(message: Message) -> None:
            said.append(message)
            await send(message)

        await self.app(scope, _after(first, receive), heard)
        if scope.get("vramplan.keep") and said[0]["status"] == 200:
            self._put(question, said)

    def _put(self, question: tuple, said: list[Message]) -> None:
        self._answers[question] = said
        self._bytes += _size(question, said)
        while self._bytes > LIMIT:
            self._bytes -= _size(*self._answers.popitem(last=False))


def _after(first: Message, receive: Receive) -> Receive:
    """``receive``, with the message that was already received put back."""
    waiting = [first]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _size(question: tuple, said: list[Message]) -> int:
    return len(question[-1]) + sum(len(message.get("body", b"")) for message in said) + 2048
