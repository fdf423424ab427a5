"""How a linear layer lies on the card when it is quantised: one module a method."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, _assign_is_quantized

from ....job import Job
from ...tracker import MemoryTracker

if TYPE_CHECKING:
    from ..loading import MetaWeights


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
