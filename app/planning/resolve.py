"""The card, the config, the shape point and the allocator settings of a job; jobs that are not planned are refused."""

from __future__ import annotations

import json
import os

from ..catalog.gpus import Gpu, find_gpu
from ..catalog.models import find_model
from ..errors import PlanError
from ..job import CAPS, Job, OwnGpu, point_of
from ..memory.allocator.config import MIB, AllocatorConfig
from ..memory.kernel_facts import KernelFacts
from ..memory.sizes import ShapePoint
from ..registry.strategies import STRATEGIES
from .calibration import kernels_found
from .config_limits import refuse_impossible

Kernels = tuple[tuple[int, int], int, KernelFacts]
"""A card's compute capability, its number of multiprocessors, and what a probe found its kernels to do otherwise."""
DEFAULT_GPU = "a100-80gb"
"""The card whose kernels are meant when a job names none."""

CONFIG_BYTES = 4 * MIB
"""Bytes of the largest config.json that is read from a file."""
HEADER_SECONDS = 8.0
"""Time to count the weights of a checkpoint that cannot be planned."""


def refuse_unplanned(job: Job) -> None:
    """Raise :class:`PlanError` for what a job can say and nothing here plans."""
    strategy = STRATEGIES[job.strategy]
    if strategy.refusal is not None:
        raise PlanError(f"`strategy` is {job.strategy!r}: {strategy.refusal}", strategy.hint, "strategy")
    if job.attention == "flex_attention" and job.method == "inference":
        raise PlanError("decoding with flex_attention is not modelled", "use attention sdpa", "attention")
    if job.attention == "flash_attention_2":
        raise PlanError(
            "flash_attention_2 is a package of its own that is not installed here", "use attention sdpa", "attention"
        )


def card_of(job: Job) -> Gpu | OwnGpu:
    """The card that a job names, else the default one."""
    if isinstance(job.gpu, OwnGpu):
        return job.gpu
    return find_gpu(job.gpu or DEFAULT_GPU)


def chip_of(gpu: Gpu | OwnGpu) -> tuple[tuple[int, int], int]:
    """The compute capability and the number of multiprocessors that are traced for a card. A card of the user's own has
    those of the card that it is ``like``, else the default card's. Raises :class:`PlanError`."""
    known = gpu if isinstance(gpu, Gpu) else find_gpu(gpu.like or DEFAULT_GPU)
    if known.compute_capability is None:
        raise PlanError(f"{known.name} runs ROCm, whose kernels are not modelled", "choose an NVIDIA card", "gpu")
    multiprocessors = known.sm_count or find_gpu(DEFAULT_GPU).sm_count
    assert multiprocessors is not None
    return known.compute_capability, multiprocessors


def kernels_of(gpu: Gpu | OwnGpu) -> Kernels:
    """:func:`chip_of`, and what a probe here found the card's kernels to do otherwise."""
    return *chip_of(gpu), kernels_found(gpu)


def shape_point_of(job: Job, card: Gpu | OwnGpu) -> ShapePoint:
    """The batch, the length and the multiprocessors of a job (resolved) on a card."""
    return ShapePoint(*point_of(job), chip_of(card)[1])


def config_of(job: Job) -> tuple[dict, dict]:
    """The object of config.json, and where it came from."""
    config, source = _config_of(job)
    refuse_impossible(config)
    return config, source


PREPROCESSOR = "preprocessor_config.json"


def with_processor(job: Job, config: dict, source: dict) -> Job:
    """The job with its model's own settings of an image processor: the catalogue's, the folder's, the repository's.

    A job that gives all of them, or whose model reads no images, stays as it is. Raises :class:`PlanError`.
    """
    given = job.processor
    if not ("vision_config" in config or find_model(job.model or "")) or (given and not given.keys() <= set(CAPS)):
        return job
    own = _own_processor(job, source)
    return job.model_copy(update={"processor": {**own, **(given or {})}}) if own else job


def _own_processor(job: Job, source: dict) -> dict | None:
    """The model's own preprocessor_config.json; None: it has none."""
    if source["kind"] == "catalogue":
        known = find_model(source["id"])
        return known.processor if known is not None else None
    if source["kind"] == "file":
        path = os.path.join(os.path.dirname(source["id"]), PREPROCESSOR)
        return _read_file(path) if os.path.isfile(path) else None
    if source["kind"] == "hub":
        from ..hub.config_file import fetch_optional

        return fetch_optional(source["id"], PREPROCESSOR, source["commit"])
    return None


def resolved(job: Job) -> Job:
    """The job with every null replaced by what the stack would do with its model."""
    config, source = config_of(job)
    return with_processor(job, config, source).resolved(config)


def _config_of(job: Job) -> tuple[dict, dict]:
    if job.config is not None:
        return job.config, {"kind": "inline", "id": None}
    name = job.model
    assert name is not None  # a job has one of the two
    known = find_model(name)
    if known is not None:
        return dict(known.config), {"kind": "catalogue", "id": known.id}
    for path in (name, os.path.join(name, "config.json")):
        if os.path.isfile(path):
            return _read_file(path), {"kind": "file", "id": path}
    from ..hub.config_file import fetch_config

    return fetch_config(name, job.revision)


def with_checkpoint_weights(error: PlanError, job: Job, source: dict) -> PlanError:
    """``error`` about a model, with what its checkpoint weighs where headers of safetensors files can be read."""
    if error.weights is not None or error.field not in ("model", "config") or source["kind"] not in ("hub", "file"):
        return error
    from ..hub.checkpoint_weights import weights_of

    try:
        place = source["id"] if source["kind"] == "hub" else os.path.dirname(os.path.abspath(source["id"]))
        counted = weights_of(place, source.get("commit"), seconds=HEADER_SECONDS)
    except PlanError:
        return error
    error.weights = {
        **{key: counted[key] for key in ("parameters", "bytes", "by_dtype")},
        "from": "safetensors headers",
    }
    return error


def _read_file(path: str) -> dict:
    try:
        text = _bytes_of(path)
        if len(text) > CONFIG_BYTES:
            raise PlanError(
                f"{path} has more than {CONFIG_BYTES} bytes: no config.json is that large",
                "name the model's own",
                "model",
            )
        data = json.loads(text.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} cannot be read as JSON: {error}", "name a config.json", "model") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path} holds no JSON object", "name a config.json", "model")
    return data


def _bytes_of(path: str) -> bytes:
    """The first bytes of a file, one more than a config may have. A file of /proc that has nothing to say now raises
    :class:`OSError`, instead of waiting."""
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb", buffering=0) as file:
        text = b""
        while len(text) <= CONFIG_BYTES:
            part = file.read(CONFIG_BYTES + 1 - len(text))
            if part is None:
                raise OSError("it does not end")
            if not part:
                break
            text += part
        return text


def allocator_config_of(job: Job) -> AllocatorConfig:
    """The allocator's settings that a job names."""
    split = job.allocator.max_split_size_mb
    return AllocatorConfig(job.allocator.expandable_segments, None if split is None else split * MIB)
