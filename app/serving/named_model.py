"""The model that a command names, looked at in a tracing process: its weights, its sizes, its forward pass."""

from __future__ import annotations

import json
from collections import OrderedDict
from threading import Lock
from typing import Any

from ..catalog.gpus import Gpu
from ..errors import PlanError
from ..job import Job, OwnGpu
from ..memory.template import unpacked
from ..planning.resolve import config_of
from ..planning.tracer import request_of, tracer
from .rank_weights import Served, Weight

KEPT = 16
"""Models that are remembered."""
_known: OrderedDict[str, Served] = OrderedDict()
_lock = Lock()

TEXT_TASKS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""How the classes that write text end."""


def config_named(model: str | None, config: dict | None, revision: str | None) -> tuple[dict, dict]:
    """The config of a command's model, or the one that was sent beside it, and where it came from."""
    if config is None and not model:
        raise PlanError("the command names no model", "vllm serve MODEL", "command")
    if config is None and str(model).endswith(".gguf"):
        raise PlanError(
            "the header of a GGUF file is not read yet", "give the config.json of the model it was made from", "command"
        )
    job = Job(model=model, revision=revision) if config is None else Job(config=config)
    found, source = config_of(job)
    return found, source if config is None else {**source, "id": model}


def look_at(config: dict, card: Gpu | OwnGpu, dtype: str, batch: tuple[int, int] | None = None) -> Served:
    """What a server loads of the model in ``dtype``, and its forward pass over a ``batch`` of requests and tokens each.

    Raises :class:`PlanError`.
    """
    rows, length = batch or (1, 1)
    given = Job(
        config=config,
        method="inference",
        dtype=dtype,
        batch_size=rows,
        sequence_length=length,
        new_tokens=1,
        attention_mask="absent",
        images=0,
    )
    request = request_of(given.resolved(), config, card)
    key = json.dumps([request.key, batch])
    with _lock:
        if key in _known:
            _known.move_to_end(key)
            return _known[key]
    found = _read(unpacked(tracer.get().trace("served" if batch else "listed", request)))
    with _lock:
        _known[key] = found
        while len(_known) > KEPT:
            _known.popitem(last=False)
    return found


def _read(told: dict[str, Any]) -> Served:
    weights = [Weight(*row) for row in told["weights"]]
    names = ("text", "state", "encoder_decoder", "tower", "class", "parameters", "forward", "workspace", "unplanned")
    served = Served(weights, *(told[name] for name in names))
    if not served.model_class.endswith(TEXT_TASKS):
        raise PlanError(f"{served.model_class} writes no text", "name a model that generates", "command")
    if served.encoder_decoder:
        raise PlanError(
            f"{served.model_class} is an encoder-decoder: its cross attention's cache is not modelled",
            "vramplan estimate plans its generation by transformers",
            "command",
        )
    return served
