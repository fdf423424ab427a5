"""A job as flat pairs of text: what a query string, a form and a command line hold.

``lora.r=16`` is the field ``r`` of ``lora``; lists are separated by commas; ``gpu=24GiB`` is a card of one's own and
``reserve=2GiB`` an amount; what is left empty is left out.
Text that does not look like its field's type stays text, so that one place, the schema, says what is wrong with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .errors import PlanError
from .job import Job

OBJECTS = ("trainer_args", "adapter", "generation_args", "processor", "deepspeed", "max_memory")
"""Fields that hold arguments of a library, by its names: as text, a JSON object, or one value by a dotted name."""
PASTE = "paste the model's whole config.json"
_AMOUNT = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(GiB|MiB)", re.IGNORECASE)


@dataclass(frozen=True)
class Field:
    """One field of the job: its dotted name, what it means, and what it takes (``choices``, or a ``kind`` of text).

    ``bounds``: the least number, the one that it must be above, and the greatest, as far as there are any.
    """

    name: str
    help: str
    kind: str
    choices: tuple[str, ...]
    bounds: tuple[float | None, float | None, float | None]


@lru_cache(maxsize=1)
def fields() -> dict[str, Field]:
    """Every field of the job by its dotted name, read off the schema."""
    schema = Job.model_json_schema()
    return {field.name: field for field in _fields(schema, schema["$defs"], "")}


def _fields(schema: dict, defs: dict, prefix: str) -> Iterable[Field]:
    for name, entry in schema["properties"].items():
        kinds, choices, bounds = [], [], (None, None, None)
        for option in entry.get("anyOf", [entry]):
            reference = option.get("$ref", "").rsplit("/", 1)[-1]
            if reference:
                yield from _fields(defs[reference], defs, f"{prefix}{name}.")
                continue
            choices += option.get("enum", [])
            kinds.append(option.get("type", "string"))
            if kinds[-1] in ("integer", "number"):
                bounds = option.get("minimum"), option.get("exclusiveMinimum"), option.get("maximum")
            if option.get("type") == "boolean":
                choices += ["true", "false"]
        kinds = [kind for kind in kinds if kind != "null"]
        if kinds:
            kind = "array" if "array" in kinds else kinds[-1]
            help = entry.get("description", "").replace("null", "left out").replace("`", "")
            yield Field(prefix + name, help, kind, tuple(choices), bounds)


def to_job(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The job that the pairs spell, unchecked. Raises :class:`PlanError` where they cannot be put together."""
    job: dict[str, Any] = {}
    for key, text in pairs:
        if not text.strip():
            continue
        parent, _, name = key.partition(".")
        value = _value(key, text.strip())
        if name:
            holder = job.setdefault(parent, {})
            if not isinstance(holder, dict):
                raise PlanError(f"`{parent}` and `{key}` are both given", "leave one of them out", parent)
            job[parent] = {**holder, name: value}
        elif key in job:
            raise PlanError(f"`{key}` is given twice", "leave one of them out", key)
        else:
            job[key] = value
    return job


def to_pairs(job: dict[str, Any]) -> dict[str, str]:
    """The text of a job, or of a part of one, by dotted name: what :func:`to_job` reads. Nulls are left out."""
    pairs: dict[str, str] = {}
    for key, value in job.items():
        if key in OBJECTS:
            pairs[key] = json.dumps(value) if value else ""
        elif isinstance(value, dict):
            value = {name: _as_json(f"{key}.{name}", entry) for name, entry in value.items()}
            pairs |= {f"{key}.{name}": text for name, text in to_pairs(value).items()}
        elif isinstance(value, (list, tuple)):
            pairs[key] = ",".join(map(str, value))
        elif value is not None:
            pairs[key] = str(value).lower() if isinstance(value, bool) else str(value)
    return {key: text for key, text in pairs.items() if text}


def _value(key: str, text: str) -> Any:
    field = fields().get(key)
    kind = field.kind if field else "string"
    if key == "config":
        return read_object(text, "config", PASTE)
    if key in OBJECTS:
        return read_object(text, key, f'write {key} as a JSON object: {{"name": value}}')
    if field is None and key.partition(".")[0] in (*OBJECTS, "lora"):  # a library's argument, of which no field tells
        return _json_or_text(text)
    if key in ("gpu", "reserve") and (amount := _AMOUNT.fullmatch(text)):
        unit, scale = ("GiB", 1 << 30) if amount[2].lower() == "gib" else ("MiB", 1 << 20)
        count = int(float(amount[1]) * scale)
        return count if key == "reserve" else {"name": f"a card of {amount[1]} {unit}", "memory_bytes": count}
    if text == "null" and kind != "string":
        return None
    if field and kind == "array":
        return text if text in (*field.choices, "all-linear") else [part.strip() for part in text.split(",")]
    if text in ("true", "false") and "true" in (field.choices if field else ()):
        return text == "true"
    if kind in ("integer", "number") and re.fullmatch(r"[+-]?\d{1,30}", text):
        return int(text)
    if kind == "number" and re.fullmatch(r"[+-]?\d{0,30}\.?\d{1,30}(e[+-]?\d{1,3})?", text, re.IGNORECASE):
        return float(text)
    return text


def _as_json(key: str, value: Any) -> Any:
    """The value of a library's argument, of which no field tells how it is written."""
    return value if key in fields() or not isinstance(value, (dict, list, tuple)) else json.dumps(value)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def read_object(text: str | bytes, what: str, hint: str, field: str | None = None) -> dict:
    """The JSON object in ``text``. Raises :class:`PlanError` that names ``what`` it should have been."""
    value = read_json(text, what, hint, field or what)
    if not isinstance(value, dict):
        raise PlanError(f"the {what} is no JSON object", hint, field or what)
    return value


def read_json(text: str | bytes, what: str, hint: str, field: str | None = None) -> Any:
    """The JSON value in ``text``. Raises :class:`PlanError` that says where it breaks off."""
    try:
        return json.loads(text)
    except RecursionError:
        raise PlanError(f"the {what} is nested too deeply", hint, field) from None
    except ValueError as error:
        raise PlanError(f"the {what} is not JSON: {error}", hint, field) from None
