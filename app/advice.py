"""What to change so that a job fits: single changes as patches of the job, each with what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from app.job import Job


@dataclass(frozen=True)
class Change:
    """A patch of the job's fields. ``rank`` orders what fits: the least that a user would mind first."""

    title: str
    patch: dict[str, Any]
    cost: str
    changes_objective: bool
    rank: int


def changes(job: Job) -> Iterator[Change]:
    """The single changes that ``job`` (resolved) leaves open; what each saves is for a plan to say."""
    for rule in _RULES:
        change = rule(job)
        if change is not None:
            yield change


def _fused(job: Job) -> Change | None:
    if job.optimizer not in ("adamw_torch", "adamw_torch_forloop"):
        return None
    return Change("fused AdamW", {"optimizer": "adamw_torch_fused"}, "none: one kernel instead of many", False, 0)


def _expandable(job: Job) -> Change | None:
    if job.allocator.expandable_segments:
        return None
    patch = {"allocator": {**job.allocator.model_dump(), "expandable_segments": True}}
    return Change("expandable segments", patch, "none: PYTORCH_ALLOC_CONF=expandable_segments:True", False, 0)


def _double_quant(job: Job) -> Change | None:
    if job.quantization is None or job.quantization.double_quant or job.quantization.type == "int8":
        return None
    patch = {"quantization": {**job.quantization.model_dump(), "double_quant": True}}
    return Change("double quantisation", patch, "constants are dequantised too: a little more work a layer", False, 1)


def _sdpa(job: Job) -> Change | None:
    if job.attention != "eager":
        return None
    return Change("sdpa attention", {"attention": "sdpa"}, "none: fused kernels", False, 0)


def _autocast(job: Job) -> Change | None:
    if job.mixed_precision != "no" or job.method == "inference" or not job.prepare_for_kbit_training:
        return None
    return Change("bf16 autocast", {"mixed_precision": "bf16"}, "matrix products in bf16 instead of float32", False, 1)


def _checkpointing(job: Job) -> Change | None:
    if job.gradient_checkpointing != "off" or job.method == "inference":
        return None
    patch = {"gradient_checkpointing": "non_reentrant"}
    return Change("gradient checkpointing", patch, "one more forward pass: about a third more compute", False, 2)


def _accumulate(job: Job) -> Change | None:
    if job.batch_size < 2 or job.method == "inference":
        return None
    patch = {"batch_size": 1, "gradient_accumulation_steps": job.gradient_accumulation_steps * job.batch_size}
    return Change("batch 1 with accumulation", patch, "the same sum of gradients in more, smaller passes", False, 2)


def _chunked_loss(job: Job) -> Change | None:
    if job.trainer == "trl" or job.method == "inference" or job.task not in (None, "causal-lm"):
        return None
    patch = {"trainer": "trl", "mixed_precision": "bf16"}
    return Change("TRL's chunked loss", patch, "logits are computed twice, in tiles", False, 3)


def _eight_bit(job: Job) -> Change | None:
    if job.method == "inference" or not (job.optimizer or "").startswith("adamw_torch"):
        return None
    return Change("8-bit AdamW", {"optimizer": "adamw_8bit"}, "states rounded to 8 bits in blocks of 256", False, 3)


def _paged(job: Job) -> Change | None:
    if job.method == "inference" or not (job.optimizer or "").startswith("adamw"):
        return None
    patch = {"optimizer": "paged_adamw_8bit"}
    return Change(
        "paged 8-bit AdamW", patch, "states live in host memory when the card is full: PCIe traffic", False, 4
    )


def _one_sequence(job: Job) -> Change | None:
    if job.batch_size < 2 or job.method != "inference":
        return None
    return Change("batch 1", {"batch_size": 1}, "one sequence at a time", False, 3)


def _qlora(job: Job) -> Change | None:
    if job.method != "lora":
        return None
    patch = {
        "method": "qlora",
        "quantization": {"type": "nf4", "double_quant": True},
        "prepare_for_kbit_training": None,
    }
    return Change("NF4 weights (QLoRA)", patch, "weights rounded to 4 bits, dequantised in each pass", True, 5)


def _lora(job: Job) -> Change | None:
    if job.method != "full":
        return None
    patch = {"method": "lora", "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"}}
    return Change("LoRA instead of full", patch, "adapters of rank 16 are trained, the weights are not", True, 6)


def _quantized(job: Job) -> Change | None:
    if job.method != "full":
        return None
    patch = {"method": "qlora", "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"}}
    return Change("QLoRA instead of full", patch, "4-bit weights and adapters of rank 16", True, 7)


def _shorter(job: Job) -> Change | None:
    if job.sequence_length is None or job.sequence_length < 2:
        return None
    patch = {"sequence_length": job.sequence_length // 2}
    return Change("half the length", patch, "longer examples are cut", True, 8)


_RULES: tuple[Callable[[Job], Change | None], ...] = (
    _fused, _expandable, _double_quant, _sdpa, _autocast, _checkpointing, _accumulate, _chunked_loss, _eight_bit,
    _paged,
    _one_sequence, _qlora, _lora, _quantized, _shorter,
)  # fmt: skip
