"""Limits on the values of a config.json, checked before a model is built from it. Imports no torch."""

from __future__ import annotations

import math
import re
from typing import Any

from ..errors import PlanError

MAX_LAYERS = 512
"""Deeper than any published language model; the deepest, Llama 3.1 405B, has 126."""
MAX_EXPERTS = 8192
"""More than any published model has in a layer: 896. Writing a checkpoint makes a tensor of each."""
MAX_CLASSES = 1_000_000
"""transformers writes a name for each class into the config."""
MAX_NESTING = 32
MAX_ENTRIES = 1_000_000
_DEPTH = re.compile(r"(layers?|depth|blocks)$")
_EXPERTS = re.compile(r"^(n|num)_.*experts$")
_OWN = "send the model's own config.json"


def refuse_impossible(config: dict[str, Any]) -> None:
    """Raise :class:`PlanError` for a config whose model would take unbounded time or memory to build."""
    _check(config, "config", 0)


def _check(value: Any, path: str, nesting: int) -> None:
    if nesting > MAX_NESTING:
        raise PlanError(f"{path[:100]}… is nested too deeply", _OWN, "config")
    if isinstance(value, (dict, list)):
        if len(value) > MAX_ENTRIES:
            raise PlanError(f"{path} has {len(value)} entries", _OWN, "config")
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            here = f"{path}.{str(key)[:100]}"
            _check(entry, here, nesting + 1)
            if isinstance(entry, int) and not isinstance(entry, bool):
                if _DEPTH.search(str(key)) and entry > MAX_LAYERS:
                    raise PlanError(f"{here} is {entry:.3g}: no model is that deep", f"at most {MAX_LAYERS}", "config")
                if _EXPERTS.search(str(key)) and entry > MAX_EXPERTS:
                    hint = f"at most {MAX_EXPERTS}"
                    raise PlanError(f"{here} is {entry:.3g}: no model has as many experts", hint, "config")
                if str(key).endswith("layers") and entry < 0:
                    raise PlanError(f"{here} is {entry}: no model has fewer layers than none", _OWN, "config")
                if key == "num_labels" and entry > MAX_CLASSES:
                    raise PlanError(f"{here} is {entry:.3g}: too many classes", f"at most {MAX_CLASSES}", "config")
    elif isinstance(value, float) and math.isnan(value):
        raise PlanError(f"{path} is not a number", "write a number", "config")
    elif isinstance(value, int) and abs(value) > 1 << 40:
        shown = f"{value:.3g}" if abs(value) < 10**300 else "beyond all numbers"
        raise PlanError(f"{path} is {shown}: no model has such a size", _OWN, "config")
