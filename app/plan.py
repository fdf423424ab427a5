"""From a job to its profile: the card, the config, and the dry run, kept by everything that shapes it."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version

from app.calibration import kernels_found
from app.catalog.gpus import Gpu, find_gpu
from app.catalog.models import find_model
from app.config import refuse_impossible
from app.errors import PlanError
from app.job import Job, OwnGpu, point_of
from app.memory.allocator import MIB, Settings
from app.memory.kernels import KernelFacts
from app.memory.profile import Profile
from app.memory.script import Script, Stream

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


def kernels_of(gpu: Gpu | OwnGpu) -> tuple[tuple[int, int], int, KernelFacts]:
    """Compute capability and multiprocessors that are traced for a card, and what a probe here found its kernels to do
    otherwise; an own card has those of the card that it is like, else the default card's."""
    known = gpu if isinstance(gpu, Gpu) else find_gpu(gpu.like or DEFAULT_GPU)
    if known.compute_capability is None:
        raise PlanError(f"{known.name} runs ROCm, whose kernels are not modelled", "choose an NVIDIA card", "gpu")
    return known.compute_capability, known.sm_count or find_gpu(DEFAULT_GPU).sm_count, kernels_found(gpu)


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


KEPT = 128
"""Kinds of jobs whose profiles are kept in memory, of each at most ``REGIONS``."""
REGIONS = 32
GENERAL = 3
"""Profiles for all of a kind that are tried."""
_profiles: OrderedDict[str, list[Profile]] = OrderedDict()


def profile_of(job: Job, config: dict, card: Gpu | OwnGpu) -> Profile:
    """A profile that holds for the job (resolved). The first two of a kind get one of their own, the next ones one for
    all that run alike, which takes as long as five; where that holds for few, there is one each again. Raises
    :class:`PlanError`."""
    key = key_of(job, config, card)
    known = _profiles.setdefault(key, [])
    _profiles.move_to_end(key)
    while len(_profiles) > KEPT:
        _profiles.popitem(last=False)
    for profile in known:
        if profile.script.holds(*point_of(job)):
            return profile
    from app.dryrun.run import trace

    general = sum(profile.general for profile in known)
    profile = None
    if len(known) - general >= 2 and general < GENERAL:
        with suppress(PlanError):
            profile = trace(job, config, *kernels_of(card), general=True)
    known.insert(0, profile or trace(job, config, *kernels_of(card)))
    profile = known[0]
    del known[REGIONS:]
    return profile


def key_of(job: Job, config: dict, card: Gpu | OwnGpu) -> str:
    """Everything that shapes a profile, as one string: the job without its batch and length and without what only
    reads a profile, the config, the kernels. More than two accumulated passes are like the second."""
    shape = job.model_dump(
        exclude={"model", "config", "revision", "gpu", "reserve", "allocator", "batch_size", "sequence_length"}
    )
    shape["gradient_accumulation_steps"] = min(job.gradient_accumulation_steps, 2)
    return json.dumps([shape, config, kernels_of(card)], sort_keys=True, default=str)


_streams: OrderedDict[tuple[str, str], Stream | PlanError] = OrderedDict()


def finish_of(job: Job, config: dict, card: Gpu | OwnGpu) -> Stream:
    """Merging and writing what the job trained. Raises :class:`PlanError`."""
    return _stream_of("finish", job, config, card)


def load_of(job: Job, config: dict, card: Gpu | OwnGpu) -> Stream:
    """Placing the job's model alone. Raises :class:`PlanError`."""
    return _stream_of("load", job, config, card)


def _stream_of(part: str, job: Job, config: dict, card: Gpu | OwnGpu) -> Stream:
    key = (part, key_of(job, config, card))
    if key not in _streams:
        from app.dryrun import finish

        run = {"finish": finish.finish_books, "load": finish.load_books}[part]
        try:
            _streams[key] = Script.of(run(job, config, *kernels_of(card)), []).at(1, 1)
        except PlanError as error:
            _streams[key] = error
        while len(_streams) > 4 * KEPT:
            _streams.popitem(last=False)
    found = _streams[key]
    if isinstance(found, PlanError):
        raise found
    return found


def settings_of(job: Job) -> Settings:
    split = job.allocator.max_split_size_mb
    return Settings(job.allocator.expandable_segments, None if split is None else split * MIB)


@lru_cache(maxsize=1)
def stack() -> dict[str, str]:
    """The versions that a plan is traced with."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
    return {"vramplan": version("vramplan"), **{name: version(name) for name in names}}
