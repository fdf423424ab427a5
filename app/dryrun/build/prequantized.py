"""Checkpoints whose weights are stored quantised: what transformers does with them, and what they weigh on disk.

What can be trained follows transformers (quantizers/auto.py ``get_hf_quantizer``, trainer_utils.py
``validate_quantization_for_training``): a method that it can dequantise as it loads is planned so; bitsandbytes layers
are the job's own quantisation; the rest is refused with transformers' reason.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import transformers
from pydantic import ValidationError
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from ...errors import PlanError
from ...job import Job, Quantization
from ...registry.quantizers import four_bit_bytes

_SIXTEEN_BIT = "plan the 16-bit model that it was made from: method qlora quantises that to 4 bits as it loads"


def quantization_config_of(config: dict) -> dict | None:
    """A config's ``quantization_config``, its own or its text model's, where the weights are stored quantised."""
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(settings, dict):
            return settings
    return None


def name_of(settings: dict) -> str:
    """What the method is called among transformers' quantizers, or calls itself."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes_4bit" if settings.get("load_in_4bit") else "bitsandbytes_8bit"
    return str(settings.get("quant_method") or settings.get("quant_algo") or "an unnamed method")


def as_loaded(job: Job, settings: dict, model: transformers.PreTrainedModel) -> tuple[Job, str]:
    """The job that loading this checkpoint makes of ``job`` (resolved), and a sentence that says so.

    Raises :class:`PlanError` with what the weights weigh as stored where the stack cannot run it.
    """
    name = name_of(settings)

    def refuse(message: str, hint: str) -> PlanError:
        return PlanError(message, hint, "model", stored_weights(model, settings))

    if name.startswith("bitsandbytes"):
        try:
            stored = _bitsandbytes(settings)
        except ValidationError as error:
            raise refuse(
                f"the checkpoint's quantization_config is none of bitsandbytes: {error.errors()[0]['msg']}",
                "send the model's own config.json",
            ) from None
        if job.method in ("full", "lora"):
            reason = "weights stored by bitsandbytes are trained through adapters only"
            raise refuse(f"{reason}: this checkpoint is {name}", "use method qlora: its adapters over these weights")
        said = f"the checkpoint is stored as {name}: its own layout ({stored.type}) is planned"
        return job.model_copy(update={"quantization": stored}), said
    mixed = settings.get("quant_algo") not in (None, "FP8")
    if name not in AUTO_QUANTIZER_MAPPING or name == "fp8" and mixed:
        known = f"transformers {transformers.__version__} has no quantizer for {name}"
        if name in AUTO_QUANTIZER_MAPPING:
            known = f"transformers reads {name}, and this checkpoint holds {settings.get('quant_algo')} too"
        elif not settings.get("quant_method"):
            known = "the checkpoint's quantization_config names no `quant_method`, which transformers asks for"
        raise refuse(f"{known}: its stored weights cannot be loaded for training", _SIXTEEN_BIT)
    made = AUTO_QUANTIZATION_CONFIG_MAPPING[name]
    if "dequantize" in inspect.signature(made.__init__).parameters:
        if job.quantization is not None:
            raise refuse(
                f"transformers does not quantise again what is stored as {name}: the model is quantized with "
                f"{made.__name__} but you are passing a BitsAndBytesConfig",
                f"use method lora, which dequantises it to {job.dtype} on load, or plan its 16-bit original with qlora",
            )
        return job, (
            f"the checkpoint is stored as {name}: planned as dequantised to {job.dtype} on load "
            f"({made.__name__}(dequantize=True))"
        )
    trains = getattr(AUTO_QUANTIZER_MAPPING[name], "is_trainable", None)
    reason = _missing(name, settings) or "its layers are kernels of a package of its own, which are not modelled"
    if job.method != "inference" and _says_no(trains):
        reason = f"transformers does not support training on {name}"
    raise refuse(f"this checkpoint is stored as {name}: {reason}", _SIXTEEN_BIT)


def _bitsandbytes(settings: dict) -> Quantization:
    """``BitsAndBytesConfig`` as a job writes it; its defaults are fp4, not nested, float32."""
    return Quantization(
        type="int8" if settings.get("load_in_8bit") else settings.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(settings.get("bnb_4bit_use_double_quant", False)),
        compute_dtype=settings.get("bnb_4bit_compute_dtype") or "float32",
        skip_modules=tuple(settings.get("llm_int8_skip_modules") or ()),
    )


def _missing(name: str, settings: dict) -> str | None:
    """What transformers says it lacks to load this checkpoint."""
    try:
        made = AUTO_QUANTIZATION_CONFIG_MAPPING[name].from_dict(dict(settings))
        AUTO_QUANTIZER_MAPPING[name](made, pre_quantized=True).validate_environment(device_map={"": 0})
    except (ImportError, RuntimeError) as error:
        return str(error).splitlines()[0]
    except Exception:
        return None
    return None


def _says_no(trains) -> bool:
    try:
        return trains.fget(None) is False
    except Exception:  # it depends on the checkpoint
        return False


# What the stored weights weigh


class Code(NamedTuple):
    """How one linear weight is stored: ``bits`` a number, ``scale`` bytes for each group of ``group`` numbers along a
    row (0: one for the tensor) and ``rows`` rows, ``extra`` bytes a tensor and ``column`` bytes an input."""

    bits: float
    group: int
    scale: float
    rows: int = 1
    extra: int = 0
    column: int = 0

    def bytes_of(self, n: int, k: int) -> int:
        groups = -(-k // self.group) * -(-n // self.rows) if self.group else 1
        return -(-int(n * k * self.bits) // 8) + int(groups * self.scale) + self.extra + self.column * k


def stored_weights(model: transformers.PreTrainedModel, settings: dict) -> dict:
    """``{"parameters", "bytes", "from"}`` of a checkpoint, by the layout that its ``quantization_config`` states.

    ``bytes`` is left out where the layout is not known here. What the settings do not name is in 16 bits.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    out = {"parameters": parameters, "from": "the layout that the config states"}
    bytes = 2 * parameters
    for path, n, k, count in _linear(model):
        try:
            code = _code_of(path, settings)
        except (TypeError, ValueError, KeyError, AttributeError, re.error):
            return out
        if code is not None:
            bytes += count * (
                (four_bit_bytes(n * k, code.extra == -1) if code.group == -1 else code.bytes_of(n, k)) - 2 * n * k
            )
    return out | {"bytes": bytes}


def _linear(model: torch.nn.Module) -> Iterator[tuple[str, int, int, int]]:
    """Path, rows, columns and number of the matrices that quantisers speak of: linear layers and fused experts."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield path, *module.weight.shape, 1
        elif "expert" in path:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() == 3:
                    yield f"{path}.{name}", *parameter.shape[1:], parameter.shape[0]


def _code_of(path: str, settings: dict) -> Code | None:
    """How the weight at ``path`` is stored; None: as a plain number."""
    name = name_of(settings)
    left = settings.get("modules_to_not_convert") or settings.get("ignore") or settings.get("exclude_modules") or ()
    if any(_names(pattern, path) for pattern in left):
        return None
    if name == "fp8" and settings.get("quant_algo") in (None, "FP8"):
        rows, columns = settings.get("weight_block_size") or (0, 0)
        return Code(8, columns, 4, rows or 1) if columns else Code(8, 0, 4)
    if name == "fbgemm_fp8":
        return Code(8, 1 << 40, 4)
    if name == "mxfp4":
        return Code(4, 32, 1) if "expert" in path else None
    if name in ("gptq", "awq"):
        bits, group = settings["bits"], settings.get("group_size", 128)
        group = 1 << 40 if group == -1 else group
        return Code(bits, group, 2 + bits / 8, column=4 if name == "gptq" else 0)
    if name.startswith("bitsandbytes"):
        nested = settings.get("bnb_4bit_use_double_quant", False)
        return Code(8, 1 << 40, 4) if "8bit" in name else Code(4, -1, 0, extra=-1 if nested else 0)
    for group in (settings.get("config_groups") or {}).values():
        weights, targets = group["weights"], group["targets"]
        if weights and any(target == "Linear" or _names(target, path) for target in targets):
            size = weights.get("group_size") or (1 << 40 if weights.get("strategy") == "channel" else 0)
            scale = 1 if weights["num_bits"] == 4 and weights.get("type") == "float" else 2
            return Code(weights["num_bits"], size, scale, extra=8)
    if settings.get("config_groups"):
        return None
    if settings.get("quant_algo") == "NVFP4":
        return Code(4, 16, 1, extra=8)
    if settings.get("quant_algo") == "FP8":
        return Code(8, 0, 4, extra=4)
    raise KeyError(name)


def _names(pattern: str, path: str) -> bool:
    """Whether a checkpoint's list of modules names ``path``: a regular expression, a wildcard, a path or its end."""
    if pattern.startswith("re:"):
        if re.search(r"[)\]][*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise ValueError(f"{pattern[:50]} could take for ever to match")
        return re.match(pattern[3:], path) is not None
    parts = f".{path}."
    return fnmatch.fnmatch(path, pattern) or f".{pattern.removesuffix('.weight')}." in parts
