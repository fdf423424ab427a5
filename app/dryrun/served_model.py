"""A model as a server loads it: its weights one by one, its text model's sizes, the peak of a forward pass.

An engine of its own (vLLM, SGLang) has classes of its own, which hold the same matrices and compute the same products.
What is read off here is what both share; what the engine adds, :mod:`vramplan.serving` knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..errors import PlanError
from ..job import Job
from ..memory.events import TraceColumns, TraceLog
from ..memory.kernel_facts import KernelFacts
from ..memory.sizes import SYMBOLS, ShapePoint
from ..memory.template import TraceTemplate, packed
from .build.loading import MetaWeights, load
from .build.model import base_of
from .build.prequantized import quantization_config_of, stored_matrices
from .cuda.as_if_cuda import as_if_cuda
from .cuda.card_facts import Card
from .diagnose import explain_stack_errors
from .inputs import make_batch
from .known_values import KnownValues
from .repeat_layers import folded_log
from .symbols import Conditions, symbol, symbol_guards
from .trace import with_values
from .tracker import MemoryTracker

PREFILL = "prefill"
"""Name of the phase of the forward pass."""
SIZES = (
    "attention_chunk_size decoder_layers global_head_dim head_dim hidden_size index_topk kv_lora_rank layer_types "
    "max_position_embeddings multi_query new_decoder_architecture num_attention_heads num_global_key_value_heads "
    "num_hidden_layers num_key_value_heads num_kv_heads num_kv_shared_layers partial_rotary_factor qk_nope_head_dim "
    "qk_rope_head_dim rope_parameters sliding_window v_head_dim vocab_size"
).split()
"""Fields of a text model's config that decide what a server's cache holds; under their common names, which
transformers maps to a class's own."""
STATES = ("layers_block_type", "mamba_d_state", "mamba_num_heads", "ssm_state_size", "state_size", "time_step_rank")
"""Fields of a config whose model keeps a state beside, or instead of, keys and values."""


TASKS = ("causal-lm", "image-text-to-text")
"""Tasks whose models a server generates with, by a decoder alone."""
KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layers whose forward pass is worth running: a server's cache of others is not modelled."""


def trace(
    part: str,
    job: Job,
    config: dict,
    capability: tuple[int, int],
    multiprocessors: int,
    measured: KernelFacts = KernelFacts(),
) -> bytes:
    """What a server loads of a model and (``part``: ``served``, not ``listed``) the peak of its forward pass,
    :func:`packed`.

    ``weights``: (path, bytes in the job's dtype, bytes as stored, rows, columns, how it is split) of each parameter;
    ``text``: the sizes of the text model; ``forward``: bytes above the weights at the peak of a pass over the job's
    tokens, None where the class runs no such pass, ``workspace`` what it leaves behind; ``parameters``. Raises
    :class:`PlanError`.
    """
    base, task = base_of(config, job.task, job.dtype, job.attention)
    text = base.config.get_text_config(decoder=True)
    card = Card(capability, symbol(SYMBOLS[2], multiprocessors, Conditions()), measured)
    states = [name for name in STATES if getattr(text, name, None) is not None]
    kinds = set(getattr(text, "layer_types", None) or ())
    forward, workspace, why = None, 0, None
    if part == "served" and task in TASKS and not states and kinds <= KINDS:
        forward, workspace, why = _forward(base, job, task, card, multiprocessors)
    return packed(
        {
            "weights": [list(row) for row in _weights(base, text, config)],
            "text": {name: _plain(getattr(text, name, None)) for name in SIZES},
            "state": states,
            "encoder_decoder": bool(base.config.is_encoder_decoder),
            "tower": text is not base.config,
            "class": type(base).__name__,
            "parameters": sum(parameter.numel() for parameter in base.parameters()),
            "forward": forward,
            "workspace": workspace,
            "unplanned": why,
        }
    )


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    return value if isinstance(value, (int, float, str, list, dict, type(None))) else str(value)


def _weights(base: torch.nn.Module, text: Any, config: dict) -> Iterator[tuple[str, int, int, int, int, str]]:
    """Each parameter once, tied ones where they come first."""
    stored = dict(stored_matrices(base, quantization_config_of(config) or {}))
    tables = {id(module) for module in (base.get_input_embeddings(), base.get_output_embeddings())}
    plan = _split_by(getattr(text, "base_model_tp_plan", None) or {})
    seen: set[int] = set()
    for path, module in base.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            fqn = f"{path}.{name}"
            size = parameter.numel() * parameter.element_size()
            rows, columns = (*parameter.shape[-2:], 1)[:2] if parameter.dim() else (1, 1)
            split = "table" if id(module) in tables else plan(path if parameter.dim() < 3 else fqn)
            kept = stored.get(path if name == "weight" else fqn, size)
            yield fqn, size, kept, rows, columns, "" if name == "bias" and split == "rows" else split


COLUMNS = (
    "c_attn c_fc dense_h_to_4h fc1 gate_proj gate_up_proj k_proj kv_b_proj q_b_proj q_proj qkv_proj query_key_value "
    "up_proj v_proj"
).split()
ROWS = "attention.dense c_proj dense_4h_to_h down_proj fc2 o_proj out_proj self_attention.dense".split()
"""Linear layers by the last part of their path, as vLLM's classes split them: ``ColumnParallelLinear`` (and the merged
ones) and ``RowParallelLinear``. A class's own plan in transformers comes first; latent attention is not in it.

Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/model_executor/layers/linear.py
"""


def _split_by(plan: dict[str, str]) -> Callable[[str], str]:
    """How tensor parallelism splits the module at a path: by ``columns`` (its outputs), by ``rows``, or not (empty)."""
    rules = [(re.compile(re.escape(key).replace(r"\*", r"\d+") + "$"), style) for key, style in plan.items()]
    rules = [rule for rule in rules if "colwise" in rule[1] or "rowwise" in rule[1]]

    def split(path: str) -> str:
        style = next((style for pattern, style in rules if pattern.search(path)), "")
        if "colwise" in style or path.endswith(tuple(f".{name}" for name in COLUMNS)):
            return "columns"
        return "rows" if "rowwise" in style or path.endswith(tuple(f".{name}" for name in ROWS)) else ""

    return split


def _forward(
    base: torch.nn.Module, job: Job, task: str, card: Card, multiprocessors: int
) -> tuple[int | None, int, str | None]:
    """Bytes above the weights at the peak of the text model's forward pass, and after it; else None, 0 and why."""
    try:
        log, _ = with_values(lambda values: _forward_log(base, job, task, card, values), job, None)
    except PlanError as error:
        return None, 0, error.message
    at = TraceTemplate.of(log, Conditions()).at(ShapePoint(job.batch_size, job.sequence_length or 1, multiprocessors))
    events, sizes = at.template.events, at.sizes
    held = np.cumsum(np.where(events >= 0, sizes[events], -sizes[~events]))
    start = next(mark.at for mark in at.template.marks if mark.name == PREFILL)
    before = int(held[start - 1])
    return int(held[start:].max()) - before, int(held[-1]) - before, None


def _forward_log(base: torch.nn.Module, job: Job, task: str, card: Card, values: KnownValues | None) -> TraceColumns:
    """The log of placing the model and passing the job's tokens through its decoder, without a cache."""

    def run(model: torch.nn.Module) -> TraceLog:
        tracker = MemoryTracker(card, job.attention_mask, job.sequence_length or 0)
        with as_if_cuda(card):
            model = load(model, job, task, tracker, MetaWeights())
            follow = tracker.track_values(values) if values else torch.no_grad()
            with tracker.watching(model), torch.no_grad(), follow:
                tracker.mark("load", 0, "inputs")
                tokens = make_batch(tracker, model, job, task)["input_ids"]
                tracker.mark(PREFILL, 1, "activations")
                hidden = model.get_decoder()(input_ids=tokens, use_cache=False)
                tracker.mark("end", 1, "temporaries")
                del hidden, tokens
        return tracker.close()

    with explain_stack_errors(base, job, values is not None), symbol_guards():
        return folded_log(base, run).columns()
