"""What each layer of a model keeps of a token, read off its text model's sizes."""

from __future__ import annotations

from typing import Protocol

from ..errors import PlanError
from .command import Command
from .kv_cache import CHUNKED, FULL, LATENT, SLIDING, CacheLayer
from .rank_weights import Served

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of a number of the cache, by dtype."""
KINDS = {"full_attention": FULL, "sliding_attention": SLIDING, "chunked_attention": CHUNKED}
"""Kinds of layers by transformers' names for them."""


class CacheSettings(Protocol):
    """What a start says of its cache."""

    @property
    def ranks(self) -> int:
        """Ranks of tensor parallelism."""

    @property
    def dtype(self) -> str:
        """The model's own dtype."""

    @property
    def cache_dtype(self) -> str:
        """The cache's dtype; ``auto``: the model's."""

    @property
    def block_size(self) -> int:
        """Tokens of a block."""


def itemsize_of(dtype: str) -> int:
    """Bytes of a number. Raises :class:`PlanError` for a dtype whose layout is not modelled."""
    if dtype not in BYTES:
        raise PlanError(f"a cache of {dtype!r} is not modelled", f"one of auto, {', '.join(BYTES)}", "command")
    return BYTES[dtype]


def cache_layers(model: Served, settings: CacheSettings, command: Command) -> list[CacheLayer]:
    """The layers of the text model, in order; one that shares another's cache keeps no bytes.

    Raises :class:`PlanError` for kinds that are not modelled.
    """
    text = model.text
    if model.state:
        raise PlanError(
            f"{model.model_class} keeps a state beside keys and values, whose pages are not modelled yet",
            "vramplan estimate plans its generation by transformers",
            "command",
        )
    if text.get("index_topk"):
        raise PlanError(f"the sparse index of {model.model_class} is not modelled", "name another model", "command")
    count = text["num_hidden_layers"]
    named = text.get("layer_types") or ["sliding_attention" if text.get("sliding_window") else "full_attention"] * count
    other = sorted(set(named) - set(KINDS))
    if other:
        raise PlanError(
            f"layers of {', '.join(other)} keep a state, whose pages are not modelled yet",
            "vramplan estimate plans its generation by transformers",
            "command",
        )
    kinds = [KINDS[name] for name in named]
    if command.given.get("disable-hybrid-kv-cache-manager") and len(set(kinds)) > 1:
        kinds = [FULL] * count
    item = itemsize_of(settings.dtype if settings.cache_dtype == "auto" else settings.cache_dtype)
    shared = text.get("num_kv_shared_layers") or 0
    return [
        _layer(model, kind, item, settings, keeps=number < count - shared) for number, kind in enumerate(kinds[:count])
    ]


def _layer(model: Served, kind: str, item: int, settings: CacheSettings, keeps: bool) -> CacheLayer:
    text = model.text
    reach = {SLIDING: text.get("sliding_window"), CHUNKED: text.get("attention_chunk_size")}.get(kind) or 0
    if not keeps:
        return CacheLayer(kind, 0, reach, settings.block_size)
    if text.get("kv_lora_rank"):
        if item == 1:
            raise PlanError("a latent cache of fp8 is not modelled", "leave --kv-cache-dtype out", "command")
        return CacheLayer(LATENT, (text["kv_lora_rank"] + text["qk_rope_head_dim"]) * item, 0, settings.block_size)
    heads = _heads(text)
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    if kind == FULL and text.get("global_head_dim"):
        width, heads = text["global_head_dim"], text.get("num_global_key_value_heads") or heads
    return CacheLayer(kind, 2 * max(1, heads // settings.ranks) * width * item, reach, settings.block_size)


def _heads(text: dict) -> int:
    """Heads of keys and values; one for all where queries share them.

    Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/config/model.py ``get_total_num_kv_heads``.
    """
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    return text.get("num_key_value_heads") or text.get("num_kv_heads") or text["num_attention_heads"]
