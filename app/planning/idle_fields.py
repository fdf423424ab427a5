"""The fields of a job that somebody set and that cost no memory: each is said, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..job import Job

TWO_LENGTHS = ("seq2seq-lm", "speech-seq2seq")
"""Tasks of models with a decoder beside the encoder."""
_TRAINS_NOTHING = "inference trains nothing"
_OF_TRAINING = (
    "optimizer",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "trainer",
    "trainer_args",
    "objective",
    "prompt_length",
    "completion_length",
)

Reason = Callable[[Job, Mapping[str, Any]], str | None]
"""Why a field of a job costs no memory, by the job and the facts of its profile; None: it may."""


def _training(job: Job, facts: Mapping[str, Any]) -> str | None:
    return _TRAINS_NOTHING if job.method == "inference" else None


def _target_length(job: Job, facts: Mapping[str, Any]) -> str | None:
    return None if facts["task"] in TWO_LENGTHS else f"{facts['class']} has one length: sequence_length"


def _new_tokens(job: Job, facts: Mapping[str, Any]) -> str | None:
    return None if job.method == "inference" else "a training step generates none"


def _images(job: Job, facts: Mapping[str, Any]) -> str | None:
    return None if facts["task"] == "image-text-to-text" else f"{facts['class']} reads text alone"


def _sequence_length(job: Job, facts: Mapping[str, Any]) -> str | None:
    return "an image classifier has no tokens of text" if facts["task"] == "image-classification" else None


_REASONS: dict[str, Reason] = {
    **dict.fromkeys(_OF_TRAINING, _training),
    "target_length": _target_length,
    "new_tokens": _new_tokens,
    "images": _images,
    "image_size": _images,
    "processor": _images,
    "sequence_length": _sequence_length,
}
"""By field. A field that is not here changes what runs, or is refused where it cannot."""
ROUTED = "which experts the router chooses"
"""Words of the warning of a profile that depends on ``expert_routing``."""


def idle_fields(job: Job, facts: Mapping[str, Any], warnings: list[str]) -> list[str]:
    """A sentence for each field that is set in ``job`` (as it was asked) and changes nothing. ``facts`` and
    ``warnings`` are those of its profile."""
    found = {field: reason(job, facts) for field, reason in _REASONS.items() if _is_set(job, field)}
    if _is_set(job, "expert_routing") and not any(ROUTED in warning for warning in warnings):
        found["expert_routing"] = "nothing that runs depends on a router's choice"
    return [f"{field} costs no memory here: {reason}" for field, reason in found.items() if reason]


def _is_set(job: Job, field: str) -> bool:
    return field in job.model_fields_set and getattr(job, field) not in (None, type(job).model_fields[field].default)
