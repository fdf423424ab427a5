"""How a linear layer lies on the card when it is quantised: a module a method, each a :class:`Layout`.

The facts that need no torch are rows of :mod:`vramplan.registry.quantizers`; a row names its class here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
import transformers
from transformers.quantizers.base import _assign_is_quantized

from ....job import Job, Quantization
from ....registry import load
from ....registry.quantizers import QUANTIZERS
from ...tracker import MemoryTracker

if TYPE_CHECKING:
    from ..loading import MetaWeights


class Layout(Protocol):
    """One method of quantising linear layers."""

    packed: type[torch.nn.Parameter]
    """The class of a weight in this layout."""

    def replaced(
        self, model: transformers.PreTrainedModel, skip: Iterable[str]
    ) -> Iterator[tuple[str, torch.nn.Module]]:
        """The layers that are quantised, with their paths. ``skip``: modules that the job leaves as they are."""

    def on_meta(self, linear: torch.nn.Module, job: Job, path: str, tracker: MemoryTracker) -> torch.nn.Module:
        """The quantised layer on the meta device; the tracker records what a card is asked for while it is made."""

    def on_card(self, linear: torch.nn.Module, job: Job, weight: torch.Tensor) -> torch.nn.Module:
        """The quantised layer on a card, made by the library from ``weight``, which lies there already."""

    def mark(self, model: transformers.PreTrainedModel) -> None:
        """Set what others read of a model that is quantised in this layout."""


def layout_of(quantization: Quantization) -> Layout:
    """The layout that a job's ``quantization`` names."""
    return load(QUANTIZERS[quantization.type].layout, __package__)()


def quantized_layers(
    model: transformers.PreTrainedModel, quantization: Quantization | None
) -> dict[str, torch.nn.Module]:
    """The layers that are quantised, by path. Of a job that quantises nothing: those that the default layout takes,
    for the layer table shows what they would weigh."""
    quantization = quantization or Quantization()
    return dict(layout_of(quantization).replaced(model, quantization.skip_modules))


def packed_classes() -> tuple[type[torch.nn.Parameter], ...]:
    """The classes of weights that are packed, in any layout: their shape is not that of the layer."""
    return tuple({load(quantizer.layout, __package__).packed for quantizer in QUANTIZERS.values()})


def quantize(model: transformers.PreTrainedModel, job: Job, tracker: MemoryTracker, weights: MetaWeights) -> None:
    """Replace the model's linear layers, one after the other, by ``weights`` in the job's layout."""
    layout = layout_of(job.quantization)
    for name, module in list(layout.replaced(model, job.quantization.skip_modules)):
        new = weights.quantized(layout, module, job, name, tracker)
        tracker.empty_cache()
        new.source_cls = type(module)
        new.requires_grad_(False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    layout.mark(model)
    _assign_is_quantized(model)  # Jamba's Mamba calls a layer then whose weight it takes otherwise
