"""What comes after the training, on the meta device: the adapter merged in 16 bit, the checkpoint written.

Both in a process of their own, with the functions that people call: ``PeftModel.from_pretrained`` and
``merge_and_unload`` (peft/tuners/lora/layer.py ``Linear.merge``: the product of the factors and its scaled copy, in the
adapter's dtype), then ``save_pretrained`` (transformers/modeling_utils.py: ``revert_weight_conversion``, which copies
what a checkpoint holds apart and the model fused; safetensors then takes each tensor to the host).
"""

from __future__ import annotations

import torch
from transformers.core_model_loading import revert_weight_conversion

from ...errors import PlanError
from ...job import Job
from ...memory.events import TraceColumns, TraceLog
from ...memory.kernel_facts import KernelFacts
from ...memory.sizes import SYMBOLS
from ...memory.template import TraceTemplate
from ..build.loading import MetaWeights, load
from ..build.model import base_of
from ..cuda.as_if_cuda import as_if_cuda
from ..cuda.card_facts import Card
from ..diagnose import raise_if_ours
from ..repeat_layers import folded_log
from ..symbols import Conditions, symbol
from ..tracker import MemoryTracker

MERGE, SAVE = "merge", "save"


def trace(
    part: str, job: Job, config: dict, capability: tuple[int, int], multiprocessors: int, measured: KernelFacts
) -> TraceTemplate:
    """The ``finish`` of a job, or the ``load`` of its model, on a card with these kernels and on those that do the same
    with another number of multiprocessors. Raises :class:`PlanError`."""
    conditions = Conditions()
    card = Card(capability, symbol(SYMBOLS[2], multiprocessors, conditions), measured)
    return TraceTemplate.of({"finish": merge_and_save_log, "load": load_log}[part](job, config, card), conditions)


def merge_and_save_log(job: Job, config: dict, card: Card) -> TraceColumns:
    """The books of loading what ``job`` (its base unquantised) trained, merging its adapter and writing it. Raises
    :class:`PlanError`."""
    base, task = base_of(config, job.task, job.dtype, job.attention)

    def run(model) -> TraceLog:
        tracker = MemoryTracker(card)
        with as_if_cuda(card):
            model = load(model, job, task, tracker, MetaWeights())
            with tracker.watching(model), torch.no_grad():
                if job.lora is not None:
                    tracker.mark("load", 0, "adapters")  # load_peft_weights: the file's tensors, on the card
                    stored = [torch.empty_like(p) for p in model.parameters() if p.requires_grad]
                    del stored
                    tracker.mark(MERGE, 1, "temporaries")
                    model = model.merge_and_unload()
                tracker.mark(SAVE, 1, "temporaries")
                written = revert_weight_conversion(model, model.state_dict())
                written = {name: tensor.contiguous() for name, tensor in written.items()}
                del written
                tracker.mark("end", 1, "temporaries")
        return tracker.close()

    try:
        return folded_log(base, run).columns()
    except PlanError:
        raise
    except Exception as error:
        raise_if_ours(error)
        raise PlanError(
            f"merging and writing {type(base).__name__} cannot be planned: {type(error).__name__}: {str(error)[:200]}",
            "the step is planned all the same",
        ) from None


def load_log(job: Job, config: dict, card: Card) -> TraceColumns:
    """The books of placing the model of ``job`` (resolved) alone."""
    base, task = base_of(config, job.task, job.dtype, job.attention)

    def run(model) -> TraceLog:
        tracker = MemoryTracker(card)
        with as_if_cuda(card):
            load(model, job, task, tracker, MetaWeights())
        return tracker.close()

    return folded_log(base, run).columns()
