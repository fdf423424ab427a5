"""SGLang (0.5.23): what ``python -m sglang.launch_server`` leaves to its KV cache.

It names a share of the card for weights and cache (``mem_fraction_static``), from what it reserves for activations and
graphs by a rule of thumb, loads the weights, and gives the rest of the share to the cache. Nothing is profiled.

Source: https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/arg_groups/memory_hook.py
``handle_gpu_memory_settings``.
https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/mem_cache/kv_cache_configurator.py
``_profile_available_bytes``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..catalog.gpus import MIB, Gpu
from ..errors import PlanError
from ..job import OwnGpu
from ..planning.cards import known, outside_of, usable
from .amounts import Amount
from .cache_layers import cache_layers
from .command import Command
from .kv_cache import SLIDING, CacheLayer
from .named_model import look_at
from .rank_weights import Served, cache_heads, stages, weights_of_stage
from .vllm import rotary_tables
from .vllm_settings import derived_length, dtype_of, quantised

VERSION = "0.5.23"
CHUNKS = ((20, 2048, 8, 8), (35, 4096, 48, 160), (60, 4096, 32, 160), (160, 8192, 256, 512), (1 << 20, 16384, 512, 512))
"""GiB of the card up to which a row holds; tokens of a prefill chunk; requests of the largest decode graph, below four
ranks and from four on."""
PREFILL_GRAPHS = (
    *range(4, 33, 4),
    *range(48, 257, 16),
    *range(288, 513, 32),
    *range(576, 1025, 64),
    *range(1280, 4097, 256),
    *range(4608, 16385, 512),
)
"""Tokens for which prefill graphs are captured, up to a chunk."""
ROTARY = 4
"""Bytes of a number of the tables of rotary embeddings, which stay in 32 bits on CUDA."""
SLIDING_SHARE = 0.8
"""Tokens of sliding layers for a token of full ones."""


@dataclass(frozen=True)
class Settings:
    """The settings of a start that decide its memory, with SGLang's defaults filled in."""

    max_model_len: int
    ranks: int
    stages: int
    dtype: str
    cache_dtype: str
    block_size: int
    chunked_prefill_size: int
    cuda_graph_max_bs: int
    mem_fraction_static: float
    sliding_share: float


def plan(command: Command, config: dict, card: Gpu | OwnGpu) -> dict[str, Any]:
    """The answer to a ``sglang.launch_server`` command on ``card``, without what is said of where it came from."""
    config, dtype = quantised(config, command.given.get("quantization")), dtype_of(command, config, card)
    chunk, graphs = _batch(command, card)
    model = look_at(config, card, dtype)
    settings = _settings(command, config, model, dtype, chunk, graphs, card)
    layers = cache_layers(model, settings, command)
    return _answer(command, model, settings, layers, card)


def _capacity(card: Gpu | OwnGpu) -> int:
    """MiB of the card as nvidia-smi tells them."""
    return ((isinstance(card, Gpu) and card.smi_memory) or usable(card)) // MIB


def _batch(command: Command, card: Gpu | OwnGpu) -> tuple[int, int]:
    """Tokens of a prefill chunk, and requests of the largest decode graph."""
    limit = _capacity(card)
    _, chunk, few, many = next(row for row in CHUNKS if limit < row[0] * 1024)
    graphs = few if command.number("tp-size", 1) < 4 else many
    running = command.number("max-running-requests", None)
    graphs = min(graphs, running) if running else graphs
    graphs = command.number("cuda-graph-max-bs", graphs)
    return command.number("chunked-prefill-size", chunk), command.number("cuda-graph-max-bs-decode", graphs)


def _settings(
    command: Command, config: dict, model: Served, dtype: str, chunk: int, graphs: int, card: Gpu | OwnGpu
) -> Settings:
    ranks, depth = command.number("tp-size", 1), command.number("pp-size", 1)
    heads = model.text["num_attention_heads"]
    if not 1 <= depth <= 1024 or ranks < 1 or heads % ranks:
        raise PlanError(f"{heads} heads are not split over {ranks} ranks", "choose a divisor", "command")
    length = command.number("context-length", derived_length(config, model.text["max_position_embeddings"] or 2048))
    if length < 1:
        raise PlanError(f"--context-length is {length}", "it has at least one token", "command")
    share = command.number("mem-fraction-static", None, float)
    if share is None:
        reserve = reserved(command, model, chunk, graphs, ranks * depth, _capacity(card))
        share = round((_capacity(card) - reserve) / _capacity(card), 3)
        share = share * _tower_factor(config) if isinstance(config.get("vision_config"), dict) else share
    if not 0 < share < 1:
        raise PlanError(f"--mem-fraction-static is {share:g}", "it lies between 0 and 1", "command")
    return Settings(
        max_model_len=length,
        ranks=ranks,
        stages=depth,
        dtype=dtype,
        cache_dtype=str(command.given.get("kv-cache-dtype", "auto")),
        block_size=1,
        chunked_prefill_size=chunk,
        cuda_graph_max_bs=graphs,
        mem_fraction_static=share,
        sliding_share=command.number("swa-full-tokens-ratio", SLIDING_SHARE, float),
    )


def reserved(command: Command, model: Served, chunk: int, graphs: int, ranks: int, capacity: int) -> float:
    """MiB that SGLang keeps from weights and cache: for attention's buffers, a chunk's activations, ranks, graphs."""
    off = command.given.get("disable-cuda-graph")
    total = 512 + max(chunk, 2048) * 1.5 + ranks / 8 * 1024
    if not (off or command.given.get("disable-decode-cuda-graph")):
        total += graphs * 2
    if not (off or command.given.get("disable-prefill-cuda-graph") or command.number("pp-size", 1) > 1):
        latent = model.text.get("kv_lora_rank") is not None
        total += 1536 if latent else 8 * sum(tokens <= chunk for tokens in PREFILL_GRAPHS)
    return max(total, 10 * 1024) if capacity > 60 * 1024 else total


def _tower_factor(config: dict) -> float:
    """What is left of the share where images are read: less for a larger encoder (``adjust_mem_fraction_for_vlm``)."""
    tower = config["vision_config"]
    size = (tower.get("num_hidden_layers") or 24) * (tower.get("hidden_size") or 1024) ** 2
    return 0.95 * max(0.8, min(1.05, 1.0 - 0.1 * (size / (24 * 1024**2) - 1.0)))


def _cell(layers: list[CacheLayer], settings: Settings) -> float:
    """Bytes of a token of the cache; of sliding layers beside full ones a share.

    Source: https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/model_executor/pool_configurator.py
    ``_recompute_cell_size``.
    """
    sliding = sum(layer.bytes_per_token for layer in layers if layer.kind == SLIDING)
    full = sum(layer.bytes_per_token for layer in layers if layer.kind != SLIDING)
    return full + settings.sliding_share * sliding if full else sliding


def _answer(
    command: Command, model: Served, settings: Settings, layers: list[CacheLayer], card: Gpu | OwnGpu
) -> dict[str, Any]:
    total, context = usable(card), outside_of(card)
    free = Amount(total - context.high, total - context.expected, total - context.low)
    share, count = settings.mem_fraction_static, model.text["num_hidden_layers"]
    kv_ranks = min(settings.ranks, cache_heads(model))
    loaded, rows = [], []
    for stage in stages(count, settings.stages):
        weights = weights_of_stage(model, stage, count - 1, settings.ranks, kv_ranks)
        loaded.append({"weights": weights, "buffers": rotary_tables(model, ROTARY)})
        left = Amount(*(int(have * share) - sum(loaded[-1].values()) for have in free))
        rows.append((left, _cell([layers[n] for n in stage], settings), loaded[-1]))
    left, cell, parts = min(rows, key=lambda row: row[0].expected / row[1])
    cap = command.number("max-total-tokens", None)
    tokens = [min(max(int(have / cell), 0), cap or 1 << 62) for have in left]
    least = math.ceil(sum(parts.values()) / free.expected * 1000) / 1000
    starts = [have > 0 for have in left]
    held = Amount(total - free.high, total - free.expected, total - free.low)
    kept = Amount(*(have - int(have * share) for have in free))
    return {
        "verdict": "starts" if all(starts) else "tight" if any(starts) else "refuses",
        "message": None if starts[1] else _refusal(share, least),
        "requested": total,
        "total": total,
        "parts": {**parts, "outside": held.expected, "reserve": kept.expected},
        "intervals": {
            **{name: [size, size] for name, size in parts.items()},
            "outside": [held.low, held.high],
            "reserve": [kept.low, kept.high],
        },
        "kv_cache": {
            "available": left.expected,
            "available_interval": [left.low, left.high],
            "blocks": tokens[1],
            "tokens": tokens[1],
            "tokens_interval": [tokens[0], tokens[2]],
            "bytes_per_block": int(cell),
            "groups": _groups(layers),
        },
        "concurrency": round(tokens[1] / settings.max_model_len, 2),
        "longest": min(tokens[1], settings.max_model_len),
        "utilization_needed": None if starts[1] or least >= 1 else least,
        "settings": asdict(settings),
        "ranks": settings.ranks * settings.stages,
        "stages": loaded,
        "model_class": model.model_class,
        "parameters": model.parameters,
        "warnings": _warnings(card),
    }


def _groups(layers: list[CacheLayer]) -> list[dict[str, Any]]:
    return [
        {
            "kind": layer.kind,
            "layers": layers.count(layer),
            "block_size": 1,
            "bytes_per_token": layer.bytes_per_token,
            "reach": layer.reach or None,
        }
        for layer in dict.fromkeys(layers)
    ]


def _refusal(share: float, least: float) -> str:
    """SGLang's own words where the weights leave nothing."""
    return (
        f"Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static={share:g}. "
        f"Raise --mem-fraction-static above {least:.3f}."
    )


def _warnings(card: Gpu | OwnGpu) -> list[str]:
    chip = known(card)
    out = ["the reserve is SGLang's rule of thumb: nothing is profiled, and a prefill may need more"]
    if chip is None:
        out.append("nvidia-smi's total of this card is not known: SGLang's share is taken of the bytes given")
    return out
