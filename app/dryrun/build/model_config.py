"""A model's config.json as transformers reads it, and the task that it was made for."""

from __future__ import annotations

import copy
import difflib
import io
import sys
import traceback
import warnings
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...errors import PlanError
from ...registry.tasks import named_tasks, names_in
from ..diagnose import raise_if_ours
from ..sandbox import replaced

AUTO = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "image-classification": transformers.AutoModelForImageClassification,
    "image-text-to-text": transformers.AutoModelForImageTextToText,
    "speech-seq2seq": transformers.AutoModelForSpeechSeq2Seq,
    "zero-shot-image-classification": transformers.AutoModelForZeroShotImageClassification,
}
"""The class that builds a model, by the job's task."""


def read_config(data: dict[str, Any], attention: str | None) -> transformers.PretrainedConfig:
    """A transformers config from config.json's object. ``attention``: its ``attn_implementation``, None: the default.

    Raises :class:`PlanError` where transformers has no class for it, or its class does not accept it.
    """
    named = data.get("model_type")
    if not isinstance(named, str):
        raise PlanError("the config has no `model_type`", "send the model's whole config.json", "config")
    kind = equal_type(named, data)
    if kind is None:
        raise _unknown_type(named, data)
    _refuse_without_sizes(kind, data)
    data = {key: value for key, value in copy.deepcopy(data).items() if key != "model_type"}
    try:
        with warnings.catch_warnings(), replaced(sys, "stderr", io.StringIO()):
            warnings.simplefilter("ignore")
            config = CONFIG_MAPPING[kind].from_dict(data)
    except Exception as error:
        raise_if_ours(error)
        raise PlanError(
            f"transformers does not accept this {kind} config: {first_line(error)}", "check its fields", "config"
        ) from None
    if attention is not None:
        config._attn_implementation = attention
    return config


def equal_type(kind: str, data: dict[str, Any]) -> str | None:
    """The model_type under which transformers knows a config; None: it does not.

    That is the config's own type. Where the model's code lives in its repository, it is the type of the built-in class
    that has the name of the class there: such code often is a built-in architecture under another type.
    """
    if kind in CONFIG_MAPPING:
        return kind
    return _type_of_class(data) if "auto_map" in data else None


def _type_of_class(data: dict[str, Any]) -> str | None:
    """The model_type of the first class that the config's ``architectures`` name and transformers has."""
    named = set(names_in(data.get("architectures")))
    for auto in AUTO.values():
        for kind, classes in auto._model_mapping._model_mapping.items():
            if named & ({classes} if isinstance(classes, str) else set(classes)):
                return kind
    return None


def _unknown_type(kind: str, data: dict[str, Any]) -> PlanError:
    """The error for a type that transformers does not have."""
    near = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), 1, 0.75)
    like = _type_of_class(data)
    if "auto_map" in data or not (near or like):
        hint = (
            "code that lives in a model's repository is never run: its weights can be counted, its activations not; "
            "plan a model of a built-in architecture and its size"
        )
    elif like is not None:
        hint = f"did you mean {like!r}? That is the type of the class that the config names"
    else:
        hint = f"did you mean {near[0]!r}?"
    return PlanError(f"transformers {transformers.__version__} has no model_type {kind[:100]!r}", hint, "config")


_SIZES_AT_LEAST = 2
"""Integers beside token ids that a config must have where it states neither width nor depth by their usual names."""


def _refuse_without_sizes(kind: str, data: dict[str, Any]) -> None:
    """Raise :class:`PlanError` for a config that states no sizes: it would be planned with its class's defaults."""
    known = CONFIG_MAPPING[kind]
    if getattr(known, "sub_configs", None):
        return  # the parts state theirs
    names = {known.attribute_map.get(name, name) for name in ("hidden_size", "num_hidden_layers")}
    if names & data.keys() or {"hidden_size", "num_hidden_layers"} & data.keys():
        return
    sizes = [key for key, value in data.items() if isinstance(value, (int, list)) and not isinstance(value, bool)]
    if sum(not key.endswith(("_id", "_ids")) and key != "architectures" for key in sizes) < _SIZES_AT_LEAST:
        raise PlanError(
            f"this {kind} config states no sizes: neither {' nor '.join(sorted(names))}",
            "send the model's whole config.json",
            "config",
        )


_TASKS_TRIED = (
    "image-text-to-text",
    "zero-shot-image-classification",
    "speech-seq2seq",
    "seq2seq-lm",
    "masked-lm",
    "causal-lm",
    "image-classification",
)
"""Otherwise: the first of these tasks in which transformers has a class for the config."""


def task_of(config: transformers.PretrainedConfig) -> str:
    """The task that the config's own architecture was made for. Raises :class:`PlanError` where it is none of them."""
    names = names_in(config.architectures)
    for task in (*named_tasks(config.architectures), *_TASKS_TRIED):
        if type(config) in AUTO[task]._model_mapping:
            return task
    raise PlanError(
        f"{(names or [config.model_type])[0][:100]} is made for none of the tasks that are planned: transformers has "
        f"no head for a {config.model_type} in {', '.join(AUTO)}",
        "name a model of one of these tasks",
        "task",
    )


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its first two where the first ends in a colon (huggingface_hub's errors).

    Of an error that Python raised itself, with the function that raised it. 300 characters at most.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else lines[0] if lines else type(error).__name__
    if isinstance(error, (KeyError, AttributeError, TypeError)):
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        text = f"{'it lacks ' if isinstance(error, KeyError) else ''}{text} (in {frame.f_code.co_name})"
    return text[:300]
