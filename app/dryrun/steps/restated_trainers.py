"""The steps of transformers' Trainer and TRL's SFTTrainer, with their own code where it runs without a card.

Restated from transformers 5.17 ``trainer.py`` (``_run_epoch``, ``training_step``, ``compute_loss``), accelerate 1.15
``accelerator.py`` (``prepare_model``: autocast inside ``forward``, outputs cast to fp32; ``backward``: the loss of fp16
is scaled) and trl 1.16 ``trainer/sft_trainer.py`` (``compute_loss``). torch's GradScaler, TRL's fused head and its
chunked loss are run as they are.
"""

from __future__ import annotations

import contextlib
import inspect
from types import MethodType

import torch
import transformers
from accelerate.utils.operations import convert_outputs_to_fp32
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ...errors import PlanError
from ...job import Job
from ...registry.optimizers import OPTIMIZERS
from ..inputs import base_of, make_batch
from ..observer import StepObserver
from ..sandbox import replaced
from ..symbols import sym_range
from .phases import begin_forward, label_grads_and_state

MAX_GRAD_NORM = 1.0  # TrainingArguments.max_grad_norm


def run_trainer(tracker: StepObserver, model, job: Job, task: str, steps: int, other: bool = False) -> None:
    """``trainer: transformers`` or ``trl``: batch to device, compute_loss, backward, clip, step, zero_grad; then, with
    ``other``, :data:`~vramplan.dryrun.tracker.FORWARD_OTHER_CHECKPOINTING`."""
    fused = job.trainer == "trl"
    if fused:
        _refuse_ungenerating(model)
    with _fused_head(model) if fused else contextlib.nullcontext():
        _wrap_forward(tracker, model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = own_optimizer(model, job)
        if optimizer is None:
            optimizer = OPTIMIZERS[job.optimizer].make(_groups(model), _embeddings(model))
        # Accelerator.__init__; it does nothing unless enabled
        scaler = torch.amp.GradScaler(tracker.device, enabled=job.mixed_precision == "fp16")
        total = 0.0
        batches: list[dict] = []
        for step in range(1, steps + other + 1):
            for turn in range(job.batches_run):
                begin_forward(tracker, model, job, step, steps)
                if turn == 0:
                    batches = _batches(tracker, model, job, task)  # those of the step before lie there until now
                    items = _items(model, batches[: job.batches_run], fused)
                loss = (_fused_loss if fused else _loss)(model, batches[turn], items)
                if step > steps:
                    break
                tracker.mark("backward", step, "activation_gradients")
                loss = loss / 1
                tracker.in_backward = True
                scaler.scale(loss).backward()
                tracker.in_backward = False
                label_grads_and_state(tracker, parameters)
                total = total + loss.detach()
                del loss
            else:
                tracker.mark("optimizer", step, "optimizer_temporaries")
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
                scaler.step(optimizer)
                scaler.update()
                label_grads_and_state(tracker, parameters, optimizer)
                model.zero_grad()
                del norm
                tracker.mark("end", step, "temporaries")
        tracker.close()


def _batches(tracker: StepObserver, model, job: Job, task: str) -> list[dict]:
    """``Trainer.get_batch_samples``: all batches of a step are fetched before the first one runs. Those that are not
    run lie there as one."""
    batches = [make_batch(tracker, model, job, task) for _ in range(job.batches_run)]
    more = job.gradient_accumulation_steps - len(batches)
    if more:
        tensors = {name: tensor for name, tensor in batches[0].items() if isinstance(tensor, torch.Tensor)}
        rest = {name: tensor.new_empty(more, *tensor.shape) for name, tensor in tensors.items()}
        tracker.register_batch(rest, {})
        batches.append(rest)
    return batches


def _refuse_ungenerating(model) -> None:
    """``SFTTrainer.__init__`` writes into ``model.generation_config``."""
    base = base_of(model)
    if getattr(base, "generation_config", None) is None:
        raise PlanError(
            f"SFTTrainer takes models that generate, and {type(base).__name__} has no generation_config",
            "set trainer to transformers",
            "trainer",
        )


def _wrap_forward(tracker: StepObserver, model) -> None:
    """``Accelerator.prepare_model`` with native mixed precision."""
    if tracker.autocast is None:
        return
    forward = model.forward

    def cast(self, *args, **kwargs):
        with tracker.autocast.on():
            return forward(*args, **kwargs)

    model.forward = MethodType(convert_outputs_to_fp32(cast), model)


def _items(model, batches: list[dict], fused: bool) -> torch.Tensor | None:
    """``Trainer._get_num_items_in_batch``: how many labels count, where the loss is told so; batch by batch, so that
    those that lie there as one would take too much at a time."""
    base = base_of(model)
    accepts = getattr(base, "accepts_loss_kwargs", None)
    if accepts is None:
        parameters = inspect.signature(type(base).forward).parameters.values()
        accepts = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if "labels" not in batches[0] or not (accepts or fused):
        return None
    causal = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    shifted = causal and not getattr(base.config, "is_encoder_decoder", False)
    return sum((batch["labels"][..., 1:] if shifted else batch["labels"]).ne(-100).sum() for batch in batches)


def _loss(model, batch: dict, items) -> torch.Tensor:
    """``Trainer.compute_loss``: the model's own loss, over all items of the accumulated batch if it takes that."""
    return model(**batch, **({} if items is None else {"num_items_in_batch": items}))["loss"]


def _fused_loss(model, batch: dict, items) -> torch.Tensor:
    """``SFTTrainer.compute_loss`` with loss_type nll, and the metrics it computes beside it."""
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    loss = (-outputs.log_probs).sum() / torch.as_tensor(items).clamp(min=1)
    for metric in (outputs.label_mask, outputs.entropy.detach(), outputs.is_top1):
        metric.sum()
    return loss


def own_optimizer(model, job: Job) -> torch.optim.Optimizer | None:
    """What is handed to a Trainer as ``optimizers`` where ``TrainingArguments.optim`` has no name for it: made of all
    that is trained, in the model's order."""
    if OPTIMIZERS[job.optimizer].named_by_transformers:
        return None
    return OPTIMIZERS[job.optimizer].make([p for p in model.parameters() if p.requires_grad])


def _groups(model) -> list[dict]:
    """``Trainer.create_optimizer``: weights that decay, then those that do not."""
    decay = set(transformers.Trainer.get_decay_parameter_names(None, model))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name in decay], "weight_decay": 0.0},
        {"params": [p for name, p in named if name not in decay], "weight_decay": 0.0},
    ]


def _embeddings(model) -> list[torch.nn.Parameter]:
    """Whose state ``Trainer.create_optimizer`` keeps in 32 bits with an 8-bit optimiser."""
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]


class _NoKernel:
    """A Triton kernel that writes where it was told and allocates nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def _fused_head(model):
    """``add_fused_lm_head`` as SFTTrainer calls it, with its Triton kernels and fp32 products as on a card.

    trl/kernels/chunked_logprob.py: the kernels fold tiles in place; ``_addmm_fp32`` is ``addmm(out=…)``, no temporary.
    """
    import trl.kernels.chunked_logprob as kernels
    import trl.trainer.utils as utils

    values = {
        (kernels, "_forward_kernel"): _NoKernel(),
        (kernels, "_backward_kernel"): _NoKernel(),
        (kernels, "_use_triton"): lambda device: True,
        (kernels, "_addmm_fp32"): lambda acc, a, b: None,
        (kernels, "range"): sym_range,
        (kernels, "triton"): type("triton", (), {"cdiv": staticmethod(lambda a, b: -(-a // b))}),
        (utils, "_use_triton"): lambda device: True,
    }
    with contextlib.ExitStack() as undo:
        for (module, name), value in values.items():
            undo.enter_context(replaced(module, name, value))
        utils.add_fused_lm_head(base_of(model), outputs=("log_probs", "entropy", "is_top1"))
        yield
