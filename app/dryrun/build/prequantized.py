"""Checkpoints whose weights are stored quantised: what transformers does with them, and what they weigh on disk.

A method that transformers can dequantise while it loads is planned so. Layers of bitsandbytes are the job's own
quantisation. The rest is refused, with transformers' reason.

Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/quantizers/auto.py#L338
``get_hf_quantizer``.
https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/trainer_utils.py#L102
``validate_quantization_for_training``.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from pydantic import ValidationError
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from ...errors import PlanError
from ...job import Job, Quantization
from ...registry.quantizers import four_bit_bytes

Settings = dict[str, Any]
"""The object under ``quantization_config`` of a config.json."""

_SIXTEEN_BIT = "plan the 16-bit model that it was made from: method qlora quantises that to 4 bits as it loads"


def quantization_config_of(config: dict) -> Settings | None:
    """The ``quantization_config`` of a config.json, or of its text model; None: weights are stored as they are."""
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(settings, dict):
            return settings
    return None


def name_of(settings: Settings) -> str:
    """The method's name among transformers' quantisers, else what it calls itself."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes_4bit" if settings.get("load_in_4bit") else "bitsandbytes_8bit"
    return str(settings.get("quant_method") or settings.get("quant_algo") or "an unnamed method")


def as_loaded(job: Job, settings: Settings, model: transformers.PreTrainedModel) -> tuple[Job, str]:
    """The job that loading this checkpoint makes of ``job`` (resolved), and a sentence that says so.

    Raises :class:`PlanError` where the stack cannot run it, with what the weights weigh as they are stored.
    """
    try:
        name = name_of(settings)
        if name.startswith("bitsandbytes"):
            return _as_bitsandbytes(job, settings, name)
        _refuse_unreadable(settings, name)
        made = AUTO_QUANTIZATION_CONFIG_MAPPING[name]
        if "dequantize" in inspect.signature(made.__init__).parameters:
            return _as_dequantised(job, name, made.__name__)
        reason = _missing(name, settings) or "its layers are kernels of a package of its own, which are not modelled"
        if job.method != "inference" and _is_never_trained(AUTO_QUANTIZER_MAPPING[name]):
            reason = f"transformers does not support training on {name}"
        raise PlanError(f"this checkpoint is stored as {name}: {reason}", _SIXTEEN_BIT, "model")
    except PlanError as error:
        error.weights = stored_weights(model, settings)
        raise


def _as_bitsandbytes(job: Job, settings: Settings, name: str) -> tuple[Job, str]:
    """A checkpoint of bitsandbytes: its layout is the job's own quantisation."""
    try:
        stored = _bitsandbytes(settings)
    except ValidationError as error:
        raise PlanError(
            f"the checkpoint's quantization_config is none of bitsandbytes: {error.errors()[0]['msg']}",
            "send the model's own config.json",
            "model",
        ) from None
    if job.method in ("full", "lora"):
        raise PlanError(
            f"weights stored by bitsandbytes are trained through adapters only: this checkpoint is {name}",
            "use method qlora: its adapters over these weights",
            "model",
        )
    said = f"the checkpoint is stored as {name}: its own layout ({stored.type}) is planned"
    return job.model_copy(update={"quantization": stored}), said


def _bitsandbytes(settings: Settings) -> Quantization:
    """A ``BitsAndBytesConfig`` as a job writes it; its defaults are fp4, not nested, float32."""
    return Quantization(
        type="int8" if settings.get("load_in_8bit") else settings.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(settings.get("bnb_4bit_use_double_quant", False)),
        compute_dtype=settings.get("bnb_4bit_compute_dtype") or "float32",
        skip_modules=tuple(settings.get("llm_int8_skip_modules") or ()),
    )


def _refuse_unreadable(settings: Settings, name: str) -> None:
    """Raise :class:`PlanError` for a method that transformers has no quantiser for."""
    algorithm = settings.get("quant_algo")
    is_mixed = name == "fp8" and algorithm not in (None, "FP8")
    if name in AUTO_QUANTIZER_MAPPING and not is_mixed:
        return
    if is_mixed and name in AUTO_QUANTIZER_MAPPING:
        reason = f"transformers reads {name}, and this checkpoint holds {algorithm} too"
    elif not settings.get("quant_method"):
        reason = "the checkpoint's quantization_config names no `quant_method`, which transformers asks for"
    else:
        reason = f"transformers {transformers.__version__} has no quantizer for {name}"
    raise PlanError(f"{reason}: its stored weights cannot be loaded for training", _SIXTEEN_BIT, "model")


def _as_dequantised(job: Job, name: str, config_class: str) -> tuple[Job, str]:
    """A checkpoint that transformers dequantises while it loads: the job is planned in its load dtype."""
    if job.quantization is not None:
        raise PlanError(
            f"transformers does not quantise again what is stored as {name}: the model is quantized with "
            f"{config_class} but you are passing a BitsAndBytesConfig",
            f"use method lora, which dequantises it to {job.dtype} on load, or plan its 16-bit original with qlora",
            "model",
        )
    return job, (
        f"the checkpoint is stored as {name}: planned as dequantised to {job.dtype} on load "
        f"({config_class}(dequantize=True))"
    )


def _missing(name: str, settings: Settings) -> str | None:
    """What transformers says it lacks to load this checkpoint."""
    try:
        made = AUTO_QUANTIZATION_CONFIG_MAPPING[name].from_dict(dict(settings))
        AUTO_QUANTIZER_MAPPING[name](made, pre_quantized=True).validate_environment(device_map={"": 0})
    except (ImportError, RuntimeError) as error:
        return str(error).splitlines()[0]
    except Exception:
        return None
    return None


def _is_never_trained(quantizer: type) -> bool:
    """Whether a quantiser of transformers says that nothing it loads can be trained, whatever the checkpoint."""
    try:
        return quantizer.is_trainable.fget(None) is False
    except Exception:  # it depends on the checkpoint
        return False


# What the stored weights weigh

ROW = 1 << 40
"""A group as long as any row: one scale a row."""


class StorageLayout(NamedTuple):
    """How one linear weight of ``rows × columns`` is stored.

    ``bits`` are those of a number. ``group`` numbers along a row, of ``rows`` rows, share ``scale`` bytes (0: one scale
    for the tensor). ``extra`` are bytes a tensor, ``column`` bytes a column.
    """

    bits: float
    group: int
    scale: float
    rows: int = 1
    extra: int = 0
    column: int = 0

    def bytes_of(self, rows: int, columns: int) -> int:
        """Bytes of a weight with its scales."""
        groups = -(-columns // self.group) * -(-rows // self.rows) if self.group else 1
        return -(-int(rows * columns * self.bits) // 8) + int(groups * self.scale) + self.extra + self.column * columns


class FourBitLayout(NamedTuple):
    """bitsandbytes' 4 bits, as the registry of quantisers counts them."""

    double_quant: bool

    def bytes_of(self, rows: int, columns: int) -> int:
        """Bytes of a weight with its scales."""
        return four_bit_bytes(rows * columns, self.double_quant)


Stored = StorageLayout | FourBitLayout
"""How one weight is stored: what both can tell is its bytes."""


def stored_weights(model: transformers.PreTrainedModel, settings: Settings) -> dict[str, Any]:
    """``{"parameters", "bytes", "from"}`` of a checkpoint, by the layout that its ``quantization_config`` states.

    What the settings do not name is taken to be stored in 16 bits. Without ``bytes`` where a layout is not known here.
    Confirmed by ``tests/test_stored.py``, on tensors of each format.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    out = {"parameters": parameters, "from": "the layout that the config states"}
    total = 2 * parameters
    for path, rows, columns, count in _matrices(model):
        try:
            layout = _layout_of(path, settings)
        except (TypeError, ValueError, KeyError, AttributeError, re.error):
            return out
        if layout is not None:
            total += count * (layout.bytes_of(rows, columns) - 2 * rows * columns)
    return out | {"bytes": total}


def stored_matrices(model: transformers.PreTrainedModel, settings: Settings) -> Iterator[tuple[str, int]]:
    """(path, bytes with scales) of the matrices that a checkpoint with these settings stores quantised.

    Raises :class:`PlanError` where their layout is not known here.
    """
    for path, rows, columns, count in _matrices(model) if settings else ():
        try:
            layout = _layout_of(path, settings)
        except (TypeError, ValueError, KeyError, AttributeError, re.error):
            raise PlanError(
                f"how {name_of(settings)} stores {path} is not known here", "name the 16-bit model", "model"
            ) from None
        if layout is not None:
            yield path, count * layout.bytes_of(rows, columns)


def _matrices(model: torch.nn.Module) -> Iterator[tuple[str, int, int, int]]:
    """(path, rows, columns, how many) of the matrices that quantisers take: linear layers and fused experts."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield path, *module.weight.shape, 1
        elif "expert" in path:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() == 3:
                    yield f"{path}.{name}", *parameter.shape[1:], parameter.shape[0]


def _fp8(path: str, settings: Settings) -> Stored | None:
    """Blocks of rows and columns share a float32; without a block size, the tensor does."""
    if settings.get("quant_algo") not in (None, "FP8"):
        return _by_algorithm(path, settings)
    rows, columns = settings.get("weight_block_size") or (0, 0)
    return StorageLayout(8, columns, 4, rows or 1) if columns else StorageLayout(8, 0, 4)


def _mxfp4(path: str, settings: Settings) -> Stored | None:
    """Experts only: 32 numbers share an 8-bit exponent."""
    return StorageLayout(4, 32, 1) if "expert" in path else None


def _grouped(path: str, settings: Settings) -> Stored | None:
    """GPTQ and AWQ: a float16 scale and a zero point a group; GPTQ also has the group of each column, in 4 bytes."""
    bits, group = settings["bits"], settings.get("group_size", 128)
    column = 4 if name_of(settings) == "gptq" else 0
    return StorageLayout(bits, ROW if group == -1 else group, 2 + bits / 8, column=column)


def _compressed_tensors(path: str, settings: Settings) -> Stored | None:
    """The first group of ``config_groups`` whose targets name the module; 8 bytes more are a tensor's shape."""
    for group in settings["config_groups"].values():
        weights, targets = group["weights"], group["targets"]
        if weights and any(target == "Linear" or _names(target, path) for target in targets):
            size = weights.get("group_size") or (ROW if weights.get("strategy") == "channel" else 0)
            scale = 1 if weights["num_bits"] == 4 and weights.get("type") == "float" else 2
            return StorageLayout(weights["num_bits"], size, scale, extra=8)
    return None


_ALGORITHMS = {"NVFP4": StorageLayout(4, 16, 1, extra=8), "FP8": StorageLayout(8, 0, 4, extra=4)}
"""NVIDIA ModelOpt's formats, by ``quant_algo``."""


def _by_algorithm(path: str, settings: Settings) -> Stored | None:
    """A method without a row of its own: by its groups, else by its ``quant_algo``. Raises :class:`KeyError`."""
    return _compressed_tensors(path, settings) if settings.get("config_groups") else _ALGORITHMS[settings["quant_algo"]]


_LAYOUTS: dict[str, Callable[[str, Settings], Stored | None]] = {
    "fp8": _fp8,
    "fbgemm_fp8": lambda path, settings: StorageLayout(8, ROW, 4),
    "mxfp4": _mxfp4,
    "gptq": _grouped,
    "awq": _grouped,
    "bitsandbytes_4bit": lambda path, settings: FourBitLayout(settings.get("bnb_4bit_use_double_quant", False)),
    "bitsandbytes_8bit": lambda path, settings: StorageLayout(8, ROW, 4),
}
"""How the weight at a path is stored (None: as a plain number), by the method's name."""


def _layout_of(path: str, settings: Settings) -> Stored | None:
    """How the weight at ``path`` is stored; None: as a plain number. Raises :class:`KeyError` where it is not known."""
    left = settings.get("modules_to_not_convert") or settings.get("ignore") or settings.get("exclude_modules") or ()
    if any(_names(pattern, path) for pattern in left):
        return None
    name = name_of(settings)
    if name.startswith("bitsandbytes"):
        name = "bitsandbytes_8bit" if "8bit" in name else "bitsandbytes_4bit"
    return _LAYOUTS.get(name, _by_algorithm)(path, settings)


def _names(pattern: str, path: str) -> bool:
    """Whether a checkpoint's list of modules names ``path``: by a regular expression, a wildcard, a path or its end."""
    if pattern.startswith("re:"):
        if re.search(r"[)\]][*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise ValueError(f"{pattern[:50]} could take for ever to match")
        return re.match(pattern[3:], path) is not None
    parts = f".{path}."
    return fnmatch.fnmatch(path, pattern) or f".{pattern.removesuffix('.weight')}." in parts
