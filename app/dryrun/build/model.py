"""The bare model of a config on the meta device: its class, its dtype, its tied weights. No weight exists."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import build_glob_alternation

from ...errors import PlanError
from ..diagnose import raise_if_ours
from ..sandbox import replaced
from .model_config import AUTO, first_line, read_config, task_of

BUILD_SECONDS = 6.0
"""Processor time in which a model's modules must be made. The largest published model takes 2 s."""
LARGE = 1 << 20
"""Elements from which on a tensor is made on the meta device at once, while a model is built."""


def bare(config: dict, task: str | None, dtype: str, attention: str | None) -> tuple[torch.nn.Module, str]:
    """The bare model of a config.json on the meta device, and its task (None: the config's own).

    Raises :class:`PlanError`.
    """
    configuration = read_config(config, attention)
    task = task or task_of(configuration)
    return build_base(configuration, task, getattr(torch, dtype)), task


def base_of(config: dict, task: str | None, dtype: str, attention: str | None) -> tuple[torch.nn.Module, str]:
    """As :func:`bare`, but the last model is kept and given out again: run copies of it, and change nothing."""
    return _base_of(json.dumps(config), task, dtype, attention)


@functools.lru_cache(maxsize=1)
def _base_of(config: str, task: str | None, dtype: str, attention: str | None) -> tuple[torch.nn.Module, str]:
    return bare(json.loads(config), task, dtype, attention)


def build_base(config: transformers.PretrainedConfig, task: str, dtype: torch.dtype) -> torch.nn.Module:
    """The bare model on the meta device, weights tied, in ``dtype``. Raises :class:`PlanError`."""
    auto = AUTO[task]
    if type(config) not in auto._model_mapping:
        raise PlanError(
            f"transformers has no {auto.__name__} for {config.model_type}", f"its own task is {task_of(config)}", "task"
        )
    try:
        with warnings.catch_warnings(), _without_storage():
            warnings.simplefilter("ignore")
            model = auto.from_config(config, dtype=dtype)
    except PlanError:
        raise
    except Exception as error:
        raise_if_ours(error)
        raise PlanError(
            f"transformers cannot build this {config.model_type} model: {first_line(error)}",
            "check the sizes in the config",
            "config",
        ) from None
    _keep_in_fp32(model, dtype)
    model.tie_weights()
    _move_buffers(model)
    _configure(model.config, task)
    return model


@contextlib.contextmanager
def _without_storage() -> Iterator[None]:
    """While a model is built: what it is made of needs next to no memory, and is not initialised."""
    with _no_initialisation(), empty_parameters(), _large_buffers_on_meta(), _LargeTensorsOnMeta():
        yield


def _move_buffers(model: torch.nn.Module) -> None:
    """Move the small buffers to the meta device too, now that they are computed."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to("meta")


def _configure(config: transformers.PretrainedConfig, task: str) -> None:
    """Set what a training script sets: no cache, and a padding token where the class of a sequence is asked for."""
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if task == "sequence-classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # a tokenizer has one; without it a decoder takes one sequence only


@contextlib.contextmanager
def _large_buffers_on_meta() -> Iterator[None]:
    """A large buffer is on the meta device as soon as a module has it. MiniMax-Text-01 computes 16 MiB in 70 layers."""
    register = torch.nn.Module.register_buffer

    def register_buffer(
        module: torch.nn.Module, name: str, tensor: torch.Tensor | None, persistent: bool = True
    ) -> None:
        register(module, name, tensor, persistent)
        if tensor is not None and tensor.numel() > LARGE:
            module._buffers[name] = tensor.to("meta")

    with replaced(torch.nn.Module, "register_buffer", register_buffer):
        yield


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """A parameter is on the meta device as soon as a module has it: ``init_empty_weights``, for this thread alone.

    Source: https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/big_modeling.py#L98
    ``init_on_device``.
    """
    register = torch.nn.Module.register_parameter

    def register_parameter(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            given = {**parameter.__dict__, "requires_grad": parameter.requires_grad}
            initialized = given.pop("_is_hf_initialized", None)
            module._parameters[name] = type(parameter)(parameter.to("meta"), **given)
            if initialized is not None:
                module._parameters[name]._is_hf_initialized = initialized

    with replaced(torch.nn.Module, "register_parameter", register_parameter):
        yield


class _LargeTensorsOnMeta(TorchFunctionMode):
    """While modules are made: large tensors are made on the meta device, and it ends after :data:`BUILD_SECONDS`.

    Without it they are made on the CPU first, tens of GB of fused experts too, and moved by :func:`empty_parameters`.
    """

    SHAPED = frozenset((torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn))
    """The functions whose first arguments, or ``size``, are a shape."""
    CHECKED_EVERY = 256
    """Tensors that are made between two looks at the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.end = time.thread_time() + BUILD_SECONDS
        self.made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's result; for large tensors with ``device="meta"``."""
        kwargs = kwargs or {}
        if func in self.SHAPED and kwargs.get("device") is None:
            self._check_time()
            shape = kwargs.get("size", args[:1] if func is torch.full else args)
            shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
            if math.prod(n for n in shape if isinstance(n, int)) > LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)

    def _check_time(self) -> None:
        self.made += 1
        if not self.made % self.CHECKED_EVERY and time.thread_time() > self.end:
            raise PlanError(
                f"the model has too many modules: after {BUILD_SECONDS:.0f} seconds it is not built",
                "check the numbers of layers and experts in the config",
                "config",
            )


def _keep_in_fp32(model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast to float32 what ``from_pretrained`` loads in float32 whatever the dtype.

    Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/modeling_utils.py#L3760
    ``_get_dtype_plan``.
    """
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, _, _ = build_glob_alternation(list(plan))
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_floating_point() and pattern.search(f"{path}.{name}"):
                tensor.data = tensor.data.float()


@contextlib.contextmanager
def _no_initialisation() -> Iterator[None]:
    """Weights that do not exist need no initialisation: skip ``torch.nn.init`` and transformers' own pass."""
    import torch.nn.init as init

    names = [n for n in dir(init) if n.endswith("_") and not n.startswith("_") and callable(getattr(init, n))]
    with contextlib.ExitStack() as undo:
        for name in names:
            undo.enter_context(replaced(init, name, lambda tensor, *args, **kwargs: tensor))
        undo.enter_context(replaced(transformers.PreTrainedModel, "init_weights", lambda self: None))
        yield
