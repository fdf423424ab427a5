"""The HTTP client that huggingface_hub is given, and the bounds of each call: seconds, bytes, tries.

Everything is asked through huggingface_hub itself, so that the token (HF_TOKEN, ``hf auth login``), mirrors
(HF_ENDPOINT), the cache (HF_HOME, shared with the user's other tools) and offline mode (HF_HUB_OFFLINE) are the user's
own. What it does not bound is bounded here, one layer below: huggingface_hub retries a failed look-up five times with a
timeout of 60 s, sleeps as long as Retry-After says and reads a body of any length. Here a call has a deadline, a
request three tries and an answer a limit; redirects count as part of both.

No weight is downloaded and no code of a repository is run. Imports no torch.
"""

from __future__ import annotations

import contextvars
import email.utils
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, parse_ratelimit_headers

from ..errors import PlanError
from .refusals import GaveUp, first_line, refuse_size

T = TypeVar("T")

CONFIG_LIMIT = 4 << 20
"""Bytes of a config.json; the largest published ones have some 100 KiB."""
CONNECT, READ = 3.0, 5.0
"""Seconds to connect, and from one byte to the next."""
TRIES, PAUSE = 3, 0.5
"""Tries of one request, and the seconds before the second, doubled before the third."""
PASSING = (408, 429, 500, 502, 503, 504)
"""Answers that another try may change."""

constants.HF_HUB_DISABLE_TELEMETRY = True  # else it first asks the Hub for a list of AI agents, for up to 3 s
constants.HF_HUB_DISABLE_XET = True  # does not go through httpx: neither deadline nor limit would hold
if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
    disable_progress_bars("huggingface_hub.http_get")


def offline() -> bool:
    """Whether the user asked for no network. From the environment: the dry run sets huggingface_hub's own constant."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in constants.ENV_VARS_TRUE_VALUES


@dataclass
class Bounds:
    """Of one call: what is asked for, its seconds, the bytes of an answer, the tries of a request."""

    what: str
    seconds: float
    limit: int
    tries: int = 0

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds
        self.tries = self.tries or TRIES

    def run(self, work: Callable[[], T]) -> T:
        """``work`` under these bounds, in a thread of its own: nothing else bounds the look-up of a host's name."""
        done: Future[T] = Future()

        def body() -> None:
            _CURRENT.set(self)
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=body, daemon=True, name="hub").start()
        try:
            return done.result(self.seconds)
        except TimeoutError:
            if done.done():
                raise
            raise GaveUp(self.late()) from None

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.end - time.monotonic()

    def late(self) -> str:
        """What is told of a Hub that missed the deadline; the text goes on from its name."""
        return f"did not answer within {self.seconds:g} seconds"

    def answer(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        """The answer to a request, read as a whole, after as many tries as it takes and is allowed."""
        for attempt in range(1, self.tries + 1):
            pause = PAUSE * 2 ** (attempt - 1)
            asked = None
            try:
                response = send()
                try:
                    response.read()
                finally:
                    response.close()
                if response.status_code not in PASSING:
                    return response
                asked = _asked_wait(response.headers)
                pause = max(pause, asked or 0)
                reason = f"answers {response.status_code} {response.reason_phrase}".rstrip()
                if asked:
                    reason += f" and asks to wait {asked:.0f} seconds"
            except httpx.UnsupportedProtocol as error:
                raise GaveUp(f"cannot be asked: {first_line(error)}") from None
            except httpx.TimeoutException as error:
                reason = f"does not answer ({type(error).__name__})"
            except (httpx.ConnectError, httpx.ProxyError) as error:
                reason = f"cannot be reached ({first_line(error)})"
            except httpx.TransportError as error:
                reason = f"broke off its answer ({first_line(error)})"
            if attempt == self.tries or pause >= self.left():
                break
            time.sleep(pause)
        raise GaveUp(reason, asked)


_CURRENT: contextvars.ContextVar[Bounds | None] = contextvars.ContextVar("bounds", default=None)


class BoundedClient(httpx.Client):
    """huggingface_hub's client: inside a call of this module under its bounds, elsewhere as its own.

    Elsewhere is the dry run: a stranger's config may name a backbone to download, and the dry run is offline.
    """

    def __init__(self) -> None:
        super().__init__(event_hooks={"request": [_before], "response": [_after]}, follow_redirects=True, timeout=None)

    def send(self, request: httpx.Request, *, stream: bool = False, **kwargs: Any) -> httpx.Response:
        """As :meth:`httpx.Client.send`, within the bounds of the call that is under way."""
        bounds = _CURRENT.get()
        if bounds is None:
            return super().send(request, stream=stream, **kwargs)
        plain = super().send
        return bounds.answer(lambda: plain(request, stream=True, **kwargs))


def _before(request: httpx.Request) -> None:
    """For every request, those after a redirect too."""
    bounds = _CURRENT.get()
    if bounds is None:
        if constants.is_offline_mode():
            raise OfflineModeIsEnabled(f"Cannot reach {request.url}: offline mode is enabled.")
        return
    left = bounds.left()
    if left <= 0:
        raise GaveUp(bounds.late())
    connect, read = min(CONNECT, left), min(READ, left)
    request.extensions["timeout"] = {"connect": connect, "pool": connect, "read": read, "write": read}
    request.headers["accept-encoding"] = "identity"  # the bytes that come are the bytes that are kept


def _after(response: httpx.Response) -> None:
    """For every answer, redirects too, before a byte of its body is read."""
    bounds = _CURRENT.get()
    if bounds is None:
        return
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise PlanError(f"{bounds.what} comes compressed, unasked", "check HF_ENDPOINT", "model")
    size = None if response.has_redirect_location else response.headers.get("content-length")
    if response.request.method == "HEAD":  # what is looked up here is read as a whole next
        size = response.headers.get("x-linked-size") or size
    if size and size.isdigit() and int(size) > bounds.limit:
        refuse_size(bounds.what, int(size), bounds.limit)
    response.stream = _BoundedBody(response.stream, bounds)


class _BoundedBody(httpx.SyncByteStream):
    def __init__(self, body: Any, bounds: Bounds):
        self.body, self.bounds = body, bounds

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self.body:
            size += len(chunk)
            if size > self.bounds.limit:
                refuse_size(self.bounds.what, size, self.bounds.limit)
            if self.bounds.left() <= 0:
                raise GaveUp(self.bounds.late())
            yield chunk

    def close(self) -> None:
        self.body.close()


set_client_factory(BoundedClient)


def _asked_wait(headers: httpx.Headers) -> float | None:
    """Seconds until the Hub wants to be asked again: its own rate limit, or Retry-After in seconds or as a date."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return int(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
