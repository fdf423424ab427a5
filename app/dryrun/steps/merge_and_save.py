"""What follows a training, on the meta device: the adapter merged into 16-bit weights, the checkpoint written.

Each runs in a process of its own, by the functions that people call. ``PeftModel.from_pretrained`` and
``merge_and_unload`` make the product of an adapter's factors and a scaled copy of it, in the adapter's dtype.
``save_pretrained`` takes apart what a checkpoint holds apart and the model fused; then each tensor goes to the host.

Source: https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/layer.py#L952 ``merge``.
https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/core_model_loading.py#L1803
``revert_weight_conversion``.
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
"""Names of the phases."""


def trace(
    part: str, job: Job, config: dict, capability: tuple[int, int], multiprocessors: int, measured: KernelFacts
) -> TraceTemplate:
    """The trace of what follows a job (``part``: ``finish``), or of placing its model alone (``load``).

    It holds for every card with these kernels that does the same, with any number of multiprocessors. Raises
    :class:`PlanError`.
    """
    conditions = Conditions()
    card = Card(capability, symbol(SYMBOLS[2], multiprocessors, conditions), measured)
    return TraceTemplate.of({"finish": merge_and_save_log, "load": load_log}[part](job, config, card), conditions)


def merge_and_save_log(job: Job, config: dict, card: Card) -> TraceColumns:
    """The log of loading what ``job`` trained (its base not quantised), merging its adapter, and writing the model.

    Raises :class:`PlanError`.
    """
    base, task = base_of(config, job.task, job.dtype, job.attention)

    def run(model: torch.nn.Module) -> TraceLog:
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
    """The log of placing the model of ``job`` (resolved) alone."""
    base, task = base_of(config, job.task, job.dtype, job.attention)

    def run(model: torch.nn.Module) -> TraceLog:
        tracker = MemoryTracker(card)
        with as_if_cuda(card):
            load(model, job, task, tracker, MetaWeights())
        return tracker.close()

    return folded_log(base, run).columns()
