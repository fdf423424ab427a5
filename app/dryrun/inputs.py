"""The batch of a job: what the model's own signature and config ask for."""

from __future__ import annotations

import inspect

import torch
from peft import PeftModel

from ..errors import PlanError
from ..job import Job
from ..registry.trainers import TRAINERS
from .known_values import LIMIT, Images
from .observer import StepObserver


def make_batch(tracker: StepObserver, model, job: Job, task: str) -> dict[str, torch.Tensor]:
    """The batch on the card: what the model's main input is, labels to train on, and the mask that the job asks for.

    Token ids and labels are int64, but for a model that is fitted to numbers (:func:`_targets`). Packed sequences are
    one row of all tokens, as transformers' ``DataCollatorWithFlattening`` and TRL's own collator make it; TRL's adds
    where each sequence begins. An image is ``config.image_size`` large, in the dtype of the weights, or what the
    model's image processor makes of it; a recording is the whole window of the speech encoder: ``num_mel_bins`` by
    twice ``max_source_positions`` frames.
    """
    config, b, s = model.config, job.batch_size, job.sequence_length
    if s is None and task != "image-classification":
        raise PlanError("this task needs a `sequence_length`", "set sequence_length", "sequence_length")
    dtype = getattr(torch, job.dtype)

    def empty(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=tracker.device)

    def pixels() -> torch.Tensor:
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return empty(b, vision.num_channels, height, width, dtype=dtype)

    if task == "image-classification":
        batch = {"pixel_values": pixels(), "labels": _targets(config, b, dtype, tracker.device)}
    elif task == "zero-shot-image-classification":
        batch = {"pixel_values": pixels(), "input_ids": empty(b, s)}
    elif task == "speech-seq2seq":
        features = empty(b, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype)
        batch = {"input_features": features, "labels": empty(b, job.target_length or s)}
    else:
        tokens = (1, b * s) if job.packed else (b, s)
        batch = {"input_ids": empty(*tokens)}
        if task == "sequence-classification" and job.method != "inference":
            batch["labels"] = _targets(config, b, dtype, tracker.device)
        elif job.method != "inference":
            batch["labels"] = empty(b, job.target_length or s) if task == "seq2seq-lm" else empty(*tokens)
    masked = job.attention_mask != "absent" or job.method == "inference" or TRAINERS[job.trainer].masks_always
    if job.packed:
        _refuse_packed(model, tracker, batch)
        batch["position_ids"] = empty(1, b * s)
        if TRAINERS[job.trainer].packs_with_bounds:
            tracker.shifted, tracker.labelled = b * s - 1, b * s - PACKED * b
            batch |= {name: empty(PACKED * b + 1, dtype=torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
            batch["seq_idx"] = empty(1, b * s, dtype=torch.int32)
    elif "input_ids" in batch and masked:
        batch["attention_mask"] = empty(b, s)
    stated = {} if tracker.images is None and tracker.values is None else _stated(model, job, tracker.images)
    for name, value in stated.items():
        if name not in ("input_ids", "attention_mask", "position_ids"):
            batch[name] = empty(*value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
    tracker.register_batch(batch, {name: value for name, value in stated.items() if not value.is_floating_point()})
    if job.packed and tracker.device != "meta":
        batch["position_ids"].copy_(_positions(b, s))
    if task == "zero-shot-image-classification":
        batch["return_loss"] = True  # of every text against every image
    if job.packed and TRAINERS[job.trainer].packs_with_bounds:
        batch |= dict.fromkeys(("max_length_q", "max_length_k"), -(-s // PACKED))
    return batch


def _targets(config, batch: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """The labels of whole sequences or images: their classes; numbers in the dtype of the weights, as the loss of a
    regression and of several labels at once needs them (transformers/loss/loss_utils.py
    ``ForSequenceClassificationLoss``)."""
    kind = getattr(config, "problem_type", None) or ("regression" if config.num_labels == 1 else None)
    if kind not in ("regression", "multi_label_classification"):
        return torch.empty(batch, dtype=torch.long, device=device)
    shape = (batch,) if config.num_labels == 1 else (batch, config.num_labels)
    return torch.empty(*shape, dtype=dtype, device=device)


def _refuse_packed(model, tracker: StepObserver, batch: dict) -> None:
    """Sequences are packed by their positions, as TRL's and transformers' collators without padding do."""
    base = base_of(model)
    if "input_ids" not in batch or "position_ids" not in inspect.signature(type(base).forward).parameters:
        reason = "takes no position_ids"
    elif batch["labels"].shape != batch["input_ids"].shape:
        reason = "answers once a row"
    elif tracker.images is not None:
        reason = "finds its positions by its images"
    else:
        return
    raise PlanError(
        f"sequences cannot be packed for {type(base).__name__}, which {reason}",
        "set attention_mask to full or padded",
        "attention_mask",
    )


PACKED = 2
"""Sequences that are packed into as many tokens as the job's ``sequence_length``."""


def lengths(length: int) -> list[int]:
    """How long they are."""
    longest = -(-length // PACKED)
    return [min(longest, length - start) for start in range(0, length, longest)]


def _positions(batch: int, length: int) -> torch.Tensor:
    """Of each token in its sequence, one row."""
    return torch.cat([torch.arange(own) for own in lengths(length)] * batch)[None]


def base_of(model):
    """The model itself, without PEFT's around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _stated(model, job: Job, images: Images | None) -> dict[str, torch.Tensor]:
    """What the job says of its batch: the ids with the images' tokens, what the processor makes of them, the mask."""
    b, s = job.batch_size, job.sequence_length or 1
    if b * s > LIMIT:
        return {}
    base = base_of(model)
    mask = torch.ones(b, s, dtype=torch.long)
    mask[-1, -1] = int(job.attention_mask != "padded")
    if images is None:
        tokens = (1, b * s) if job.packed else (b, s)
        ids = torch.ones(*tokens, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(b, s)}
    ids = images.ids(s).expand(b, s)
    stated = {"input_ids": ids, "attention_mask": mask, **images.of(b)}
    taken = inspect.signature(type(base).forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):  # 1 where an image is
        if name in taken:
            stated[name] = (ids == images.token).long()
    if "cross_attention_mask" in taken:  # of every token, image and tile
        tiles = next(tensor.shape[2] for tensor in images.inputs.values() if tensor.dim() > 2)
        stated["cross_attention_mask"] = torch.ones(b, s, images.count, tiles, dtype=torch.long)
    return stated
