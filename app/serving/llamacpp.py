"""llama.cpp: what ``llama-server`` puts on one card, and what ``--fit`` leaves out so that it starts.

It places weights layer by layer, makes a cache of a fixed number of cells, and reserves the buffers of one pass over
``--ubatch-size`` tokens. With ``--fit`` (the default) it first shortens a context that was not asked for, then keeps
layers on the host, until ``--fit-target`` MiB stay free.

Source: https://github.com/ggml-org/llama.cpp/pull/16653 ``common/fit.cpp``.
https://github.com/ggml-org/llama.cpp/blob/007dbbf3fd17eefe9b47fee45f48f7ba5e62b714/src/llama-kv-cache-iswa.cpp
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..catalog.gpus import MIB, Gpu
from ..errors import PlanError
from ..job import OwnGpu
from ..planning.cards import outside_of, usable
from .amounts import Amount
from .cache_layers import cache_layers
from .command import Command
from .gguf import bytes_of, mixture_named, tensors
from .kv_cache import LATENT, SLIDING, CacheLayer
from .named_model import look_at
from .rank_weights import Served
from .vllm_settings import derived_length

VERSION = "2026-11"
PADDING = 256
"""Cells of the cache come in multiples of it."""
SLOTS = 4
"""Requests at a time, where the command does not say."""
NUMBERS = {name.lower(): name for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1")}
"""Types of the cache, as the command names them."""


@dataclass(frozen=True)
class Settings:
    """The settings of a start that decide its memory, with llama.cpp's defaults filled in."""

    mixture: str
    max_model_len: int
    layers_on_card: int
    ubatch_size: int
    slots: int
    cache_type_k: str
    cache_type_v: str
    ranks: int = 1
    dtype: str = "float16"
    cache_dtype: str = "auto"
    block_size: int = PADDING


def plan(command: Command, config: dict, card: Gpu | OwnGpu) -> dict[str, Any]:
    """The answer to a ``llama-server`` command on ``card``, without what is said of where it came from."""
    named = command.given.get("hf-repo") or command.given.get("model") or ""
    mixture = mixture_named(str(command.given.get("hf-file") or named))
    model = look_at(config, card, "float16")
    longest = derived_length(config, model.text["max_position_embeddings"] or 2048)
    asked = command.number("ctx-size", 0)
    limit = command.number("ubatch-size", 512)
    kinds = [_number_type(command, f"cache-type-{letter}") for letter in "kv"]
    slots = command.number("parallel", -1)
    if asked < 0 or not 1 <= limit <= 1 << 20:
        raise PlanError("a context and a batch have at least one token", "raise --ubatch-size", "command")
    settings = Settings(
        mixture, asked or longest, _layers(command, model), limit, SLOTS if slots < 1 else slots, *kinds
    )
    return _answer(command, model, settings, card, fits_context=not asked)


def _number_type(command: Command, flag: str) -> str:
    name = str(command.given.get(flag, "f16")).lower()
    if name not in NUMBERS:
        raise PlanError(f"--{flag} is {name[:40]!r}", f"one of {', '.join(NUMBERS)}", "command")
    return name


def _layers(command: Command, model: Served) -> int:
    """Layers on the card, of those of the model and one for what follows them."""
    most = model.text["num_hidden_layers"] + 1
    asked = command.given.get("gpu-layers", "auto")
    return most if asked in ("auto", "all") else max(0, min(command.number("gpu-layers", most), most))


class _Load:
    """What a model takes of a card for a context and a number of layers."""

    def __init__(self, command: Command, model: Served, settings: Settings):
        self.model, self.settings = model, settings
        self.count = model.text["num_hidden_layers"]
        self.tensors = tensors(model, settings.mixture)
        self.cache = cache_layers(model, settings, command)
        if any(layer.kind == LATENT for layer in self.cache):
            raise PlanError("a latent cache is not modelled for llama.cpp yet", "vllm serve is", "command")
        every = bool(command.given.get("cpu-moe"))
        self.host_experts = self.count if every else command.number("n-cpu-moe", 0)
        self.host_dense = command.number("n-cpu-ffn", 0)
        self.whole_window = bool(command.given.get("swa-full"))
        self.scores = str(command.given.get("flash-attn", "auto")) == "off"

    def weights(self, layers: int) -> int:
        """Bytes on the card of the last ``layers`` (the head is the last of all)."""
        first = self.count + 1 - layers
        total = sum(size for path, at, size in self.tensors if at >= first and not self._on_host(path, at))
        tied = sum(weight.split == "table" for weight in self.model.weights) == 1
        return total + (self.tensors[0][2] if tied and layers > 0 else 0)

    def _on_host(self, path: str, layer: int) -> bool:
        if ".experts." in path:
            return layer < self.host_experts
        return ".mlp." in path and layer < self.host_dense

    def kv(self, context: int, layers: int) -> int:
        """Bytes of the cache on the card."""
        first = self.count + 1 - layers
        return sum(self._of_layer(layer, context) for at, layer in enumerate(self.cache) if at >= first)

    def _of_layer(self, layer: CacheLayer, context: int) -> int:
        cells = -(-context // PADDING) * PADDING
        if layer.kind == SLIDING and not self.whole_window:
            window = layer.reach * self.settings.slots + self.settings.ubatch_size
            cells = min(cells, -(-window // PADDING) * PADDING)
        numbers = layer.bytes_per_token // 4  # two bytes each, of keys and of values
        kinds = (NUMBERS[self.settings.cache_type_k], NUMBERS[self.settings.cache_type_v])
        return sum(cells * bytes_of(kind, numbers, numbers) for kind in kinds)

    def compute(self, context: int) -> Amount:
        """Bytes of the buffers of a pass: its logits, or a layer's largest tensors beside the mask of its attention."""
        text, rows = self.model.text, self.settings.ubatch_size
        wide = max((w.columns for w in self.model.weights if w.path.endswith("down_proj.weight")), default=0)
        logits = rows * (text["vocab_size"] + text["hidden_size"]) * 4
        mask = rows * context * (6 + (4 * text["num_attention_heads"] if self.scores else 0))
        low, high = (mask + rows * 4 * (2 * text["hidden_size"] + wide * times) for times in (0, 3))
        return Amount(max(logits, low), max(logits, (low + high) // 2), max(logits, high))

    def total(self, context: int, layers: int) -> Amount:
        """Bytes of all three."""
        fixed = self.weights(layers) + self.kv(context, layers)
        return Amount(*(fixed + size for size in self.compute(context)))


def _fitted(command: Command, load: _Load, free: int, fits_context: bool) -> tuple[int, int]:
    """The context and the layers that ``--fit`` leaves: what was asked for stays."""
    context, layers = load.settings.max_model_len, load.settings.layers_on_card
    room = free - command.number("fit-target", 1024) * MIB
    least = min(context, command.number("fit-ctx", 4096))
    if load.total(context, layers).expected <= room or str(command.given.get("fit", "on")) == "off":
        return context, layers
    if fits_context:
        steps = range(least // PADDING, context // PADDING + 1)
        found = [step for step in steps if load.total(step * PADDING, layers).expected <= room][-1:]
        if found:
            return found[0] * PADDING, layers
        context = least
    if command.given.get("gpu-layers", "auto") == "auto":
        layers = next((n for n in range(layers, -1, -1) if load.total(context, n).expected <= room), 0)
    return context, layers


def _answer(
    command: Command, model: Served, settings: Settings, card: Gpu | OwnGpu, fits_context: bool
) -> dict[str, Any]:
    load, total, outside = _Load(command, model, settings), usable(card), outside_of(card)
    context, layers = _fitted(command, load, total - outside.expected, fits_context)
    compute, kv = load.compute(context), load.kv(context, layers)
    held = Amount(outside.low, outside.expected, outside.high)
    parts = {"weights": Amount.exact(load.weights(layers)), "activations": compute, "outside": held}
    left = Amount(total, total, total) - Amount.sum(parts.values())
    starts = [kv <= have for have in left]
    whole = model.text["num_hidden_layers"] + 1
    return {
        "verdict": "starts" if all(starts) else "tight" if any(starts) else "refuses",
        "message": None if starts[1] else "failed to allocate the buffers: CUDA out of memory",
        "requested": total,
        "total": total,
        "parts": {name: part.expected for name, part in parts.items()},
        "intervals": {name: [part.low, part.high] for name, part in parts.items()},
        "kv_cache": {
            "available": kv,
            "available_interval": [kv, kv],
            "blocks": -(-context // PADDING),
            "tokens": context,
            "tokens_interval": [context, context],
            "bytes_per_block": kv // max(1, -(-context // PADDING)),
            "groups": [],
        },
        "concurrency": 1.0,
        "longest": context if starts[1] else 0,
        "utilization_needed": None,
        "settings": asdict(settings) | {"max_model_len": context, "layers_on_card": layers},
        "ranks": 1,
        "stages": [{name: part.expected for name, part in parts.items()}],
        "model_class": model.model_class,
        "parameters": model.parameters,
        "warnings": _warnings(settings, context, layers, whole),
    }


def _warnings(settings: Settings, context: int, layers: int, whole: int) -> list[str]:
    out = [f"weights are those of {settings.mixture} as llama-quantize makes it without an importance matrix"]
    if context < settings.max_model_len:
        out.append(f"--fit shortens the context from {settings.max_model_len} to {context} tokens")
    if layers < whole:
        out.append(f"{layers} of {whole} layers are on the card, the others on the host")
    out.append("the buffers of a pass are its largest tensors: an interval")
    return out
