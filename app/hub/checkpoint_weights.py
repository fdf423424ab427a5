"""The parameters and bytes of a checkpoint, counted from the headers of its safetensors files."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from huggingface_hub import HfApi, constants, get_local_safetensors_metadata
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata

from ..errors import PlanError
from .client import Bounds, offline
from .config_file import cached, checked, read_downloaded
from .refusals import GaveUp, first_line, refuse, refuse_offline, refuse_unanswered, refuse_unsafe

HEADER_LIMIT = constants.SAFETENSORS_MAX_HEADER_LENGTH + (1 << 20)
"""Bytes of one answer while weights are counted: the longest header that huggingface_hub reads, and an index."""
WEIGHTS_SECONDS = 60.0
SHARD_LIMIT = 2000
READERS = 8


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
    name, revision = checked(name, revision)
    if offline():
        return _count_cached(name, revision, cache_dir) or refuse_offline(name, revision)
    api = HfApi(endpoint=endpoint, token=token, library_name="vramplan")
    bounds = Bounds(f"a header of {name}", seconds, HEADER_LIMIT)
    try:
        return bounds.run(lambda: _count_repository(api, name, revision, cache_dir))
    except GaveUp as error:
        return _count_cached(name, revision, cache_dir) or refuse_unanswered(error, name, endpoint)
    except Exception as error:
        refuse(error, name, revision, "its weights", endpoint)


def _count_repository(api: HfApi, name: str, revision: str | None, cache_dir: str | None) -> dict:
    """The two layouts that ``HfApi.get_safetensors_metadata`` knows; its threads would not inherit the bounds."""
    info = api.model_info(name, revision=revision)
    files = {sibling.rfilename for sibling in info.siblings or ()}
    if constants.SAFETENSORS_SINGLE_FILE in files:
        shards = [constants.SAFETENSORS_SINGLE_FILE]
    elif constants.SAFETENSORS_INDEX_FILE in files:
        path = api.hf_hub_download(name, constants.SAFETENSORS_INDEX_FILE, revision=info.sha, cache_dir=cache_dir)
        shards = _shards(read_downloaded(path, f"{constants.SAFETENSORS_INDEX_FILE} of {name}", HEADER_LIMIT), name)
    else:
        refuse_unsafe(name)
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
        path = cached(name, file, revision, cache_dir)
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
        refuse_unsafe(name)
    try:
        return _count(get_local_safetensors_metadata(folder).files_metadata.values(), name, commit)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"the weights in {folder} cannot be counted: {first_line(error)}", "check its files", "model"
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
