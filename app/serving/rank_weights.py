"""The weights of one rank of a server: tensor parallelism splits matrices, pipeline parallelism splits layers."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ..errors import PlanError

VOCABULARY_PADDING = 64
"""Rows to a multiple of which vLLM and SGLang pad a table of the vocabulary (``DEFAULT_VOCAB_PADDING_SIZE``)."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


class Weight(NamedTuple):
    """One parameter: its path, its bytes plain and as stored, its last two dimensions, how it is split."""

    path: str
    plain: int
    stored: int
    rows: int
    columns: int
    split: str

    @property
    def of_tower(self) -> bool:
        """Whether it belongs to an encoder of images or sound."""
        return any(part.startswith(("vision", "visual", "audio", "multi_modal")) for part in self.path.split("."))

    def on_rank(self, ranks: int, kv_ranks: int) -> int:
        """Bytes on each of ``ranks`` ranks; keys and values are split over ``kv_ranks`` of them only."""
        if self.split == "table":
            padded = -(-self.rows // VOCABULARY_PADDING) * VOCABULARY_PADDING
            return self.stored * (-(-padded // ranks)) // self.rows
        if not self.split:
            return self.stored
        return self.stored // (kv_ranks if self.path.split(".")[-2] in ("k_proj", "v_proj") else ranks)


class Served(NamedTuple):
    """What :mod:`vramplan.dryrun.served_model` reads off a model."""

    weights: list[Weight]
    text: dict[str, Any]
    state: list[str]
    encoder_decoder: bool
    tower: bool
    model_class: str
    parameters: int
    forward: int | None
    workspace: int
    unplanned: str | None


def stages(layers: int, count: int) -> list[range]:
    """The layers of each pipeline stage.

    Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/distributed/utils.py#L198 ``get_pp_indices``.
    """
    if count > layers:
        raise PlanError(f"{layers} layers cannot be split over {count} stages", "use fewer", "command")
    sizes = [layers // count] * count
    for place in range(2, layers % count + 2):
        sizes[-place] += 1
    starts = [sum(sizes[:n]) for n in range(count)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def weights_of_stage(model: Served, stage: range, last: int, ranks: int, kv_ranks: int) -> int:
    """Bytes of the weights on a rank whose stage has the layers ``stage``; ``last``: the number of the last layer.

    Before the layers stands what comes before the first in the model's order; a tied table is on the last stage too.
    """
    total = tables = 0
    number = -1
    for weight in model.weights:
        found = _LAYER.search(weight.path)
        is_tower = weight.of_tower
        number = int(found[1]) if found and not is_tower else last if number == last and not found else number
        size = weight.on_rank(ranks, kv_ranks)
        tables += weight.split == "table"
        at = -1 if is_tower else number if found else last + 1 if number == last else -1
        if at in stage or (at < 0 and 0 in stage) or (at > last and last in stage):
            total += size
    if tables == 1 and last in stage and 0 not in stage:
        total += next(weight.on_rank(ranks, kv_ranks) for weight in model.weights if weight.split == "table")
    return total


def adapters(model: Served, stage: range, slots: int, rank: int, ranks: int, itemsize: int) -> int:
    """Bytes of ``slots`` LoRA adapters of ``rank`` for every split linear layer of a stage.

    The first factor is whole on each rank where outputs are split, the second where inputs are.
    Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/lora/layers/base_linear.py#L133
    """
    total = 0
    for weight in model.weights:
        found = _LAYER.search(weight.path)
        if found is None or int(found[1]) not in stage or weight.split not in ("columns", "rows") or weight.columns < 2:
            continue
        if ".experts." in weight.path:
            raise PlanError("adapters of experts are not modelled", "leave --enable-lora out", "command")
        outs, ins = weight.rows, weight.columns
        outs, ins = (-(-outs // ranks), ins) if weight.split == "columns" else (outs, -(-ins // ranks))
        total += slots * rank * (outs + ins) * itemsize
    return total


def cache_heads(model: Served) -> int:
    """Heads of keys and values in the whole model."""
    text = model.text
    return text.get("num_key_value_heads") or text.get("num_kv_heads") or text["num_attention_heads"]
