"""vLLM (0.33.0): what ``vllm serve`` does with a card's memory before it takes a request.

It asks for a share of the card, loads the weights, runs one pass over ``max_num_batched_tokens`` dummy tokens and the
sampler over ``max_num_seqs`` rows, and gives what is left to the KV cache. It refuses where a request of
``max_model_len`` tokens would not fit that.

Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/v1/worker/gpu_worker.py ``determine_available_memory``.
https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/v1/worker/gpu/model_runner.py#L993 ``_dummy_sampler_run``.
"""

from __future__ import annotations

import math
from typing import Any

from ..catalog.gpus import Gpu
from ..job import OwnGpu
from ..planning.cards import known, outside_of, usable
from . import kv_cache
from .amounts import GIB, Amount
from .cache_layers import cache_layers, itemsize_of
from .command import Command
from .named_model import look_at
from .rank_weights import Served, adapters, cache_heads, stages, weights_of_stage
from .vllm_settings import Settings, batch_of, derived_length, dtype_of, quantised, refuse_drafts, settings_of

VERSION = "0.33.0"
GRAPHS_COUNTED = "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS"
"""The environment variable that says whether graphs are taken off the cache (they are)."""
FUSED_SAMPLER = (7, 5)
"""The compute capability from which FlashInfer samples."""

MEASURED = "llm-d-planner's docs/empirical-vllm-memory-results.md: eight starts of vLLM 0.11 on H100"
NOT_TORCH = {1: Amount(int(0.13 * GIB), int(0.13 * GIB), int(0.14 * GIB)), 2: Amount(*[int(0.55 * GIB)] * 3)}
"""By ranks (2: several): what the worker takes outside PyTorch after it looked at the free memory. Eight starts."""
GRAPHS = Amount(0, int(0.515 * GIB), int(1.03 * GIB))
"""CUDA graphs: from none to the most of those eight starts; the middle is planned, for what they take is measured only
while they are captured."""
ACTIVATION_SHARES = (0.43, 1.02)
"""The least and the most that the profile run took, of what is planned. Of those eight starts seven took 1.00 to 1.02
of it, Mistral-Small-3.2 0.43 (its page does not say with how many sequences)."""


def plan(command: Command, config: dict, card: Gpu | OwnGpu) -> dict[str, Any]:
    """The answer to a ``vllm serve`` command on ``card``, without what is said of where it came from."""
    refuse_drafts(command)
    config = quantised(config, command.given.get("quantization"))
    dtype = dtype_of(command, config, card)
    tokens, seqs = batch_of(command, card, derived_length(config))
    model = look_at(config, card, dtype, (seqs, -(-tokens // seqs)))
    settings = settings_of(command, config, model, dtype, tokens, seqs)
    layers = cache_layers(model, settings, command)
    return _answer(command, model, settings, layers, card)


def rotary_tables(model: Served, itemsize: int) -> int:
    """Bytes of the cosines and sines that a worker keeps for every position, once for each kind of rotary embedding.

    Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/model_executor/layers/rotary_embedding/base.py
    """
    text, rope = model.text, model.text.get("rope_parameters")
    positions, heads = text["max_position_embeddings"], text["num_attention_heads"]
    if not rope or not positions:
        return 0
    width = text.get("qk_rope_head_dim") or text.get("head_dim") or text["hidden_size"] // heads
    kinds = list(rope.values()) if all(isinstance(value, dict) for value in rope.values()) else [rope]
    total = 0
    for kind in kinds:
        scaled = (kind.get("rope_type") in ("linear", "dynamic", "yarn") and kind.get("factor")) or 1
        base = kind.get("original_max_position_embeddings") if kind.get("rope_type") == "yarn" else None
        share = kind.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 1
        total += int((base or positions) * scaled) * int(width * share) * itemsize
    return total


def sampler(model: Served, settings: Settings, card: Gpu | OwnGpu) -> tuple[int, int]:
    """Bytes that the sampler keeps, and the most that it takes for a moment over ``max_num_seqs`` rows of logits.

    It keeps a count of each token for penalties, and a bit of each. A moment has the logits, a copy in 32 bits, and
    (FlashInfer) the copy with a mask and its softmax; Triton's kernel masks in place.
    Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/v1/worker/gpu/sample/penalties.py#L43
    """
    rows, words = settings.max_num_seqs, model.text["vocab_size"]
    chip = known(card)
    fused = chip is None or chip.compute_capability is None or chip.compute_capability >= FUSED_SAMPLER
    kept = rows * (words * 4 + -(-words // 32) * 4)
    return kept, rows * words * (itemsize_of(settings.dtype) + (12 if fused else 4))


def _answer(
    command: Command, model: Served, settings: Settings, layers: list[kv_cache.CacheLayer], card: Gpu | OwnGpu
) -> dict[str, Any]:
    parts = [_stage(command, model, settings, card, stage) for stage in stages(len(layers), settings.stages)]
    pools = [
        kv_cache.pool_of([layers[n] for n in stage if layers[n].bytes_per_token])
        for stage in stages(len(layers), settings.stages)
    ]
    total = usable(card)
    requested = math.ceil(total * settings.utilization)
    fixed = command.number("kv-cache-memory-bytes", None)
    each = [Amount.sum(one.values()) for one in parts]
    left = [Amount(*[fixed] * 3) if fixed else Amount(requested, requested, requested) - used for used in each]
    worst = min(range(len(left)), key=lambda n: left[n].expected // max(pools[n].bytes_per_block, 1))
    return _verdict(command, settings, card, parts[worst], left[worst], pools[worst], requested) | {
        "ranks": settings.ranks * settings.stages,
        "stages": [{name: part.expected for name, part in one.items()} for one in parts],
        "model_class": model.model_class,
        "parameters": model.parameters,
        "warnings": _warnings(model, card),
    }


def _stage(command: Command, model: Served, settings: Settings, card: Gpu | OwnGpu, stage: range) -> dict[str, Amount]:
    """What a rank of one stage takes before the cache, by kind."""
    count, item = model.text["num_hidden_layers"], itemsize_of(settings.dtype)
    kv_ranks = min(settings.ranks, cache_heads(model))
    weights = weights_of_stage(model, stage, count - 1, settings.ranks, kv_ranks)
    offloaded = int(command.number("cpu-offload-gb", 0.0, float) * GIB)
    tokens, width = settings.max_num_batched_tokens, model.text["hidden_size"]
    stream = 2 * tokens * width * item
    forward = (model.forward or 0) - model.workspace
    forward = max(stream, stream + (forward - stream) // settings.ranks)
    kept, moment = sampler(model, settings, card) if count - 1 in stage else (0, 0)
    activation = max(forward, tokens * width * item + moment)
    low, high = ACTIVATION_SHARES
    out = {
        "weights": Amount.exact(max(weights - offloaded, 0)),
        "buffers": Amount.exact(rotary_tables(model, item) + kept + model.workspace),
        "activations": Amount(int(activation * low), activation, int(activation * high)),
        "graphs": _graphs(command),
        "outside": NOT_TORCH[min(settings.ranks * settings.stages, 2)],
    }
    if command.given.get("enable-lora"):
        slots, rank = command.number("max-loras", 1), command.number("max-lora-rank", 16)
        out["adapters"] = Amount.exact(adapters(model, stage, slots, rank, settings.ranks, item))
    return out


def _graphs(command: Command) -> Amount:
    if command.given.get("enforce-eager") or command.environment.get(GRAPHS_COUNTED) == "0":
        return Amount.exact(0)
    return GRAPHS


def _warnings(model: Served, card: Gpu | OwnGpu) -> list[str]:
    out = [f"activations, graphs and what lies outside PyTorch are intervals from {MEASURED}"]
    if model.unplanned:
        out.append(f"the forward pass is not planned ({model.unplanned}): activations are the sampler's alone")
    if model.tower:
        out.append("the encoder of images or sound is not run: its moment counts where it is the highest")
    return out


def _verdict(
    command: Command,
    settings: Settings,
    card: Gpu | OwnGpu,
    parts: dict[str, Amount],
    left: Amount,
    pool: kv_cache.Pool,
    requested: int,
) -> dict[str, Any]:
    free = usable(card) - outside_of(card).expected
    override = command.number("num-gpu-blocks-override", None)
    if override is not None:
        left = Amount.exact(override * pool.bytes_per_block)
    length, flight = settings.max_model_len, settings.in_flight
    if settings.fitted:
        length = pool.longest(left.expected, length, flight) or 1
    needed = pool.needed(length, flight)
    starts = [needed <= have for have in left]
    message = None if starts[1] else refusal(settings, pool, left.expected, needed)
    if requested > free and not command.given.get("kv-cache-memory-bytes"):
        starts, message = [False] * 3, _too_little_free(settings, free, usable(card), requested)
    used = Amount.sum(parts.values())
    return {
        "verdict": "starts" if all(starts) else "tight" if any(starts) else "refuses",
        "message": message,
        "requested": requested,
        "total": usable(card),
        "parts": {name: part.expected for name, part in parts.items()},
        "intervals": {name: [part.low, part.high] for name, part in parts.items()},
        **cache_of(pool, left, length, flight),
        "longest": pool.longest(left.expected, settings.max_model_len, flight),
        "utilization_needed": utilization_needed(usable(card), free, used.expected + needed),
        "settings": {**settings.__dict__, "max_model_len": length},
    }


def cache_of(pool: kv_cache.Pool, left: Amount, length: int, in_flight: int) -> dict[str, Any]:
    """What the bytes that are ``left`` hold: blocks, tokens, requests of ``length`` tokens.

    Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/v1/core/kv_cache_utils.py#L1120
    ``get_kv_cache_capacity``.
    """
    blocks = [max(have, 0) // pool.bytes_per_block if pool.bytes_per_block else 0 for have in left]
    per_request = pool.blocks(length, in_flight) or 1
    tokens = [int(count / per_request * length) for count in blocks]
    groups = [
        {
            "kind": group.layer.kind,
            "layers": group.layers,
            "block_size": group.layer.block_size,
            "bytes_per_token": group.layer.bytes_per_token,
            "reach": group.layer.reach or None,
        }
        for group in pool.groups
    ]
    cache = {
        "available": left.expected,
        "available_interval": [left.low, left.high],
        "blocks": blocks[1],
        "tokens": tokens[1],
        "tokens_interval": [tokens[0], tokens[2]],
        "bytes_per_block": pool.bytes_per_block,
        "groups": groups,
    }
    return {"kv_cache": cache, "concurrency": round(blocks[1] / per_request, 2)}


def _too_little_free(settings: Settings, free: int, total: int, requested: int) -> str:
    return (
        f"Free memory on device cuda:0 ({free / GIB:.2f}/{total / GIB:.2f} GiB) on startup is less than desired GPU "
        f"memory utilization ({settings.utilization:g}, {requested / GIB:.2f} GiB)."
    )


def refusal(settings: Settings, pool: kv_cache.Pool, available: int, needed: int) -> str:
    """vLLM's own words where the cache is too small.

    Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/v1/core/kv_cache_planning.py#L50
    """
    usable_bytes = available - pool.bytes_per_block
    if usable_bytes <= 0:
        return "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."
    longest = pool.longest(available, settings.max_model_len, settings.in_flight)
    estimated = f"the estimated maximum model length is {longest}. " if longest else ""
    return (
        f"To serve at least one request with the model's max seq len ({settings.max_model_len}), "
        f"({(needed - pool.bytes_per_block) / GIB:.2f} GiB KV cache is needed, which is larger than the available "
        f"KV cache memory ({usable_bytes / GIB:.2f} GiB). {estimated}Try increasing `gpu_memory_utilization` "
        "or decreasing `max_model_len`."
    )


def utilization_needed(total: int, free: int, used: int) -> float | None:
    """The least utilisation, to four places, with which the server starts; None: no share of this card does."""
    share = math.ceil(used / total * 10_000) / 10_000
    return share if share <= 1 and math.ceil(total * share) <= free else None
