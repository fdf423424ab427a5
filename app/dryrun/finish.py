"""What comes after the training, on the meta device: the adapter merged in 16 bit, the checkpoint written.

Both in a process of their own, with the functions that people call: ``PeftModel.from_pretrained`` and
``merge_and_unload`` (peft/tuners/lora/layer.py ``Linear.merge``: the product of the factors and its scaled copy, in the
adapter's dtype), then ``save_pretrained`` (transformers/modeling_utils.py: ``revert_weight_conversion``, which copies
what a checkpoint holds apart and the model fused; safetensors then takes each tensor to the host).
"""

from __future__ import annotations

import torch
from transformers.core_model_loading import revert_weight_conversion

from app.dryrun import cuda
from app.dryrun.fold import folded_books
from app.dryrun.model import Weightless, base_of, load
from app.dryrun.symbols import Conditions, symbol
from app.dryrun.trace import Ledger
from app.errors import PlanError
from app.job import Job
from app.memory.event import Books, Columns
from app.memory.kernels import KernelFacts
from app.memory.script import Script
from app.memory.sizes import SYMBOLS

MERGE, SAVE = "merge", "save"


def trace(
    part: str, job: Job, config: dict, capability: tuple[int, int], multiprocessors: int, measured: KernelFacts
) -> Script:
    """The ``finish`` of a job, or the ``load`` of its model, on a card with these kernels and on those that do the same
    with another number of multiprocessors. Raises :class:`PlanError`."""
    conditions = Conditions()
    card = cuda.Card(capability, symbol(SYMBOLS[2], multiprocessors, conditions), measured)
    return Script.of({"finish": finish_books, "load": load_books}[part](job, config, card), conditions)


def finish_books(job: Job, config: dict, card: cuda.Card) -> Columns:
    """The books of loading what ``job`` (its base unquantised) trained, merging its adapter and writing it. Raises
    :class:`PlanError`."""
    base, task = base_of(config, job.task, job.dtype, job.attention)

    def run(model) -> Books:
        ledger = Ledger(card)
        with cuda.as_if_cuda(card):
            model = load(model, job, task, ledger, Weightless())
            with ledger.watching(model), torch.no_grad():
                if job.lora is not None:
                    ledger.mark("load", 0, "adapters")  # load_peft_weights: the file's tensors, on the card
                    stored = [torch.empty_like(p) for p in model.parameters() if p.requires_grad]
                    del stored
                    ledger.mark(MERGE, 1, "temporaries")
                    model = model.merge_and_unload()
                ledger.mark(SAVE, 1, "temporaries")
                written = revert_weight_conversion(model, model.state_dict())
                written = {name: tensor.contiguous() for name, tensor in written.items()}
                del written
                ledger.mark("end", 1, "temporaries")
        return ledger.close()

    try:
        return folded_books(base, run).columns()
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"merging and writing {type(base).__name__} cannot be planned: {type(error).__name__}: {str(error)[:200]}",
            "the step is planned all the same",
        ) from None


def load_books(job: Job, config: dict, card: cuda.Card) -> Columns:
    """The books of placing the model of ``job`` (resolved) alone."""
    base, task = base_of(config, job.task, job.dtype, job.attention)

    def run(model) -> Books:
        ledger = Ledger(card)
        with cuda.as_if_cuda(card):
            load(model, job, task, ledger, Weightless())
        return ledger.close()

    return folded_books(base, run).columns()
