"""The Hugging Face Hub: a model's config.json pinned to a commit, its weights counted from headers, and its search.

Everything is asked through huggingface_hub itself, so that the token (HF_TOKEN, ``hf auth login``), mirrors
(HF_ENDPOINT), the cache (HF_HOME, shared with the user's other tools) and offline mode (HF_HUB_OFFLINE) are the user's
own. What it has no bounds for is bounded here, one layer below, in the HTTP client that it is given: huggingface_hub
retries a failed look-up five times with a timeout of 60 s, sleeps as long as Retry-After says and reads a body of any
length. In here a call has a deadline, a request three tries and an answer a limit; redirects count as part of both.

No weight is downloaded and no code of a repository is run. Imports no torch.
"""

from __future__ import annotations

import contextvars
import difflib
import email.utils
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import httpx
from huggingface_hub import (
    HfApi,
    constants,
    get_local_safetensors_metadata,
    hf_hub_download,
    set_client_factory,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import (
    SafetensorsFileMetadata,
    disable_progress_bars,
    parse_ratelimit_headers,
    validate_repo_id,
)

from ..catalog.models import MODELS
from ..errors import PlanError

T = TypeVar("T")

CONFIG = "config.json"
CONFIG_LIMIT = 4 << 20
"""Bytes of a config.json; the largest published ones have some 100 KiB."""
HEADER_LIMIT = constants.SAFETENSORS_MAX_HEADER_LENGTH + (1 << 20)
"""Bytes of one answer while weights are counted: the longest header that huggingface_hub reads, and an index."""
SHARD_LIMIT = 2000
READERS = 8

CONNECT, READ = 3.0, 5.0
"""Seconds to connect, and from one byte to the next."""
TRIES, PAUSE = 3, 0.5
"""Tries of one request, and the seconds before the second, doubled before the third."""
CONFIG_SECONDS, WEIGHTS_SECONDS, SEARCH_SECONDS = 20.0, 60.0, 3.0

PASSING = (408, 429, 500, 502, 503, 504)
"""Answers that another try may change."""
REVISION = re.compile(r"(?![/-])(?!.*\.\.)[^\s\\~^:?*\[\x00-\x20\x7f]{1,255}")
"""What git allows in the name of a branch, a tag or a commit. huggingface_hub joins it to the path of its cache."""

constants.HF_HUB_DISABLE_TELEMETRY = True  # else it first asks the Hub for a list of AI agents, for up to 3 s
constants.HF_HUB_DISABLE_XET = True  # does not go through httpx: neither deadline nor limit would hold
if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
    disable_progress_bars("huggingface_hub.http_get")


def fetch_config(
    name: str,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> tuple[dict, dict]:
    """config.json of a Hub repository, and ``{"kind": "hub", "id", "commit"}``. Raises :class:`PlanError`.

    Online the revision is looked up each time, unless it is a commit that is cached; where the Hub does not answer,
    what is cached for the revision is taken, as huggingface_hub does. ``endpoint``, ``token`` and ``cache_dir`` are the
    user's own unless given.
    """
    name, revision = _checked(name, revision)
    what = f"{CONFIG} of {name}"
    path = None
    if not offline():
        bounds = _Bounds(what, CONFIG_SECONDS, CONFIG_LIMIT)
        try:
            path = bounds.run(
                lambda: hf_hub_download(
                    name,
                    CONFIG,
                    revision=revision,
                    endpoint=endpoint,
                    token=token,
                    cache_dir=cache_dir,
                    library_name="vramplan",
                )
            )
        except _GaveUp as error:
            path = _cached(name, CONFIG, revision, cache_dir)
            if path is None:
                _refuse_unanswered(error, name, endpoint)
        except Exception as error:
            _refuse(error, name, revision, CONFIG, endpoint)
    else:
        path = _cached(name, CONFIG, revision, cache_dir)
        if path is None:
            _refuse_offline(name, revision)
    commit = os.path.basename(os.path.dirname(path))
    return _read_object(path, what, CONFIG_LIMIT), {"kind": "hub", "id": name, "commit": commit}


def weights_of(
    name: str,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    seconds: float = WEIGHTS_SECONDS,
) -> dict:
    """What a repository's safetensors files hold, from their headers alone: no tensor is read.

    ``{"parameters", "bytes", "by_dtype": {dtype: {"parameters", "bytes"}}, "commit"}``. Numbers are counted as they are
    stored: eight 4-bit weights in one I32 are one. ``name`` may be a local folder, whose commit is None; offline,
    weights that are cached are counted. Raises :class:`PlanError`.
    """
    if os.path.isdir(name):
        return _count_folder(name, name, None)
    name, revision = _checked(name, revision)
    if offline():
        return _count_cached(name, revision, cache_dir) or _refuse_offline(name, revision)
    api = HfApi(endpoint=endpoint, token=token, library_name="vramplan")
    bounds = _Bounds(f"a header of {name}", seconds, HEADER_LIMIT)
    try:
        return bounds.run(lambda: _count_repository(api, name, revision, cache_dir))
    except _GaveUp as error:
        return _count_cached(name, revision, cache_dir) or _refuse_unanswered(error, name, endpoint)
    except Exception as error:
        _refuse(error, name, revision, "its weights", endpoint)


def search(q: str, limit: int = 10, *, endpoint: str | None = None, token: str | None = None) -> list[str] | None:
    """The Hub's own search: ids of models, the most downloaded first; None when offline or without answer in 3 s."""
    if offline():
        return None
    if not q.strip() or limit < 1:
        return []
    api = HfApi(endpoint=endpoint, token=token, library_name="vramplan")
    bounds = _Bounds("the Hub's search", SEARCH_SECONDS, CONFIG_LIMIT, tries=1)
    try:
        return bounds.run(lambda: [hit.id for hit in api.list_models(search=q.strip(), sort="downloads", limit=limit)])
    except Exception:  # a search box without suggestions is no failure
        return None


def offline() -> bool:
    """Whether the user asked for no network. From the environment: the dry run sets huggingface_hub's own constant."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in constants.ENV_VARS_TRUE_VALUES


def nearest(name: str, count: int = 3) -> list[str]:
    """The ids of the catalogue most like ``name``, with or without its owner."""
    whole = difflib.SequenceMatcher(b=name.lower())
    short = difflib.SequenceMatcher(b=name.lower().rsplit("/", 1)[-1])

    def likeness(id: str) -> float:
        whole.set_seq1(id.lower())
        short.set_seq1(id.lower().rsplit("/", 1)[-1])
        return max(whole.ratio(), short.ratio())

    return sorted((model.id for model in MODELS), key=likeness, reverse=True)[:count]


# What is asked, and what is cached


def _checked(name: str, revision: str | None) -> tuple[str, str | None]:
    name = name.strip()
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise PlanError(
            f"{name[:200]!r} is neither a file here nor an id of the Hub",
            f"an id is owner/name, as in {nearest(name[:200], 1)[0]}",
            "model",
        ) from None
    if revision and not REVISION.fullmatch(revision):
        raise PlanError(f"{revision[:200]!r} cannot be a revision", "name a branch, a tag or a commit", "revision")
    return name, revision or None


def _cached(name: str, file: str, revision: str | None, cache_dir: str | None) -> str | None:
    found = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
    return found if isinstance(found, str) else None


def _read_object(path: str, what: str, limit: int) -> dict:
    size = os.path.getsize(path)
    if size > limit:
        _refuse_size(what, size, limit)
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(
            f"{what} is not valid JSON: {_first_line(error)}",
            f"if it is well on the Hub, the copy in the cache is damaged: delete {path}",
            "model",
        ) from None
    if not isinstance(data, dict):
        raise PlanError(f"{what} holds no JSON object", "name a model in the format of Transformers", "model")
    return data


# Weights


def _count_repository(api: HfApi, name: str, revision: str | None, cache_dir: str | None) -> dict:
    """The two layouts that ``HfApi.get_safetensors_metadata`` knows; its threads would not inherit the bounds."""
    info = api.model_info(name, revision=revision)
    files = {sibling.rfilename for sibling in info.siblings or ()}
    if constants.SAFETENSORS_SINGLE_FILE in files:
        shards = [constants.SAFETENSORS_SINGLE_FILE]
    elif constants.SAFETENSORS_INDEX_FILE in files:
        path = api.hf_hub_download(name, constants.SAFETENSORS_INDEX_FILE, revision=info.sha, cache_dir=cache_dir)
        shards = _shards(_read_object(path, f"{constants.SAFETENSORS_INDEX_FILE} of {name}", HEADER_LIMIT), name)
    else:
        _refuse_unsafe(name)
    with ThreadPoolExecutor(READERS) as pool:
        jobs = [
            pool.submit(
                contextvars.copy_context().run, api.parse_safetensors_file_metadata, name, shard, revision=info.sha
            )
            for shard in shards
        ]
        try:
            return _count((job.result() for job in jobs), name, info.sha)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _shards(index: dict, name: str) -> list[str]:
    files = index.get("weight_map")
    files = set(files.values()) if isinstance(files, dict) and all(isinstance(f, str) for f in files.values()) else ()
    if not 0 < len(files) <= SHARD_LIMIT:
        raise PlanError(f"the index of {name} names {len(files)} files of weights", "its author can repair it", "model")
    return sorted(files)


def _count_cached(name: str, revision: str | None, cache_dir: str | None) -> dict | None:
    for file in (constants.SAFETENSORS_SINGLE_FILE, constants.SAFETENSORS_INDEX_FILE):
        path = _cached(name, file, revision, cache_dir)
        if path:
            folder = os.path.dirname(path)
            try:
                return _count_folder(folder, name, os.path.basename(folder))
            except PlanError:  # the index alone is there, from an earlier count
                return None
    return None


def _count_folder(folder: str, name: str, commit: str | None) -> dict:
    if not any(
        os.path.isfile(os.path.join(folder, file))
        for file in (constants.SAFETENSORS_SINGLE_FILE, constants.SAFETENSORS_INDEX_FILE)
    ):
        _refuse_unsafe(name)
    try:
        return _count(get_local_safetensors_metadata(folder).files_metadata.values(), name, commit)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"the weights in {folder} cannot be counted: {_first_line(error)}", "check its files", "model"
        ) from None


def _count(files: Iterable[SafetensorsFileMetadata], name: str, commit: str | None) -> dict:
    by_dtype: dict[str, dict[str, int]] = {}
    for file in files:
        for tensor in file.tensors.values():
            begin, end = tensor.data_offsets
            sizes = (tensor.parameter_count, end - begin)
            if not all(isinstance(size, int) and size >= 0 for size in sizes):
                raise SafetensorsParsingError(f"a tensor of shape {tensor.shape} from byte {begin} to {end}")
            entry = by_dtype.setdefault(tensor.dtype, {"parameters": 0, "bytes": 0})
            entry["parameters"] += sizes[0]
            entry["bytes"] += sizes[1]
    return {
        "parameters": sum(entry["parameters"] for entry in by_dtype.values()),
        "bytes": sum(entry["bytes"] for entry in by_dtype.values()),
        "by_dtype": dict(sorted(by_dtype.items())),
        "commit": commit,
    }


# Bounds: the HTTP client that huggingface_hub is given


class _GaveUp(Exception):
    """The Hub gave no answer within the bounds; the text goes on from its name. ``wait``: the seconds it asked for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass
class _Bounds:
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
            _BOUNDS.set(self)
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
            raise _GaveUp(self.late()) from None

    def left(self) -> float:
        return self.end - time.monotonic()

    def late(self) -> str:
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
                raise _GaveUp(f"cannot be asked: {_first_line(error)}") from None
            except httpx.TimeoutException as error:
                reason = f"does not answer ({type(error).__name__})"
            except (httpx.ConnectError, httpx.ProxyError) as error:
                reason = f"cannot be reached ({_first_line(error)})"
            except httpx.TransportError as error:
                reason = f"broke off its answer ({_first_line(error)})"
            if attempt == self.tries or pause >= self.left():
                break
            time.sleep(pause)
        raise _GaveUp(reason, asked)


_BOUNDS: contextvars.ContextVar[_Bounds | None] = contextvars.ContextVar("bounds", default=None)


class _Client(httpx.Client):
    """huggingface_hub's client: inside a call of this module under its bounds, elsewhere as its own.

    Elsewhere is the dry run: a stranger's config may name a backbone to download, and the dry run is offline.
    """

    def __init__(self) -> None:
        super().__init__(event_hooks={"request": [_before], "response": [_after]}, follow_redirects=True, timeout=None)

    def send(self, request: httpx.Request, *, stream: bool = False, **kwargs: Any) -> httpx.Response:
        bounds = _BOUNDS.get()
        if bounds is None:
            return super().send(request, stream=stream, **kwargs)
        plain = super().send
        return bounds.answer(lambda: plain(request, stream=True, **kwargs))


def _before(request: httpx.Request) -> None:
    """For every request, those after a redirect too."""
    bounds = _BOUNDS.get()
    if bounds is None:
        if constants.is_offline_mode():
            raise OfflineModeIsEnabled(f"Cannot reach {request.url}: offline mode is enabled.")
        return
    left = bounds.left()
    if left <= 0:
        raise _GaveUp(bounds.late())
    connect, read = min(CONNECT, left), min(READ, left)
    request.extensions["timeout"] = {"connect": connect, "pool": connect, "read": read, "write": read}
    request.headers["accept-encoding"] = "identity"  # the bytes that come are the bytes that are kept


def _after(response: httpx.Response) -> None:
    """For every answer, redirects too, before a byte of its body is read."""
    bounds = _BOUNDS.get()
    if bounds is None:
        return
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise PlanError(f"{bounds.what} comes compressed, unasked", "check HF_ENDPOINT", "model")
    size = None if response.has_redirect_location else response.headers.get("content-length")
    if response.request.method == "HEAD":  # what is looked up here is read as a whole next
        size = response.headers.get("x-linked-size") or size
    if size and size.isdigit() and int(size) > bounds.limit:
        _refuse_size(bounds.what, int(size), bounds.limit)
    response.stream = _BoundedBody(response.stream, bounds)


class _BoundedBody(httpx.SyncByteStream):
    def __init__(self, body: Any, bounds: _Bounds):
        self.body, self.bounds = body, bounds

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self.body:
            size += len(chunk)
            if size > self.bounds.limit:
                _refuse_size(self.bounds.what, size, self.bounds.limit)
            if self.bounds.left() <= 0:
                raise _GaveUp(self.bounds.late())
            yield chunk

    def close(self) -> None:
        self.body.close()


set_client_factory(_Client)


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


# Refusals: one sentence of fact, one of advice


def _refuse_offline(name: str, revision: str | None) -> NoReturn:
    at = f" at {revision}" if revision else ""
    raise PlanError(
        f"{name}{at} is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE allows no network",
        f"unset HF_HUB_OFFLINE, or plan one of the catalogue: {', '.join(nearest(name))}",
        "model",
    )


def _refuse_unanswered(error: _GaveUp, name: str, endpoint: str | None) -> NoReturn:
    catalogue = f"plan one of the catalogue, which needs no network: {', '.join(nearest(name))}"
    if error.wait:
        hint = f"try again in {error.wait:.0f} seconds (a token in HF_TOKEN raises the limit), or {catalogue}"
    else:
        hint = f"check the network and HF_ENDPOINT, or {catalogue}"
    raise PlanError(f"{_host(endpoint)} {error}, and {name} is not in the cache", hint, "model")


def _refuse_size(what: str, size: int, limit: int) -> NoReturn:
    raise PlanError(
        f"{what} has {size} bytes or more; at most {limit} are read", "name the model's own repository", "model"
    )


def _refuse_unsafe(name: str) -> NoReturn:
    raise PlanError(
        f"{name} has no safetensors weights, whose headers could be read without them",
        "name a repository that has model.safetensors or its index",
        "model",
    )


def _refuse(error: Exception, name: str, revision: str | None, file: str, endpoint: str | None) -> NoReturn:
    """The error of huggingface_hub as the one that a user is told."""
    if isinstance(error, PlanError):
        raise error
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what went wrong at the Hub, before the cache was looked in
    host = _host(endpoint)
    page = f"{(endpoint or constants.ENDPOINT).rstrip('/')}/{name}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    field = "model"
    if isinstance(error, GatedRepoError):
        message = f"{name} is gated"
        hint = f"accept its licence at {page} and set HF_TOKEN to a token of that account"
    elif isinstance(error, RevisionNotFoundError):
        message, hint, field = (
            f"{name} has no revision {revision}",
            f"its branches and commits are at {page}",
            "revision",
        )
    elif isinstance(error, EntryNotFoundError):
        message, hint = f"{name} has no {file}", "name a model in the format of Transformers"
    elif isinstance(error, DisabledRepoError):
        message, hint = f"{host} has disabled {name}", "name another copy of the model"
    elif status == 401 and "credentials" in str(error):
        message, hint = f"{host} does not accept your token", "log in again (hf auth login) or unset HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        message = f"{host} has no model {name}, or it is private"
        hint = f"set HF_TOKEN for a private one; the catalogue has {', '.join(nearest(name))}"
    elif status == 403:
        message, hint = f"{host} denies access to {name} (403)", f"see {page} and what your token may read"
    elif status is not None:
        message, hint = f"{host} answers {status} for {name}", f"see {page}"
    elif isinstance(error, FileMetadataError):
        message, hint = (
            f"{host} does not answer as a Hub does: it names no commit or no etag",
            "check HF_ENDPOINT and proxies",
        )
    elif isinstance(error, SafetensorsParsingError):
        message, hint = f"a header of {name} cannot be read: {_first_line(error)}", "its author can repair it"
    elif isinstance(error, OSError) and error.errno is not None:
        message, hint = f"the cache cannot be used: {_first_line(error)}", "set HF_HOME to a folder that can be written"
    elif isinstance(error, OSError) and "Consistency check" in str(error):
        message, hint = f"{host} sent another size of {file} of {name} than it announced", "try again"
    else:
        message, hint = (
            f"{name} cannot be read from {host}: {_first_line(error) or type(error).__name__}",
            f"see {page}",
        )
    raise PlanError(message, hint, field) from None


def _host(endpoint: str | None) -> str:
    address = endpoint or constants.ENDPOINT
    return urlsplit(address).netloc or address


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
