"""The size of a model as GGUF: bytes of a number by type, and the type that llama-quantize gives each tensor.

Source: https://github.com/ggml-org/llama.cpp/blob/007dbbf3fd17eefe9b47fee45f48f7ba5e62b714/src/llama-quant.cpp
``llama_tensor_get_type_impl``, without an importance matrix.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import PlanError, near
from .rank_weights import Served, Weight

BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "IQ4_NL": (32, 18),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_XS": (256, 136),
}
"""By type: numbers of a block, and its bytes."""
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
"""The type of a tensor whose rows are no multiple of 256."""
MIXTURES = {
    **{
        name: name
        for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "IQ4_NL", "IQ4_XS")
    },
    "Q2_K": "Q2_K",
    **{f"Q3_K_{size}": "Q3_K" for size in "SML"},
    **{f"Q4_K_{size}": "Q4_K" for size in "SM"},
    **{f"Q5_K_{size}": "Q5_K" for size in "SM"},
}
"""By what a file is called: the type of most of its tensors."""
QUERY, KEY, VALUE, OUTPUT, JOINED, DOWN, UP = "q", "k", "v", "o", "qkv", "down", "up"
_PARTS = {
    "q_proj": QUERY,
    "k_proj": KEY,
    "v_proj": VALUE,
    "kv_b_proj": VALUE,
    "o_proj": OUTPUT,
    "qkv_proj": JOINED,
    "query_key_value": JOINED,
    "down_proj": DOWN,
    "gate_proj": UP,
    "up_proj": UP,
    "gate_up_proj": UP,
}
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")


def mixture_named(text: str) -> str:
    """The mixture that a file or a repository's tag is called by (``…-Q4_K_M.gguf``). Raises :class:`PlanError`."""
    words = re.split(r"[-.:/]", text.upper())
    found = next((word for word in reversed(words) if word in MIXTURES), None)
    if found is None:
        last = [word for word in words if re.match(r"(I?Q|TQ|F|BF|MXFP)\d", word)]
        if last:
            raise PlanError(f"the mixture {last[-1]} is not modelled", near(last[-1], MIXTURES), "command")
        return "Q4_K_M"
    return found


def bytes_of(kind: str, numbers: int, columns: int) -> int:
    """Bytes of a tensor of a type."""
    block, size = BLOCKS[kind]
    return numbers // columns * (-(-columns // block)) * size


def tensors(model: Served, mixture: str) -> list[tuple[str, int, int]]:
    """(path, layer, bytes) of each tensor; layer −1 stands for the token table, the count of layers for what follows.

    Vectors and routers stay in 32 bits; an encoder of images has a file of its own. Raises :class:`PlanError` for
    layers that llama-quantize is not known here to name.
    """
    text, weights = model.text, [weight for weight in model.weights if not weight.of_tower]
    shape = Shape(
        layers=text["num_hidden_layers"],
        groups=text["num_attention_heads"] // max(1, text.get("num_key_value_heads") or text["num_attention_heads"]),
        experts=max((w.plain // 2 // (w.rows * w.columns) for w in weights if ".experts." in w.path), default=1),
        tied=sum(weight.split == "table" for weight in weights) == 1,
    )
    out: list[tuple[str, int, int]] = []
    for weight in weights:
        found = _LAYER.search(weight.path)
        layer = int(found[1]) if found else -1 if weight.split == "table" and not out else shape.layers
        numbers = weight.plain // 2
        columns = weight.columns if weight.columns > 1 else numbers
        out.append((weight.path, layer, bytes_of(_type(weight, mixture, layer, shape), numbers, columns)))
    return out


class Shape(NamedTuple):
    """What of a model decides its mixture: layers, query heads of a head of keys, experts, tied tables."""

    layers: int
    groups: int
    experts: int
    tied: bool


def _type(weight: Weight, mixture: str, layer: int, shape: Shape) -> str:
    default, path = MIXTURES[mixture], weight.path
    if weight.columns < 2 or "norm" in path or path.endswith(("bias", "gate.weight", "router.weight")):
        return "F32"
    part = _part(path)
    if weight.split != "table" and (part is None or ".attn." in path):
        raise PlanError(f"how llama-quantize stores {path} is not known here", "name another model", "command")
    if default in ("F32", "F16", "BF16"):
        return default
    if weight.split == "table":
        kind = _of_table(default, weight.columns, is_output=layer >= shape.layers or shape.tied)
    elif shape.experts == 8 and part in (VALUE, KEY):
        kind = "Q8_0"
    elif shape.experts == 8 and part == OUTPUT and mixture in _EIGHT_EXPERTS:
        kind = "Q5_K"
    else:
        kind = _of_layer(mixture, default, part, layer, shape)
    return FALLBACK.get(kind, kind) if weight.columns % BLOCKS[kind][0] else kind


_EIGHT_EXPERTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M")
"""Mixtures that give the attention's output 5 bits where there are eight experts."""


def _part(path: str) -> str | None:
    pieces = path.split(".")
    return next((_PARTS[piece] for piece in reversed(pieces) if piece in _PARTS), None)


def _of_table(default: str, columns: int, is_output: bool) -> str:
    if not is_output or default == "Q8_0":
        return default
    return "Q8_0" if columns % BLOCKS[default][0] else "Q6_K"


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _of_layer(mixture: str, default: str, part: str | None, layer: int, shape: Shape) -> str:
    """The type of a matrix of a layer."""
    layers, groups = shape.layers, shape.groups
    more, eighth = _more_bits(layer, layers), layers // 8
    if part == VALUE:
        chosen = _of_values(mixture, default, layer, more, groups)
        return "Q5_K" if layers == 80 and groups == 8 and chosen in ("Q3_K", "Q4_K") else chosen
    if part == JOINED:
        by_mixture = {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}
        return by_mixture.get(mixture, default)
    if part == OUTPUT:
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mixture, default)
    if part != DOWN:
        return default
    if mixture == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    first = {"Q4_K_S": "Q5_K", "IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
    if mixture in first:
        return first[mixture] if layer < eighth else default
    if mixture in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more else default
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(mixture, default)


def _of_values(mixture: str, default: str, layer: int, more: bool, groups: int) -> str:
    if mixture == "Q2_K":
        return "Q4_K" if groups >= 4 else "Q3_K"
    if mixture == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if mixture == "Q3_K_L":
        return "Q5_K"
    if mixture in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if groups >= 4 else default
    if mixture in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more else default
    return "Q5_K" if mixture == "Q4_K_S" and layer < 4 else default
