"""The PEFT config of a job: LoRA's with any of its arguments, or that of another method, by PEFT's own names."""

from __future__ import annotations

import dataclasses
import difflib
import inspect

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ...errors import PlanError
from ...job import Job, Lora

TASKS = {
    "causal-lm": "CAUSAL_LM",
    "image-text-to-text": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}
"""PEFT's names of tasks."""
_RENAMED = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
_OF_GET_PEFT_MODEL = frozenset({"autocast_adapter_dtype"})
"""Arguments of ``get_peft_model``, not of a config."""


def config_of(job: Job, task: str) -> peft.PeftConfig:
    """Raises :class:`PlanError` for a method or an argument that PEFT does not know."""
    if job.adapter is not None:
        return _other(job.adapter, task)
    return _lora(job.lora, task)


def casts_to_float32(job: Job) -> bool:
    """``get_peft_model``'s ``autocast_adapter_dtype``: adapters in 16 bit become float32."""
    given = job.adapter or (job.lora.model_extra if job.lora else None) or {}
    return bool(given.get("autocast_adapter_dtype", True))


def _lora(lora: Lora, task: str) -> peft.PeftConfig:
    given = lora.model_dump()
    arguments = {_RENAMED.get(name, name): value for name, value in given.items() if name not in _OF_GET_PEFT_MODEL}
    targets = arguments["target_modules"]
    arguments["target_modules"] = list(targets) if isinstance(targets, tuple) else targets
    arguments["modules_to_save"] = list(lora.modules_to_save) or None
    return _made(peft.LoraConfig, {"task_type": TASKS.get(task), **arguments}, "lora")


def _other(adapter: dict, task: str) -> peft.PeftConfig:
    kinds = {kind.value: made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = adapter.get("peft_type")
    if kind not in kinds:
        near = difflib.get_close_matches(str(kind).upper(), kinds, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the methods are {', '.join(sorted(kinds))}"
        raise PlanError(f"PEFT has no method {kind!r}", hint, "adapter")
    given = {name: value for name, value in adapter.items() if name not in {"peft_type"} | _OF_GET_PEFT_MODEL}
    return _made(kinds[kind], {"task_type": TASKS.get(task), **given}, "adapter")


def _made(kind: type, arguments: dict, field: str) -> peft.PeftConfig:
    known = {entry.name for entry in dataclasses.fields(kind)} & inspect.signature(kind).parameters.keys()
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"see peft.{kind.__name__}"
            raise PlanError(f"{kind.__name__} has no argument {name!r}", hint, field)
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{kind.__name__} refuses: {str(error).splitlines()[0]}", f"change {field}", field) from None
