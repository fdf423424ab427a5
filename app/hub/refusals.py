"""Errors of the Hub as a user is told them: one sentence of fact, one of advice."""

from __future__ import annotations

import difflib
from typing import NoReturn
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from ..catalog.models import MODELS
from ..errors import PlanError


class GaveUp(Exception):
    """The Hub gave no answer within the bounds of a call; the text goes on from its name. ``wait``: the seconds after
    which it wants to be asked again."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def nearest(name: str, count: int = 3) -> list[str]:
    """The ids of the catalogue most like ``name``, with or without its owner."""
    whole = difflib.SequenceMatcher(b=name.lower())
    short = difflib.SequenceMatcher(b=name.lower().rsplit("/", 1)[-1])

    def likeness(id: str) -> float:
        whole.set_seq1(id.lower())
        short.set_seq1(id.lower().rsplit("/", 1)[-1])
        return max(whole.ratio(), short.ratio())

    return sorted((model.id for model in MODELS), key=likeness, reverse=True)[:count]


def refuse_offline(name: str, revision: str | None) -> NoReturn:
    """Raise :class:`PlanError` for what is not cached while no network is allowed."""
    at = f" at {revision}" if revision else ""
    raise PlanError(
        f"{name}{at} is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE allows no network",
        f"unset HF_HUB_OFFLINE, or plan one of the catalogue: {', '.join(nearest(name))}",
        "model",
    )


def refuse_unanswered(error: GaveUp, name: str, endpoint: str | None) -> NoReturn:
    """Raise :class:`PlanError` for a Hub that gave no answer."""
    catalogue = f"plan one of the catalogue, which needs no network: {', '.join(nearest(name))}"
    if error.wait:
        hint = f"try again in {error.wait:.0f} seconds (a token in HF_TOKEN raises the limit), or {catalogue}"
    else:
        hint = f"check the network and HF_ENDPOINT, or {catalogue}"
    raise PlanError(f"{_host(endpoint)} {error}, and {name} is not in the cache", hint, "model")


def refuse_size(what: str, size: int, limit: int) -> NoReturn:
    """Raise :class:`PlanError` for an answer of too many bytes."""
    raise PlanError(
        f"{what} has {size} bytes or more; at most {limit} are read", "name the model's own repository", "model"
    )


def refuse_unsafe(name: str) -> NoReturn:
    """Raise :class:`PlanError` for a repository without safetensors files."""
    raise PlanError(
        f"{name} has no safetensors weights, whose headers could be read without them",
        "name a repository that has model.safetensors or its index",
        "model",
    )


def refuse(error: Exception, name: str, revision: str | None, file: str, endpoint: str | None) -> NoReturn:
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
        message, hint = f"a header of {name} cannot be read: {first_line(error)}", "its author can repair it"
    elif isinstance(error, OSError) and error.errno is not None:
        message, hint = f"the cache cannot be used: {first_line(error)}", "set HF_HOME to a folder that can be written"
    elif isinstance(error, OSError) and "Consistency check" in str(error):
        message, hint = f"{host} sent another size of {file} of {name} than it announced", "try again"
    else:
        message, hint = (
            f"{name} cannot be read from {host}: {first_line(error) or type(error).__name__}",
            f"see {page}",
        )
    raise PlanError(message, hint, field) from None


def _host(endpoint: str | None) -> str:
    address = endpoint or constants.ENDPOINT
    return urlsplit(address).netloc or address


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters; its class where it has no text."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
