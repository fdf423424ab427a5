"""Job and config in, books out: the whole dry run, with the facts and the table that come from the same model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from app.dryrun import cuda, layers
from app.dryrun.fold import folded_books
from app.dryrun.model import build_base, is_skipped, read_config, task_of
from app.dryrun.step import dry_run
from app.dryrun.trace import DataDependent
from app.errors import PlanError
from app.job import Job
from app.memory.event import Books


@dataclass(frozen=True)
class Traced:
    """What a dry run leaves: books, the model's facts, the per-layer table (whole and grouped) and warnings."""

    books: Books
    facts: dict
    layers: list[layers.Layer]
    layer_groups: list[layers.Layer]
    warnings: list[str]


def books_of(job: Job, config: dict, capability: tuple[int, int], multiprocessors: int) -> Books:
    """The books of ``job`` (resolved) alone, as a card of this capability keeps them. Raises :class:`PlanError`."""
    base, task = _base(job, config)
    return _books(base, job, task, cuda.Card(capability, multiprocessors))


_DEQUANTIZED = ("fp8", "mxfp4", "fbgemm_fp8")
"""Checkpoints that transformers can dequantise as it loads them (``dequantize=True``)."""


def _stored_quantization(config: dict) -> str | None:
    """How a checkpoint's weights are stored, where not as plain numbers (``quantization_config``)."""
    for part in (config, config.get("text_config")):
        stored = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(stored, dict):
            return str(
                stored.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in stored else "an unnamed method")
            )
    return None


def _base(job: Job, config: dict):
    stored = _stored_quantization(config)
    if stored is not None and stored not in _DEQUANTIZED:
        raise PlanError(
            f"this checkpoint is already quantised with {stored}, whose layers are not modelled",
            "plan the model it was made from, with method qlora",
            "model",
        )
    configuration = read_config(config, job.attention)
    task = job.task or task_of(configuration)
    _check_length(job, configuration, task)
    return build_base(configuration, task, getattr(torch, job.dtype)), task


def trace(job: Job, config: dict, capability: tuple[int, int], multiprocessors: int) -> Traced:
    """Run ``job`` (resolved) on the meta device as a card of this capability would, and describe the model.

    Raises :class:`PlanError`.
    """
    card = cuda.Card(capability, multiprocessors)
    base, task = _base(job, config)
    skip = job.quantization.skip_modules if job.quantization else ()
    rows = layers.weights_table(base, skip)
    facts = {
        "task": task,
        "class": type(base).__name__,
        "model_type": base.config.model_type,
        "parameters": sum(row.parameters for row in rows),
        "supports_checkpointing": bool(base.supports_gradient_checkpointing),
        "attention": base.config._attn_implementation or "eager",
    }
    warnings = _weight_warnings(job, base)
    if _stored_quantization(config):
        warnings.append(
            f"the checkpoint is stored as {_stored_quantization(config)}: planned as dequantised to {job.dtype} on load"
        )
    spare = copy.deepcopy(base) if job.method != "inference" and base.supports_gradient_checkpointing else None
    books = _books(base, job, task, card)
    warnings += _kernel_warnings(job, task, facts["attention"], books)
    checkpointed = job.gradient_checkpointing != "off"
    other = None
    if spare is not None:
        flipped = job.model_copy(update={"gradient_checkpointing": "off" if checkpointed else "non_reentrant"})
        other = _books(spare, flipped, task, card, forward_only=True)
    facts["trainable_parameters"] = _trainable(books, job)
    facts["optimizer_state"] = _state_bytes(books)
    table = layers.with_costs(rows, books, other, checkpointed)
    return Traced(books, facts, table, layers.group(table), warnings)


def _books(model, job: Job, task: str, card: cuda.Card, forward_only: bool = False) -> Books:
    """The books of ``job`` on the bare ``model``, folded; what the stack itself refuses is told as such."""
    names = (
        *(job.lora.target_modules or () if job.lora and job.lora.target_modules != "all-linear" else ()),
        *(job.lora.modules_to_save if job.lora else ()),
        *(job.quantization.skip_modules if job.quantization else ()),
    )
    try:
        return folded_books(model, lambda m: dry_run(m, job, task, card, 2, forward_only), names)
    except PlanError:
        raise
    except DataDependent as error:
        raise PlanError(
            f"{type(model).__name__} computes with values that a dry run does not have, at {error.where}",
            "its weights can be planned, its activations cannot",
            "model",
        ) from None
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise PlanError(
            f"{type(model).__name__} does not run this job: {type(error).__name__}: {text}",
            "the installed transformers would fail the same way on a GPU; change the job",
            "model",
        ) from None


def _check_length(job: Job, configuration, task: str) -> None:
    text = configuration.get_text_config()
    speech = task == "speech-seq2seq"
    limit = getattr(text, "max_target_positions" if speech else "max_position_embeddings", None)
    if not isinstance(limit, int) or job.sequence_length is None or task == "image-classification":
        return
    length = job.sequence_length + (job.new_tokens or 0 if job.method == "inference" else 0)
    if 0 < limit < length:
        raise PlanError(
            f"a sequence of {length} tokens is longer than this model's {limit} positions",
            f"set sequence_length to at most {limit}",
            "sequence_length",
        )


def _trainable(books: Books, job: Job) -> int:
    """How many parameters are trained: the gradients' elements, each of its parameter's dtype (fp32 for adapters
    unless the trainer casts them)."""
    if job.method == "inference":
        return 0
    if job.method == "full":
        return (
            sum(a.size for a in books.allocations if a.kind == "weights" and a.op == "place")
            // getattr(torch, job.dtype).itemsize
        )
    return sum(a.size for a in books.allocations if a.kind == "adapters" and a.op == "place") // 4


def _state_bytes(books: Books) -> int:
    """The bytes of the tensors in ``optimizer.state`` on the card, summed as a script would sum them.

    bitsandbytes (optim/optimizer.py ``init_state``) gives every 8-bit state, beside an absmax of its own
    (``torch.zeros``), one code book of 1024 bytes that all parameters share: it counts once for each.
    """
    states = [a for a in books.allocations if a.kind == "optimizer_state"]
    scales = sum(a.op == "zeros.default" for a in states)
    shared = sum(a.op == "_to_copy.default" and a.size == 1024 for a in states)
    return sum(a.size for a in states) + 1024 * max(scales - shared, 0)


def _kernel_warnings(job: Job, task: str, attention: str, books: Books) -> list[str]:
    """What the kernels of this job do that a user may not expect, or that the number cannot know."""
    out = []
    ops = {allocation.op for allocation in books.allocations}
    if attention == "eager" and job.attention is None:
        out.append(
            "this model's class has no sdpa attention: transformers runs eager attention, which keeps its scores"
        )
    if attention == "sdpa" and "_safe_softmax.default" in ops:
        out.append(
            "scaled_dot_product_attention falls back to PyTorch's math kernel, which keeps length × length scores: "
            "the fused kernels refuse these queries (float32 with grouped heads, or a strided mask). "
            "Autocast (mixed_precision bf16) or 16-bit activations avoid it"
        )
    if "run_conv_plan" in ops:
        out.append(
            "convolutions: cuDNN's workspace is that of its channels-last kernels; other choices take other amounts"
        )
    if task == "image-text-to-text":
        out.append("planned on text alone: image tokens count as tokens of the sequence, the vision tower is not run")
    if job.quantization is not None and job.quantization.type == "int8":
        out.append(
            "LLM.int8 keeps a copy of every outlier column (values of 6 and more); how many there are depends on the "
            "weights and is taken to be none"
        )
    return out


def _weight_warnings(job: Job, model) -> list[str]:
    """What a quantised job would not expect: modules that bitsandbytes leaves as they are, and what is cast."""
    out = []
    if job.quantization is not None:
        from transformers.quantizers.base import get_keys_to_not_convert

        skip = [*get_keys_to_not_convert(model), *job.quantization.skip_modules]
        itemsize = getattr(torch, job.dtype).itemsize
        total = quantized = 0
        for path, module in model.named_modules():
            own = sum(p.numel() for p in module._parameters.values() if p is not None)
            total += own
            if type(module) is torch.nn.Linear and not is_skipped(path, skip):
                quantized += module.weight.numel()
        left = (total - quantized) * itemsize
        if total and quantized / total < 0.5:
            out.append(
                f"bitsandbytes quantises {100 * quantized / total:.1f} % of this model's parameters only: "
                f"{left / 2**30:.1f} GiB stay in {job.dtype} (fused experts and layers that are no nn.Linear). "
                "Budget for them in 16 bit, or choose a dense model"
            )
        if job.prepare_for_kbit_training and job.dtype != "float32":
            out.append(
                f"prepare_model_for_kbit_training casts what is not quantised to float32: "
                f"{2 * left / 2**30:.1f} GiB instead of {left / 2**30:.1f} GiB"
            )
    return out
