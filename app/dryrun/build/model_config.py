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


def read_config(data: dict[str, Any], attention: str | None) -> transformers.PretrainedConfig:
    """A transformers config from config.json's object. Raises :class:`PlanError` where no class is known."""
    kind = data.get("model_type")
    if not isinstance(kind, str):
        raise PlanError("the config has no `model_type`", "send the model's whole config.json", "config")
    kind = equal_type(kind, data)
    if kind is None:
        raise _unknown(data["model_type"], data)
    _check_given(kind, data)
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
    """The model_type that transformers has for a config: its own or, where the code lives in the repository, the one
    under which transformers has the class of the same name (such code often renames a built-in architecture)."""
    if kind in CONFIG_MAPPING:
        return kind
    return _type_of_class(data) if "auto_map" in data else None


def _type_of_class(data: dict[str, Any]) -> str | None:
    named = set(_names_in(data.get("architectures")))
    for auto in AUTO.values():
        for kind, classes in auto._model_mapping._model_mapping.items():
            if named & ({classes} if isinstance(classes, str) else set(classes)):
                return kind
    return None


def _names_in(architectures: Any) -> list[str]:
    return [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []


def _unknown(kind: str, data: dict[str, Any]) -> PlanError:
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


def _check_given(kind: str, data: dict[str, Any]) -> None:
    """A config that states neither its width nor its depth, nor sizes of another making (a few integers beside token
    ids), would be planned with its class's defaults: refuse it."""
    known = CONFIG_MAPPING[kind]
    if getattr(known, "sub_configs", None):
        return  # the parts state theirs
    names = {known.attribute_map.get(name, name) for name in ("hidden_size", "num_hidden_layers")}
    if names & data.keys() or {"hidden_size", "num_hidden_layers"} & data.keys():
        return
    sizes = [key for key, value in data.items() if isinstance(value, (int, list)) and not isinstance(value, bool)]
    if sum(not key.endswith(("_id", "_ids")) and key != "architectures" for key in sizes) < 2:
        raise PlanError(
            f"this {kind} config states no sizes: neither {' nor '.join(sorted(names))}",
            "send the model's whole config.json",
            "config",
        )


_SUFFIXES = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "masked-lm",
    "ForSpeechSeq2Seq": "speech-seq2seq",
}


def task_of(config: transformers.PretrainedConfig) -> str:
    """The task that the config's own architecture was made for."""
    names = _names_in(config.architectures)
    named = [task for name in names for end, task in _SUFFIXES.items() if name.endswith(end)]
    for task in (
        *named,
        "image-text-to-text",
        "zero-shot-image-classification",
        "speech-seq2seq",
        "seq2seq-lm",
        "masked-lm",
        "causal-lm",
        "image-classification",
    ):
        if type(config) in AUTO[task]._model_mapping:
            return task
    raise PlanError(
        f"{(names or [config.model_type])[0][:100]} is made for none of the tasks that are planned: transformers has "
        f"no head for a {config.model_type} in {', '.join(AUTO)}",
        "name a model of one of these tasks",
        "task",
    )


def first_line(error: Exception) -> str:
    """The first line, and what is under it where it ends in a colon (huggingface_hub's validation errors)."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else lines[0] if lines else type(error).__name__
    if isinstance(error, (KeyError, AttributeError, TypeError)):  # of Python's own words: say whose
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        text = f"{'it lacks ' if isinstance(error, KeyError) else ''}{text} (in {frame.f_code.co_name})"
    return text[:300]
