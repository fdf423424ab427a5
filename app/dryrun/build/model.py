"""Build the job's model on the meta device: class, dtype, quantised layout, checkpointing, adapters.

The order is the order of a training script: from_pretrained, quantised as it loads, prepare_model_for_kbit_training,
get_peft_model. Nothing is downloaded and no weight exists.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import io
import json
import math
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from accelerate import init_empty_weights
from bitsandbytes.functional import QuantState
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import build_glob_alternation
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, _assign_is_quantized

from ...errors import PlanError
from ...job import Job
from ..tracker import MemoryTracker, canonical_fqn

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
PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "image-text-to-text": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}
BUILD_SECONDS = 6.0
"""Time of the processor for a model's modules to be made; the largest published one takes 2 s."""


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
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            config = CONFIG_MAPPING[kind].from_dict(data)
    except Exception as error:
        raise PlanError(
            f"transformers does not accept this {kind} config: {_first_line(error)}", "check its fields", "config"
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
            init_empty_weights(),
            _light_buffers(),
            _LargeTensorsOnMeta(),
        ):
            warnings.simplefilter("ignore")
            model = auto.from_config(config, dtype=dtype)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"transformers cannot build this {config.model_type} model: {_first_line(error)}",
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

    torch.nn.Module.register_buffer = light
    try:
        yield
    finally:
        torch.nn.Module.register_buffer = register


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
    saved = {name: getattr(init, name) for name in names}
    pass_ = transformers.PreTrainedModel.init_weights
    try:
        for name in names:
            setattr(init, name, lambda tensor, *args, **kwargs: tensor)
        transformers.PreTrainedModel.init_weights = lambda self: None
        yield
    finally:
        transformers.PreTrainedModel.init_weights = pass_
        for name, function in saved.items():
            setattr(init, name, function)


class MetaWeights:
    """Weights on the meta device: entered in the tracker in the order in which a card would be asked for them.

    The probe has another with the same methods (``app/probe/weights.py``), which makes them on a card.
    """

    device = "meta"

    def quantized(self, linear: torch.nn.Linear, job: Job, path: str, tracker: MemoryTracker) -> torch.nn.Module:
        """``linear`` in bitsandbytes' layout: it arrives in the load dtype, is quantised there and dropped."""
        dtype = getattr(torch, job.dtype)
        arriving = tracker.record_alloc(linear.weight.numel() * dtype.itemsize, path, "weights", "load")
        if job.quantization.type == "int8":
            new = _int8(linear, path, tracker)
        else:
            new = _four_bit(linear, job.quantization, dtype, path, tracker)
        tracker.record_free(arriving)
        return new

    def allocate(self, model: torch.nn.Module, tracker: MemoryTracker) -> None:
        """Everything else, module by module: parameters, then buffers."""
        for path, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    tracker.register_existing(parameter, path, "weights")
            for buffer in module._buffers.values():
                if buffer is not None:
                    tracker.register_existing(buffer, path, "buffers")

    def adapted(self, model: torch.nn.Module, job: Job, task: str, tracker: MemoryTracker) -> torch.nn.Module:
        with _magnitudes_entered(model, tracker):
            model = adapt(model, job, task, self.device)
        _own_adapters(model, tracker)
        return model

    def cast_by_trl(self, model: torch.nn.Module, tracker: MemoryTracker) -> None:
        """``SFTTrainer.__init__`` of a quantised model: adapters in bf16, after the QLoRA paper."""
        tracker.mark("load", 0, "adapters")
        with tracker.watching(model):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_magnitude_vector" not in name:
                    parameter.data = parameter.data.to(torch.bfloat16)


def load(model: torch.nn.Module, job: Job, task: str, tracker: MemoryTracker, weights: MetaWeights) -> torch.nn.Module:
    """Place the ``weights`` and make the model ready: quantised layout, checkpointing, adapters, mode.

    ``job`` is resolved. In the order in which a loader that fills the card module by module asks for memory:
    what is quantised; then everything else; then what PEFT casts and adds. The cache is emptied before the first step.
    """
    tracker.mark("load", 0, "weights")
    if job.quantization is not None:
        quantize(model, job, tracker, weights)
    weights.allocate(model, tracker)
    model = _prepare(model, job, task, tracker, weights)
    tracker.empty_cache()
    if job.trainer == "trl" and job.quantization is not None and job.method != "inference":
        weights.cast_by_trl(model, tracker)
    return model


def _prepare(
    model: torch.nn.Module, job: Job, task: str, tracker: MemoryTracker, weights: MetaWeights
) -> torch.nn.Module:
    checkpointing = job.gradient_checkpointing != "off"
    kwargs = {"use_reentrant": job.gradient_checkpointing == "reentrant"}
    if job.method == "inference":
        model.requires_grad_(False)
        if job.lora is not None:  # an adapter served beside its base
            model = weights.adapted(model, job, task, tracker)
        return model.eval()
    if checkpointing and not model.supports_gradient_checkpointing:
        raise PlanError(
            f"{type(model).__name__} does not support gradient checkpointing",
            "set gradient_checkpointing to off",
            "gradient_checkpointing",
        )
    if job.method == "full":
        model.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable(kwargs)
    else:
        if job.prepare_for_kbit_training:
            with tracker.watching(model):  # casts what is not quantised to fp32, one tensor at a time
                model = peft.prepare_model_for_kbit_training(
                    model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=kwargs
                )
            tracker.empty_cache()
        else:
            model.requires_grad_(False)
            if checkpointing:
                model.gradient_checkpointing_enable(kwargs)
                model.enable_input_require_grads()
        model = weights.adapted(model, job, task, tracker)
    return model.train()


def _moved_in(base: torch.nn.Module | torch.Tensor) -> torch.dtype:
    """The dtype in which PEFT moves an adapter of ``base``, a layer or a parameter of experts, to the card: the
    weight's, of a 4-bit one the dtype it computes in; an int8 one has none (``_move_adapter_to_device_of_base_layer``
    in peft/tuners/tuners_utils.py and lora/layer.py)."""
    if isinstance(base, torch.Tensor):
        return base.dtype
    _, dtype = BaseTunerLayer._get_base_layer_device_and_dtype(None, base)
    return dtype if dtype is not None and dtype.is_floating_point else torch.float32


@contextlib.contextmanager
def _magnitudes_entered(model: torch.nn.Module, tracker: MemoryTracker):
    """Enter what DoRA computes on the card while it adapts: each weight's norm, and cuBLAS's workspace, which stays
    (peft/tuners/lora/dora.py ``DoraLinearLayer.update_layer``). Measured on an H100: 33554432 bytes more are placed."""
    paths = {id(module): name for name, module in model.named_modules()}
    original = DoraLinearLayer.update_layer

    def update_layer(self, *, base_layer, lora_A, lora_B, **kwargs):
        dtype = _moved_in(base_layer)
        with tracker.on_behalf_of(paths.get(id(base_layer), "")):
            original(self, base_layer=base_layer, lora_A=lora_A.to(dtype), lora_B=lora_B.to(dtype), **kwargs)

    DoraLinearLayer.update_layer = update_layer
    try:
        yield
    finally:
        DoraLinearLayer.update_layer = original


def _own_adapters(model: torch.nn.Module, tracker: MemoryTracker) -> None:
    """Enter the adapters: moved to the card, then cast to fp32 in a second pass (peft/tuners/tuners_utils.py
    ``cast_adapter_dtype``; measured event for event)."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    moved_in = {}
    for layer in layers:
        dtype = _moved_in(layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer())
        adapters = (getattr(layer, name) for name in layer.adapter_layer_names)
        moved_in |= {id(parameter): dtype for adapter in adapters for parameter in adapter.parameters()}
    added, moved = [], []
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and tracker.key_of(parameter) is None:
                added.append((parameter, canonical_fqn(path)))
    for parameter, path in added:
        dtype = moved_in.get(id(parameter), parameter.dtype)
        cast = dtype.itemsize < parameter.dtype.itemsize
        moved.append(tracker.record_alloc(parameter.numel() * dtype.itemsize, path, "adapters", "to") if cast else None)
    for (parameter, path), key in zip(added, moved):
        tracker.register_existing(parameter, path, "adapters")
        if key is not None:
            tracker.record_free(key)


def quantize(model: torch.nn.Module, job: Job, tracker: MemoryTracker, weights: MetaWeights) -> None:
    """Replace linear layers as ``replace_with_bnb_linear`` does (transformers/integrations/bitsandbytes.py)."""
    quantization = job.quantization
    for name, module in list(quantizable(model, quantization.skip_modules)):
        new = weights.quantized(module, job, name, tracker)
        tracker.empty_cache()
        new.source_cls = type(module)
        new.requires_grad_(False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    model.is_loaded_in_4bit = quantization.type != "int8"
    model.is_loaded_in_8bit = quantization.type == "int8"
    model.quantization_method = "bitsandbytes"
    _assign_is_quantized(model)  # Jamba's Mamba calls a layer then whose weight it takes otherwise


def quantizable(model: transformers.PreTrainedModel, skip: Iterable[str] = ()) -> Iterator[tuple[str, torch.nn.Module]]:
    """The linear layers that bitsandbytes replaces, with their paths (``replace_with_bnb_linear``).

    Left alone are ``skip`` (``llm_int8_skip_modules``) or, without, the output head and what is tied; and what the
    class keeps in float32 (quantizer_bnb_4bit.py, ``_process_model_before_weight_loading``).
    """
    kept = HfQuantizer.get_modules_to_not_convert(model, list(skip) or None, model._keep_in_fp32_modules)
    leave = left_by(kept)
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear or isinstance(module, Conv1D):
            if not leave(name):
                yield name, module


def left_by(patterns: list[str]) -> Callable[[str], bool]:
    """Whether a module of that path is left as it is (quantizers_utils.py ``should_convert_module``): it begins as one
    of the patterns says, or ends with one. Theirs looks up each of them for each path: of a model of 600 tied layers
    for ten seconds."""
    begins, ends = re.compile("|".join(f"(?:{pattern})" for pattern in patterns)).match, tuple(patterns)
    return lambda path: bool(ends) and (begins(path) is not None or path.endswith(ends))


def shape_of(linear: torch.nn.Module) -> tuple[int, int]:
    """Rows and columns of the weight as bitsandbytes keeps it: GPT-2's Conv1D is transposed."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def _four_bit(linear, quantization, dtype, path, tracker):
    """A Linear4bit with the tensors that ``quantize_4bit`` makes (bitsandbytes/functional.py; blocks of 64 and 256).

    Entered in its order: absmax, the packed weight, the code; nested: the offset, absmax less its mean, the second
    absmax, absmax in 8 bits and a code of its own. Measured event for event on an H100.
    """
    n, k = shape_of(linear)
    blocks = -(-n * k // 64)
    meta = {"device": "meta"}
    new = bnb.nn.Linear4bit(
        k,
        n,
        linear.bias is not None,
        compute_dtype=getattr(torch, quantization.compute_dtype),
        compress_statistics=quantization.double_quant,
        quant_type=quantization.type,
        device="meta",
    )
    if linear.bias is not None:
        new.bias = torch.nn.Parameter(linear.bias.data)
    nested = {}
    if quantization.double_quant:
        nested["state2"] = QuantState(
            absmax=torch.empty(-(-blocks // 256), **meta),
            code=torch.empty(256, **meta),
            blocksize=256,
            dtype=torch.float32,
        )
        nested["offset"] = torch.empty((), **meta)
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, **meta),
        shape=torch.Size((n, k)),
        code=torch.empty(16, **meta),
        blocksize=64,
        quant_type=quantization.type,
        dtype=dtype,
        **nested,
    )
    new.weight = bnb.nn.Params4bit(
        torch.empty(((n * k + 1) // 2, 1), dtype=torch.uint8, **meta),
        requires_grad=False,
        quant_state=state,
        quant_type=quantization.type,
        compress_statistics=quantization.double_quant,
        bnb_quantized=True,
        module=new,
    )
    new.quant_state = state
    absmax = tracker.record_alloc(blocks * 4, path, "quantization_constants", "quantize_4bit") if nested else None
    if not nested:
        tracker.register_existing(state.absmax, path, "quantization_constants")
    tracker.register_existing(new.weight, path, "weights")
    tracker.register_existing(state.code, path, "quantization_constants")
    if nested:
        tracker.register_existing(state.offset, path, "quantization_constants")
        centred = tracker.record_alloc(blocks * 4, path, "quantization_constants", "quantize_4bit")
        for tensor in (state.state2.absmax, state.absmax, state.state2.code):
            tracker.register_existing(tensor, path, "quantization_constants")
        tracker.record_free(centred)
        tracker.record_free(absmax)
    return new


def _int8(linear, path, tracker):
    """A Linear8bitLt with what ``Int8Params._quantize`` makes (bitsandbytes/nn/modules.py): the weight comes from the
    host as fp16 and is dropped; left are one fp32 scale a row and CB in int8. Measured event for event on an H100."""
    n, k = shape_of(linear)
    half = tracker.record_alloc(n * k * 2, path, "weights", "to")
    new = bnb.nn.Linear8bitLt(k, n, linear.bias is not None, has_fp16_weights=False, threshold=6.0, device="meta")
    if linear.bias is not None:
        new.bias = torch.nn.Parameter(linear.bias.data)
    weight = bnb.nn.Int8Params(
        torch.empty(n, k, dtype=torch.int8, device="meta"), requires_grad=False, has_fp16_weights=False
    )
    weight.CB = weight.data
    weight.SCB = torch.empty(n, dtype=torch.float32, device="meta")
    new.weight = weight
    tracker.register_existing(weight.SCB, path, "quantization_constants")
    tracker.register_existing(weight, path, "weights")
    tracker.record_free(half)
    return new


def adapt(model: torch.nn.Module, job: Job, task: str, device: str) -> torch.nn.Module:
    """``peft.get_peft_model`` on ``device``, with PEFT's own refusal where it refuses."""
    lora = job.lora
    targets = lora.target_modules
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        bias="none",
        task_type=PEFT_TASKS.get(task),
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        modules_to_save=list(lora.modules_to_save) or None,
    )
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings()
    try:
        with warnings.catch_warnings(), torch.device("meta") if device == "meta" else contextlib.nullcontext():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, config, low_cpu_mem_usage=device == "meta")
    except Exception as error:
        saved = sorted({part for name, _ in linear for part in name.split(".")} & set(config.modules_to_save or ()))
        if job.quantization is not None and saved:  # quantised, and to be trained in full
            hint = f"leave what PEFT trains in full unquantised: quantization.skip_modules {saved}"
        else:
            refused = {*re.findall(r"'(\w+)'", str(error)), *(name for name, module in linear if module is head)}
            names = {name.rpartition(".")[2] for name, _ in linear} - refused
            some = f"some of {', '.join(sorted(name for name in names if not name.isdigit())[:16])}"
            hint = f"set lora.target_modules to {some if targets else f'all-linear, or {some}'}"
        raise PlanError(f"PEFT cannot adapt this model: {_first_line(error)}", hint, "lora") from None
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.device.type != device:
                    moved = tensor.to(device)
                    store[name] = (
                        torch.nn.Parameter(moved, tensor.requires_grad) if store is module._parameters else moved
                    )
    return model


def _first_line(error: Exception) -> str:
    """The first line, and what is under it where it ends in a colon (huggingface_hub's validation errors)."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else lines[0] if lines else type(error).__name__
    if isinstance(error, (KeyError, AttributeError, TypeError)):  # of Python's own words: say whose
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        text = f"{'it lacks ' if isinstance(error, KeyError) else ''}{text} (in {frame.f_code.co_name})"
    return text[:300]
