"""The models that a trainer makes for itself, made without weights: its adapters, its reference, its reward models."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ...job import Job
from ..build.model import build_base
from ..build.model_config import read_config
from ..observer import StepObserver
from ..repeat_layers import copied
from ..sandbox import replaced

REFERENCE = "reference."
REWARD = "reward."
"""How the fqns of their modules begin."""


@contextlib.contextmanager
def made_here(trainer: type, observer: StepObserver, model, base) -> Iterator[None]:
    """While this trainer is made and runs: its adapters are those of ``model``, its reference is a copy of ``base``,
    and a reference pass is a phase of its own."""
    names = {kind.__module__ for kind in trainer.__mro__ if kind.__module__.startswith("trl.")} | {UTILITIES}
    bare = copied(base) if base is model else None
    with contextlib.ExitStack() as undo:
        for module in (sys.modules[name] for name in sorted(names) if name in sys.modules):
            for name, value in _functions(module, observer, model, bare):
                if hasattr(module, name):
                    undo.enter_context(replaced(module, name, value))
        yield


UTILITIES = "trl.experimental.utils"
"""What experimental trainers share."""


def _functions(module, observer: StepObserver, model, bare) -> Iterator[tuple[str, Callable]]:
    """The functions of a trainer's module that are replaced."""

    def reference(*args, **kwargs):
        observer.register_model(bare, REFERENCE)
        return bare.eval()

    yield "get_peft_model", lambda *args, **kwargs: model
    yield "create_model_from_path", reference
    yield "create_reference_model", reference
    yield "hash_module", lambda *args: ""
    yield "empty_cache", lambda: observer.empty_cache()
    if hasattr(module, "disable_gradient_checkpointing"):
        yield "disable_gradient_checkpointing", _as_phase(module.disable_gradient_checkpointing, observer)


def teacher_of(observer: StepObserver, job: Job, model, base) -> torch.nn.Module:
    """The teacher: of the job's ``teacher_model``, a config; without one the model itself, once more."""
    given = job.trainer_args.get("teacher_model")
    with _disable_current_modes():
        if given is None and base is model:
            teacher = copied(base)
        else:
            config = read_config(given, job.attention) if given else copy.deepcopy(base.config)
            teacher = build_base(config, "causal-lm", getattr(torch, job.dtype))
    teacher.config = copy.deepcopy(teacher.config)
    teacher.config.use_cache = True  # nobody trains it: it keeps what configs say
    observer.register_model(teacher, REFERENCE)
    return teacher.requires_grad_(False).eval()


def _as_phase(context: Callable, observer: StepObserver) -> Callable:
    """A context within which the phase is ``reference``."""

    @contextlib.contextmanager
    def entered(*args, **kwargs):
        with observer.during("reference"), context(*args, **kwargs):
            yield

    return entered


def reward_functions(observer: StepObserver, job: Job) -> list[Any]:
    """The job's reward models; without any a function in Python, which takes no memory of the card."""
    configs = job.trainer_args.get("reward_funcs")
    if not configs:
        return [_length]
    return [_reward_model(observer, job, config, number) for number, config in enumerate(configs)]


def _length(completions, **kwargs) -> list[float]:
    return [float(len(completion) % 7) for completion in completions]


def _reward_model(observer: StepObserver, job: Job, config: dict, number: int) -> torch.nn.Module:
    with _disable_current_modes():
        made = read_config({**config, "num_labels": 1}, job.attention)
        caches = getattr(made, "use_cache", None)
        model = build_base(made, "sequence-classification", getattr(torch, job.dtype))
        made.use_cache = caches  # nobody trains it: it keeps what its config says
    observer.register_model(model, f"{REWARD}{number}.")
    return model.eval()


def reward_tokenizers(functions: list, tokenizer) -> list:
    """What each reward function reads its texts with."""
    return [tokenizer if isinstance(function, torch.nn.Module) else None for function in functions]
