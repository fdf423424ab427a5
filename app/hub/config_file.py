"""A model's config.json from the Hub, pinned to a commit."""

from __future__ import annotations

import json
import os
import re

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import PlanError
from .client import CONFIG_LIMIT, Bounds, offline
from .refusals import GaveUp, first_line, nearest, refuse, refuse_offline, refuse_size, refuse_unanswered

CONFIG = "config.json"
CONFIG_SECONDS = 20.0
REVISION = re.compile(r"(?![/-])(?!.*\.\.)[^\s\\~^:?*\[\x00-\x20\x7f]{1,255}")
"""What git allows in the name of a branch, a tag or a commit. huggingface_hub joins it to the path of its cache."""


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
    name, revision = checked(name, revision)
    try:
        path = _path_of(name, CONFIG, revision, endpoint, token, cache_dir)
    except RemoteEntryNotFoundError as error:
        refuse(error, name, revision, CONFIG, endpoint)
    commit = os.path.basename(os.path.dirname(path))
    return read_downloaded(path, f"{CONFIG} of {name}", CONFIG_LIMIT), {"kind": "hub", "id": name, "commit": commit}


def fetch_optional(
    name: str,
    file: str,
    commit: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
) -> dict | None:
    """A JSON file of a Hub repository at a commit; None: the repository has none, or it is not cached and there is no
    network. Raises :class:`PlanError`."""
    if offline():
        path = cached(name, file, commit, cache_dir)
    else:
        try:
            path = _path_of(name, file, commit, endpoint, token, cache_dir)
        except RemoteEntryNotFoundError:
            return None
    return None if path is None else read_downloaded(path, f"{file} of {name}", CONFIG_LIMIT)


def _path_of(
    name: str, file: str, revision: str | None, endpoint: str | None, token: str | None, cache_dir: str | None
) -> str:
    """The path of a repository's file, downloaded or cached.

    Raises :class:`PlanError`, and ``RemoteEntryNotFoundError`` where the repository has no such file.
    """
    if offline():
        return cached(name, file, revision, cache_dir) or refuse_offline(name, revision)
    bounds = Bounds(f"{file} of {name}", CONFIG_SECONDS, CONFIG_LIMIT)
    try:
        return bounds.run(
            lambda: hf_hub_download(
                name,
                file,
                revision=revision,
                endpoint=endpoint,
                token=token,
                cache_dir=cache_dir,
                library_name="vramplan",
            )
        )
    except GaveUp as error:
        return cached(name, file, revision, cache_dir) or refuse_unanswered(error, name, endpoint)
    except RemoteEntryNotFoundError:
        raise
    except Exception as error:
        refuse(error, name, revision, file, endpoint)


def checked(name: str, revision: str | None) -> tuple[str, str | None]:
    """A repository's id and revision, trimmed. Raises :class:`PlanError` where the Hub can have neither."""
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


def cached(name: str, file: str, revision: str | None, cache_dir: str | None) -> str | None:
    """The path of a file in huggingface_hub's cache; None: it is not there."""
    found = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
    return found if isinstance(found, str) else None


def read_downloaded(path: str, what: str, limit: int) -> dict:
    """The JSON object in a file of at most ``limit`` bytes. Raises :class:`PlanError`."""
    size = os.path.getsize(path)
    if size > limit:
        refuse_size(what, size, limit)
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(
            f"{what} is not valid JSON: {first_line(error)}",
            f"if it is well on the Hub, the copy in the cache is damaged: delete {path}",
            "model",
        ) from None
    if not isinstance(data, dict):
        raise PlanError(f"{what} holds no JSON object", "name a model in the format of Transformers", "model")
    return data
