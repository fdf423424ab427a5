"""The batch of a job: what the model's own signature and config ask for."""

from __future__ import annotations

import inspect

import torch
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel

from ..errors import PlanError
from ..job import Job
from .known_values import LIMIT, Images
from .observer import StepObserver


def make_batch(tracker: StepObserver, model, job: Job, task: str) -> dict[str, torch.Tensor]:
    """The batch on the device of ``tracker``: the model's inputs, labels if it is trained, and the job's mask.

    Token ids and labels are int64 [B, S], B sequences of S tokens. Packed sequences are one row of all tokens, as the
    collators make it: transformers' ``DataCollatorWithFlattening``, and TRL's, which adds where each sequence begins.

    Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/data/data_collator.py#L1366
    ``DataCollatorWithFlattening``; https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py#L87
    ``DataCollatorForLanguageModeling``.
    """
    b, s = job.batch_size, job.sequence_length
    if s is None and task != "image-classification":
        raise PlanError("this task needs a `sequence_length`", "set sequence_length", "sequence_length")
    batch = _main_inputs(base_of(model).config, job, task, tracker.device)
    if job.packed:
        _refuse_packed(model, tracker, batch)
        batch |= _packed_inputs(tracker, job)
    elif "input_ids" in batch and (
        job.attention_mask != "absent" or job.method == "inference" or job.whose.masks_always
    ):
        batch["attention_mask"] = _empty(tracker.device, b, s)
        if job.method != "inference" and job.whose.masks_always and job.attention_mask == "padded":
            tracker.shifted, tracker.labelled = b * (s - 1), b * (s - 2)  # its collator pads one label a row
    stated = {} if tracker.images is None and tracker.values is None else _stated(model, job, tracker.images)
    for name, value in stated.items():
        if name not in ("input_ids", "attention_mask", "position_ids"):
            dtype = getattr(torch, job.dtype) if value.is_floating_point() else value.dtype
            batch[name] = _empty(tracker.device, *value.shape, dtype=dtype)
    tracker.register_batch(batch, {name: value for name, value in stated.items() if not value.is_floating_point()})
    if job.packed and tracker.device != "meta":
        batch["position_ids"].copy_(_positions(b, s))
    if task == "zero-shot-image-classification":
        batch["return_loss"] = True  # of every text against every image
    if job.packed and job.whose.packs_with_bounds:
        batch |= dict.fromkeys(("max_length_q", "max_length_k"), -(-s // PACKED))
    return batch


def _empty(device: str, *shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=device)


def _main_inputs(config, job: Job, task: str, device: str) -> dict[str, torch.Tensor]:
    """The model's main inputs, and labels.

    A recording is the whole window of the speech encoder: [B, ``num_mel_bins``, 2 × ``max_source_positions`` frames].
    """
    b, s, dtype = job.batch_size, job.sequence_length, getattr(torch, job.dtype)
    if task == "image-classification":
        return {"pixel_values": _pixels(config, b, dtype, device), "labels": _targets(config, b, dtype, device)}
    if task == "zero-shot-image-classification":
        return {"pixel_values": _pixels(config, b, dtype, device), "input_ids": _empty(device, b, s)}
    if task == "speech-seq2seq":
        features = _empty(device, b, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype)
        return {"input_features": features, "labels": _empty(device, b, job.target_length or s)}
    tokens = (1, b * s) if job.packed else (b, s)
    batch = {"input_ids": _empty(device, *tokens)}
    if task == "sequence-classification" and job.method != "inference":
        batch["labels"] = _targets(config, b, dtype, device)
    elif job.method != "inference":
        batch["labels"] = _empty(device, *((b, job.target_length or s) if task == "seq2seq-lm" else tokens))
    return batch


def _packed_inputs(tracker: StepObserver, job: Job) -> dict[str, torch.Tensor]:
    """The inputs that tell packed sequences apart, and TRL's labels: the first of each sequence is ignored."""
    b, s = job.batch_size, job.sequence_length
    batch = {"position_ids": _empty(tracker.device, 1, b * s)}
    if job.whose.packs_with_bounds:
        tracker.shifted, tracker.labelled = b * s - 1, b * s - PACKED * b
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            batch[name] = _empty(tracker.device, PACKED * b + 1, dtype=torch.int32)
        batch["seq_idx"] = _empty(tracker.device, 1, b * s, dtype=torch.int32)
    return batch


def _pixels(config, batch: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Images [B, channels, height, width] of ``config.image_size``, in the dtype of the weights."""
    vision = getattr(config, "vision_config", config)
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return _empty(device, batch, vision.num_channels, height, width, dtype=dtype)


def _targets(config, batch: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """The labels of whole sequences or images: int64 classes, or numbers in the dtype of the weights.

    A regression and a classification with several labels at once need numbers.

    Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/loss/loss_utils.py#L94
    ``ForSequenceClassificationLoss``.
    """
    kind = getattr(config, "problem_type", None) or ("regression" if config.num_labels == 1 else None)
    if kind not in ("regression", "multi_label_classification"):
        return torch.empty(batch, dtype=torch.long, device=device)
    shape = (batch,) if config.num_labels == 1 else (batch, config.num_labels)
    return torch.empty(*shape, dtype=dtype, device=device)


def _refuse_packed(model, tracker: StepObserver, batch: dict) -> None:
    """Raise :class:`PlanError` where the model cannot take packed sequences, which are told apart by positions."""
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
"""The number of packed sequences in each ``sequence_length`` tokens of the job."""


def lengths(length: int) -> list[int]:
    """The lengths of the packed sequences in ``length`` tokens: halves, the longer one first."""
    longest = -(-length // PACKED)
    return [min(longest, length - start) for start in range(0, length, longest)]


def _positions(batch: int, length: int) -> torch.Tensor:
    """The position of each token in its packed sequence. [1, batch × length]"""
    return torch.cat([torch.arange(tokens) for tokens in lengths(length)] * batch)[None]


def base_of(model):
    """The model without PEFT's and DDP's wrappers."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _stated(model, job: Job, images: Images | None) -> dict[str, torch.Tensor]:
    """The values that the job states of its batch, on the CPU, by the name of the model's argument.

    These are the mask, and positions of packed sequences or the inputs of images. Without images all ids are 1.
    """
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
    accepted = inspect.signature(type(base).forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):  # 1 where an image is
        if name in accepted:
            stated[name] = (ids == images.token).long()
    if "cross_attention_mask" in accepted:  # [B, S, images, tiles]
        tiles = next(tensor.shape[2] for tensor in images.inputs.values() if tensor.dim() > 2)
        stated["cross_attention_mask"] = torch.ones(b, s, images.count, tiles, dtype=torch.long)
    return stated
