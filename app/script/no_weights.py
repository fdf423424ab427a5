"""``from_pretrained`` without weights: the config, the class, the quantiser and the placement are transformers' own.

Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/modeling_utils.py ``from_pretrained``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import torch
import transformers
from transformers import modeling_utils
from transformers.modeling_utils import LoadStateDictInfo, PreTrainedModel
from transformers.quantizers import quantizer_bnb_4bit, quantizer_bnb_8bit

from ..dryrun.build.loading import MetaWeights
from ..dryrun.build.quantizers import quantize
from ..dryrun.sandbox import replaced
from ..errors import PlanError
from ..job import Quantization
from .script_tracker import ScriptTracker

QUANTIZERS = (quantizer_bnb_4bit.Bnb4BitHfQuantizer, quantizer_bnb_8bit.Bnb8BitHfQuantizer)
"""Quantisers whose layers are made here."""


@contextmanager
def without_weights(tracker: ScriptTracker) -> Iterator[None]:
    """While the context lasts, no weight is read or initialised, and those of quantised layers are made on the card."""
    original = PreTrainedModel.__dict__["_from_config"].__func__

    def from_config(cls, config, **kwargs):
        with torch.device("meta"):
            return original(cls, config, **kwargs)

    def load(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        _place(tracker, model, load_config)
        return LoadStateDictInfo(set(), set(), set(), [], {}, set()), None

    with ExitStack() as undo:
        for holder, name, value in (
            (modeling_utils, "_get_resolved_checkpoint_files", lambda *_, **__: (None, None)),
            (PreTrainedModel, "_from_config", classmethod(from_config)),
            (PreTrainedModel, "_load_pretrained_model", staticmethod(load)),
            (PreTrainedModel, "_initialize_missing_keys", lambda *_, **__: None),
            *((quantizer, "_process_model_before_weight_loading", lambda *_, **__: None) for quantizer in QUANTIZERS),
            *((quantizer, "validate_environment", lambda *_, **__: None) for quantizer in QUANTIZERS),
        ):
            undo.enter_context(replaced(holder, name, value))
        yield


def _place(tracker: ScriptTracker, model: PreTrainedModel, load_config) -> None:
    """Quantise what is quantised; record what the device map has on the card."""
    if load_config.hf_quantizer is not None:
        _quantise(tracker, model, load_config)
    at = _device_by_module(load_config.device_map or {})
    for path, module in model.named_modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and at(f"{path}.{name}") == "cuda":
                tracker.place(tensor, "weights", path)


def _quantise(tracker: ScriptTracker, model: PreTrainedModel, load_config) -> None:
    if not isinstance(load_config.hf_quantizer, QUANTIZERS):
        kind = type(load_config.hf_quantizer.quantization_config).__name__
        raise PlanError(f"{kind} is not modelled in a script ({tracker.line()})", "use BitsAndBytesConfig")
    config = load_config.hf_quantizer.quantization_config
    quantization = Quantization(
        type=config.bnb_4bit_quant_type if config.load_in_4bit else "int8",
        double_quant=bool(config.load_in_4bit and config.bnb_4bit_use_double_quant),
        compute_dtype=str(config.bnb_4bit_compute_dtype).removeprefix("torch."),
        skip_modules=config.llm_int8_skip_modules or [],
    )
    dtype = str(load_config.dtype or model.dtype).removeprefix("torch.")
    quantize(model, SimpleNamespace(quantization=quantization, dtype=dtype), tracker, MetaWeights())


def _device_by_module(device_map: dict) -> Callable[[str], str]:
    """The type of the device on which a parameter lies, by its path. Raises :class:`PlanError` for a second card."""

    def at(path: str) -> str:
        inside = [name for name in device_map if not name or path == name or path.startswith(f"{name}.")]
        if not inside:
            return "cpu"
        device = device_map[max(inside, key=len)]
        if isinstance(device, int):
            device = f"cuda:{device}"
        device = torch.device(device) if str(device) != "disk" else torch.device("cpu")
        if device.type == "cuda" and device.index:
            raise PlanError(f"the device_map names {device}: one card is planned", "plan many with --strategy")
        return device.type

    return at


transformers.utils.logging.disable_progress_bar()
