"""The bare model of a config on the meta device: its class, its dtype, its tied weights. No weight exists."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
import warnings

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import build_glob_alternation

from ...errors import PlanError
from ..diagnose import raise_if_ours
from ..sandbox import replaced
from .model_config import AUTO, first_line, read_config, task_of

BUILD_SECONDS = 6.0
"""Time of the processor for a model's modules to be made; the largest published one takes 2 s."""


def bare(config: dict, task: str | None, dtype: str, attention: str | None) -> tuple[torch.nn.Module, str]:
    """The bare model of a config.json on the meta device, and its task (None: its own). Raises :class:`PlanError`."""
    configuration = read_config(config, attention)
    task = task or task_of(configuration)
    return build_base(configuration, task, getattr(torch, dtype)), task


def base_of(config: dict, task: str | None, dtype: str, attention: str | None) -> tuple[torch.nn.Module, str]:
    """The same, for whoever leaves it as it is and runs copies: the last one is kept."""
    return _base_of(json.dumps(config), task, dtype, attention)


@functools.lru_cache(maxsize=1)
def _base_of(config: str, task: str | None, dtype: str, attention: str | None) -> tuple[torch.nn.Module, str]:
    return bare(json.loads(config), task, dtype, attention)


def build_base(config: transformers.PretrainedConfig, task: str, dtype: torch.dtype) -> torch.nn.Module:
    """The bare model on the meta device, weights tied, in ``dtype``."""
    auto = AUTO[task]
    if type(config) not in auto._model_mapping:
        raise PlanError(
            f"transformers has no {auto.__name__} for {config.model_type}", f"its own task is {task_of(config)}", "task"
        )
    try:
        with (
            warnings.catch_warnings(),
            _no_initialisation(),
            empty_parameters(),
            _light_buffers(),
            _LargeTensorsOnMeta(),
        ):
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
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to("meta")
    config = model.config
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if task == "sequence-classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # a tokenizer has one; without it a decoder takes one sequence only
    return model


LARGE = 1 << 20
"""Elements from which on a tensor of a model that is being made need not exist."""


@contextlib.contextmanager
def _light_buffers():
    """Large buffers are of no weight from the moment on in which a module has them, as parameters are: MiniMax-Text-01
    computes 16 MiB in each of 70 layers."""
    register = torch.nn.Module.register_buffer

    def light(module, name, tensor, persistent=True):
        register(module, name, tensor, persistent)
        if tensor is not None and tensor.numel() > LARGE:
            module._buffers[name] = tensor.to("meta")

    with replaced(torch.nn.Module, "register_buffer", light):
        yield


@contextlib.contextmanager
def empty_parameters():
    """``accelerate.init_empty_weights`` for this thread alone: a parameter is on the meta device from the moment on in
    which a module has it (accelerate/big_modeling.py ``init_on_device``)."""
    register = torch.nn.Module.register_parameter

    def empty(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            given = {**parameter.__dict__, "requires_grad": parameter.requires_grad}
            initialized = given.pop("_is_hf_initialized", None)
            module._parameters[name] = type(parameter)(parameter.to("meta"), **given)
            if initialized is not None:
                module._parameters[name]._is_hf_initialized = initialized

    with replaced(torch.nn.Module, "register_parameter", empty):
        yield


class _LargeTensorsOnMeta(TorchFunctionMode):
    """While modules are made: large tensors come to be on the meta device at once (``init_empty_weights`` takes them
    there from the CPU, tens of GB of fused experts too), and a model of too many modules comes to an end."""

    SHAPED = frozenset((torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn))

    def __init__(self) -> None:
        super().__init__()
        self.end = time.thread_time() + BUILD_SECONDS
        self.made = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.SHAPED and kwargs.get("device") is None:
            self.made += 1
            if not self.made % 256 and time.thread_time() > self.end:  # a slow question
                raise PlanError(
                    f"the model has too many modules: after {BUILD_SECONDS:.0f} seconds it is not built",
                    "check the numbers of layers and experts in the config",
                    "config",
                )
            size = kwargs.get("size", args[:1] if func is torch.full else args)
            size = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
            if math.prod(n for n in size if isinstance(n, int)) > LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _keep_in_fp32(model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
    """What ``from_pretrained`` loads in float32 whatever the dtype (``_get_dtype_plan``; core_model_loading.py)."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, _, _ = build_glob_alternation(list(plan))
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.is_floating_point() and pattern.search(f"{path}.{name}"):
                    tensor.data = tensor.data.float()


@contextlib.contextmanager
def _no_initialisation():
    """Weights that do not exist need no initialisation: skip torch.nn.init and transformers' own pass."""
    import torch.nn.init as init

    names = [n for n in dir(init) if n.endswith("_") and not n.startswith("_") and callable(getattr(init, n))]
    with contextlib.ExitStack() as undo:
        for name in names:
            undo.enter_context(replaced(init, name, lambda tensor, *args, **kwargs: tensor))
        undo.enter_context(replaced(transformers.PreTrainedModel, "init_weights", lambda self: None))
        yield
