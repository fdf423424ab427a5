"""The images of a vision-language model: the inputs that its own image processor makes of a blank image.

The processor is the class that transformers names for the config's type, with the job's settings of it, which are those
of the checkpoint's preprocessor_config.json; what they do not say has the sizes in the config, or the class's defaults.
The number of tokens of an image is the number of rows that the model's own ``get_image_features`` returns.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from transformers.models.auto.image_processing_auto import (
    IMAGE_PROCESSOR_MAPPING_NAMES,
    get_image_processor_class_from_name,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from ..errors import PlanError
from ..job import CAPS, Job
from .cuda.card_facts import Card
from .diagnose import raise_if_ours
from .known_values import LIMIT, Images, KnownValues
from .tracker import MemoryTracker

SIDE = 448
"""Pixels of each side of an image whose size the job does not state."""
PIXELS = 1 << 24
"""The most pixels of the images of one sequence. They are made and processed on the host."""


def images_of(model, job: Job, task: str) -> tuple[Images | None, str | None]:
    """The images of a job's sequences, and a sentence that says what is assumed. No images: planned on text alone.

    Raises :class:`PlanError` where the job states images that cannot be planned.
    """
    if task != "image-text-to-text":
        return None, None
    if job.images == 0:
        return None, "planned on text alone: the vision tower is loaded, not run"
    height, width = job.image_size or (SIDE, SIDE)
    count = job.images or 1
    if count * height * width > PIXELS or job.batch_size * (job.sequence_length or 0) > LIMIT:
        reason = (
            f"{count} × {height} × {width} pixels in each of {job.batch_size} sequences are too many to be followed"
        )
        if job.images or job.image_size:
            hint = f"at most {PIXELS} pixels a sequence and {LIMIT} tokens a batch are; set images to 0 for text alone"
            raise PlanError(reason, hint, "images")
        return None, f"{reason}. Planned on text alone: the vision tower is loaded, not run"
    try:
        inputs = _processed(model, job.processor or {}, count, height, width)
        tokens = _tokens(model, inputs, job) // count
    except Exception as error:
        raise_if_ours(error)
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        reason = f"images are not planned for {type(model).__name__}: {text}"
        if job.images or job.image_size:
            raise PlanError(reason, "set images to 0 to plan it on text alone", "images") from None
        return None, f"{reason}. Planned on text alone: the vision tower is loaded, not run"
    needed = count * (tokens + 1) + 1
    sentence = (
        f"{count} image{'s' * (count > 1)} of {height} × {width} pixels in every sequence, {tokens} of its tokens each"
    )
    if needed > (job.sequence_length or 0):
        if job.images or job.image_size:
            raise PlanError(
                f"{sentence}: more than the {job.sequence_length} tokens of a sequence",
                f"set sequence_length to at least {needed}, or images or image_size to less",
                "sequence_length",
            )
        return None, (
            f"planned on text alone: an image of {height} × {width} pixels takes {tokens} tokens, more than "
            f"sequence_length leaves; {needed} hold one"
        )
    return Images(count, tokens, _token(model.config), inputs), f"{sentence} (job fields images and image_size)"


def _processed(model, settings: dict[str, Any], count: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """The tensors that the processor makes of one sequence's images and the model's forward accepts.

    Floating-point tensors are on the meta device: their values do not matter.
    """
    from PIL import Image

    config = model.config
    names = _processor_names(config.model_type)
    if "pil" not in names:
        needs = f"{', '.join(names.values())} needs torchvision" if names else "transformers names none for its type"
        raise PlanError(f"of image processors, {needs}")
    processor = _processor(get_image_processor_class_from_name(names["pil"]), settings)
    _size(processor, config, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = processor(images=[[Image.new("RGB", (width, height))] * count], return_tensors="pt")
    accepted = inspect.signature(type(model).forward).parameters
    return {
        name: value.to("meta") if value.is_floating_point() else value
        for name, value in outputs.items()
        if name in accepted and isinstance(value, torch.Tensor)
    }


def _processor_names(kind: str) -> dict[str, str]:
    """The image processors that transformers names for a model type, or for a type with the same processor."""
    same = [kind, *(k for k, name in PROCESSOR_MAPPING_NAMES.items() if name == PROCESSOR_MAPPING_NAMES.get(kind))]
    return next((IMAGE_PROCESSOR_MAPPING_NAMES[k] for k in same if k in IMAGE_PROCESSOR_MAPPING_NAMES), {})


def _processor(kind: type, settings: dict[str, Any]):
    """A processor of this class with these settings, by ``from_dict`` as from_pretrained makes it.

    A cap in pixels is written into the size, of which the class would otherwise change its own default.
    """
    _refuse_large(settings)
    given = {**settings}
    if not given.keys().isdisjoint(CAPS):
        given["size"] = {**(given.get("size") or getattr(kind, "size", None) or {})}
    return kind.from_dict(given)


def _refuse_large(settings: dict[str, Any]) -> None:
    """Raise :class:`PlanError` for settings that are no sizes, or make larger images than are processed here."""
    size = settings.get("size")
    sizes = {**settings, **size} if isinstance(size, dict) else settings
    for name in ("shortest_edge", "height", "width", "patch_size", *CAPS):
        value = sizes.get(name)
        numbers = value.values() if isinstance(value, dict) else [value]
        if not all(number is None or (isinstance(number, int) and number > 0) for number in numbers):
            raise PlanError(f"`processor`: {name} is {str(value)[:60]}", "give a number of pixels", "processor")
    square = (sizes.get("height") or 0) * (sizes.get("width") or 0)
    if max(sizes.get("min_pixels") or 0, sizes.get("shortest_edge") or 0, square) > PIXELS:
        raise PlanError(f"images of more than {PIXELS} pixels are not processed here", "set smaller sizes", "processor")


def _size(processor, config, stated: dict[str, Any]) -> None:
    """Give the processor the sizes in the vision tower's config, but for those that are ``stated``."""
    vision = getattr(config, "vision_config", config)
    patch = getattr(vision, "patch_size", None)
    merge = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None)
    side = getattr(vision, "image_size", None)
    if isinstance(patch, int) and hasattr(processor, "patch_size") and "patch_size" not in stated:
        whole = patch if hasattr(processor, "merge_size") or merge is None else patch * merge
        processor.patch_size = whole if isinstance(processor.patch_size, int) else {"height": whole, "width": whole}
    if isinstance(merge, int) and hasattr(processor, "merge_size") and "merge_size" not in stated:
        processor.merge_size = merge
    temporal = getattr(vision, "temporal_patch_size", None)
    if isinstance(temporal, int) and hasattr(processor, "temporal_patch_size") and "temporal_patch_size" not in stated:
        processor.temporal_patch_size = temporal
    size = getattr(processor, "size", None)
    if isinstance(side, int) and size is not None and "size" not in stated:
        square = {"height": side, "width": side}
        if getattr(size, "height", None):
            processor.size = type(size)(**square)
        elif getattr(processor, "crop_size", None):
            processor.size = type(size)(shortest_edge=side)
            processor.crop_size = type(size)(**square)


def _tokens(model, inputs: dict[str, torch.Tensor], job: Job) -> int:
    """The number of tokens of one sequence's images: the rows of features that the model inserts for them.

    A model without ``get_image_features`` reads images by cross-attention: then it is 1 for the sequence.
    """
    features = getattr(model, "get_image_features", None)
    if features is None:
        return len(next(iter(inputs.values())))
    values = KnownValues(job.expert_routing)
    accepted = inspect.signature(features).parameters
    accepts_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    tracker = MemoryTracker(Card())
    with torch.no_grad(), tracker, tracker.track_values(values):
        arguments = {}
        for name, tensor in inputs.items():
            if name in accepted or accepts_all:
                arguments[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                if tensor.is_floating_point():
                    arguments[name] = arguments[name].to(model.dtype)
                else:
                    values.set_values(arguments[name], tensor)
        out = features(**arguments, return_dict=True)
    rows = getattr(out, "pooler_output", out)
    rows = rows if isinstance(rows, (list, tuple)) else [rows]
    return sum(part.shape[:-1].numel() for part in rows)


def _token(config) -> int:
    """The id of the token that stands for a part of an image."""
    return getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None) or 0
