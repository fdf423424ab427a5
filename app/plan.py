"""From a job to its books: the card, the config, and the dry run, kept by everything that shapes it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version

from app.catalog.gpus import Gpu, find_gpu
from app.catalog.models import find_model
from app.config import refuse_impossible
from app.errors import PlanError
from app.job import Job, OwnGpu
from app.memory.allocator import MIB, Settings
from app.memory.event import Books

DEFAULT_GPU = "a100-80gb"
"""The card whose kernels are meant when a job names none."""

HEADER_SECONDS = 8.0
"""Time to count the weights of a checkpoint that cannot be planned."""

_NOT_YET = {
    "strategy": ("single", "several cards are not planned yet", "plan one card's share with strategy single"),
    "gpu_count": (1, "several cards are not planned yet", "set gpu_count to 1"),
    "nodes": (1, "several nodes are not planned yet", "set nodes to 1"),
}


def refuse_unplanned(job: Job) -> None:
    for field, (only, message, hint) in _NOT_YET.items():
        if getattr(job, field) != only:
            raise PlanError(f"`{field}` is {getattr(job, field)!r}: {message}", hint, field)
    if job.attention == "flash_attention_2":
        raise PlanError(
            "flash_attention_2 is a package of its own that is not installed here", "use attention sdpa", "attention"
        )


def card_of(job: Job) -> Gpu | OwnGpu:
    if isinstance(job.gpu, OwnGpu):
        return job.gpu
    return find_gpu(job.gpu or DEFAULT_GPU)


def kernels_of(gpu: Gpu | OwnGpu) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors that are traced for a card; an own card has those of the card that it is
    like, else the default card's."""
    known = gpu if isinstance(gpu, Gpu) else find_gpu(gpu.like or DEFAULT_GPU)
    if known.compute_capability is None:
        raise PlanError(f"{known.name} runs ROCm, whose kernels are not modelled", "choose an NVIDIA card", "gpu")
    return known.compute_capability, known.sm_count or find_gpu(DEFAULT_GPU).sm_count


def config_of(job: Job) -> tuple[dict, dict]:
    """config.json's object, and where it came from."""
    config, source = _config_of(job)
    refuse_impossible(config)
    return config, source


def _config_of(job: Job) -> tuple[dict, dict]:
    if job.config is not None:
        return job.config, {"kind": "inline", "id": None}
    name = job.model
    known = find_model(name)
    if known is not None:
        return dict(known.config), {"kind": "catalogue", "id": known.id}
    for path in (name, os.path.join(name, "config.json")):
        if os.path.isfile(path):
            return _read_file(path), {"kind": "file", "id": path}
    from app.hub import fetch_config

    return fetch_config(name, job.revision)


def with_weights(error: PlanError, job: Job, source: dict) -> PlanError:
    """``error`` about a model, with what its checkpoint weighs where headers of safetensors files can be read."""
    if error.weights is not None or error.field not in ("model", "config") or source["kind"] not in ("hub", "file"):
        return error
    from app.hub import weights_of

    try:
        place = job.model if source["kind"] == "hub" else os.path.dirname(os.path.abspath(source["id"]))
        counted = weights_of(place, source.get("commit"), seconds=HEADER_SECONDS)
    except PlanError:
        return error
    error.weights = {
        **{key: counted[key] for key in ("parameters", "bytes", "by_dtype")},
        "from": "safetensors headers",
    }
    return error


def _read_file(path: str) -> dict:
    size = os.path.getsize(path)
    if size > 4 * MIB:
        raise PlanError(f"{path} has {size} bytes: no config.json is that large", "name the model's own", "model")
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} cannot be read as JSON: {error}", "name a config.json", "model") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path} holds no JSON object", "name a config.json", "model")
    return data


def key_of(job: Job, config: dict, gpu) -> str:
    """Everything that shapes a trace, as one string: the job without what only reads it, the config, the kernels."""
    shape = job.model_dump(exclude={"model", "config", "revision", "gpu", "reserve", "allocator"})
    return json.dumps([shape, config, kernels_of(gpu)], sort_keys=True, default=str)


@lru_cache(maxsize=64)
def trace_of(key: str):
    """The dry run for a key; the last few are kept."""
    from app.dryrun.run import trace

    return _run(trace, key)


@lru_cache(maxsize=128)
def books_of(key: str) -> Books:
    """The books alone for a key, without the tables."""
    from app.dryrun.run import books_of

    return _run(books_of, key)


@lru_cache(maxsize=128)
def finish_of(key: str) -> Books:
    """The books of merging and writing what the job of a key trained."""
    from app.dryrun.finish import finish_books

    return _run(finish_books, key)


@lru_cache(maxsize=512)
def load_of(key: str) -> Books:
    """The books of placing the model of a key alone."""
    from app.dryrun.finish import load_books

    return _run(load_books, key)


def _run(dry_run: Callable, key: str):
    shape, config, (capability, multiprocessors) = json.loads(key)
    job = Job.model_validate({**shape, "config": config})
    return dry_run(job, config, tuple(capability), multiprocessors)


def settings_of(job: Job) -> Settings:
    split = job.allocator.max_split_size_mb
    return Settings(job.allocator.expandable_segments, None if split is None else split * MIB)


@lru_cache(maxsize=1)
def stack() -> dict[str, str]:
    """The versions that a plan is traced with."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
    return {"vramplan": version("vramplan"), **{name: version(name) for name in names}}
