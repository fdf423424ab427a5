"""Which linear layers bitsandbytes takes, and what its 4-bit and 8-bit layers have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch
import transformers
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from ....job import Job
from ...tracker import MemoryTracker


def quantizable(model: transformers.PreTrainedModel, skip: Iterable[str] = ()) -> Iterator[tuple[str, torch.nn.Module]]:
    """The linear layers that transformers gives to bitsandbytes, with their paths.

    Left as they are: ``skip`` (``llm_int8_skip_modules``) or, without, the output head and what is tied to it; and what
    the class keeps in float32.
    https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/integrations/bitsandbytes.py#L162
    ``replace_with_bnb_linear``.
    https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/quantizers/quantizer_bnb_4bit.py#L121
    ``_process_model_before_weight_loading``.
    """
    kept = HfQuantizer.get_modules_to_not_convert(model, list(skip) or None, model._keep_in_fp32_modules)
    leave = left_by(kept)
    for name, module in model.named_modules():
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and not leave(name):
            yield name, module


def left_by(patterns: list[str]) -> Callable[[str], bool]:
    """Whether a path is left unquantised: one of the patterns matches where it begins, or is how it ends.

    The same as ``should_convert_module``, compiled once. That function tries each pattern on each path, which takes ten
    seconds for a model with 600 tied layers. ``tests/test_stack.py`` compares the two.
    https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/quantizers/quantizers_utils.py#L26
    ``should_convert_module``.
    """
    begins, ends = re.compile("|".join(f"(?:{pattern})" for pattern in patterns)).match, tuple(patterns)
    return lambda path: bool(ends) and (begins(path) is not None or path.endswith(ends))


def shape_of(linear: torch.nn.Module) -> tuple[int, int]:
    """(rows, columns) of the weight as bitsandbytes keeps it: (outputs, inputs). GPT-2's Conv1D is transposed."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


class BitsAndBytes:
    """What both layouts share: the layers, and that a weight arrives in the load dtype and is dropped when packed."""

    def replaced(
        self, model: transformers.PreTrainedModel, skip: Iterable[str]
    ) -> Iterator[tuple[str, torch.nn.Module]]:
        """The layers that transformers gives to bitsandbytes."""
        return quantizable(model, skip)

    def on_meta(self, linear: torch.nn.Module, job: Job, path: str, tracker: MemoryTracker) -> torch.nn.Module:
        """The quantised layer, without values; the weight in the load dtype lies on the card until it is made."""
        size = linear.weight.numel() * getattr(torch, job.dtype).itemsize
        arriving = tracker.record_alloc(size, path, "weights", "load")
        new = self.packed_on_meta(linear, job, path, tracker)
        tracker.record_free(arriving)
        return new

    def packed_on_meta(self, linear: torch.nn.Module, job: Job, path: str, tracker: MemoryTracker) -> torch.nn.Module:
        """The quantised layer, made of a weight that lies on the card."""
        raise NotImplementedError

    def mark(self, model: transformers.PreTrainedModel) -> None:
        """Say how many bits, as the quantisers of transformers do after loading."""
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
        model.quantization_method = "bitsandbytes"
