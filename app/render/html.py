"""An answer as the page shows it: the form, the bar and the timeline as plain data, and the templates that show them.

All but the timeline is drawn on the server; that one is drawn by static/timeline.js. No style is inline, so that the
page's policy can forbid it: positions are SVG attributes, colours are classes.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .. import __version__
from ..catalog.gpus import all_gpus
from ..catalog.models import MODELS
from ..errors import PlanError
from ..form import Field, fields, to_job, to_pairs
from ..registry.quantizers import WEIGHT_COLUMNS
from ..resources import folder
from . import accuracy as rows
from . import words

TEMPLATES = folder("templates")
WHAT = "Will it fit? The GPU memory of one training step, planned from config.json alone."
FIRST_VISIT = {
    "model": "llama-3.1-70b",
    "method": "qlora",
    "gpu": "a100-80gb",
    "batch_size": "1",
    "sequence_length": "2048",
}
EXAMPLES = {
    "8B with QLoRA on a 4090": {
        "model": "llama-3.1-8b",
        "method": "qlora",
        "gpu": "rtx-4090",
        "batch_size": "1",
        "sequence_length": "2048",
    },
    "8B with LoRA on an H100": {
        "model": "llama-3.1-8b",
        "method": "lora",
        "gpu": "h100",
        "batch_size": "4",
        "sequence_length": "2048",
        "gradient_checkpointing": "true",
    },
    "0.6B in full on a T4": {
        "model": "qwen3-0.6b",
        "method": "full",
        "gpu": "t4",
        "batch_size": "1",
        "sequence_length": "1024",
    },
}

MAIN = ("model", "method", "trainer", "gpu", "batch_size", "sequence_length")
FOLDED = {
    "Training": (
        "optimizer",
        "gradient_checkpointing",
        "gradient_accumulation_steps",
        "dtype",
        "mixed_precision",
    ),
    "Adapters": (
        "lora.r",
        "lora.target_modules",
        "lora.alpha",
        "lora.dropout",
        "lora.use_dora",
        "lora.use_rslora",
        "lora.modules_to_save",
    ),
    "Quantisation": (
        "quantization.type",
        "quantization.double_quant",
        "quantization.compute_dtype",
        "quantization.skip_modules",
        "prepare_for_kbit_training",
    ),
    "Model and batch": (
        "task",
        "attention",
        "attention_mask",
        "target_length",
        "new_tokens",
        "images",
        "image_size",
        "expert_routing",
        "revision",
    ),
    "Many cards": ("strategy", "gpu_count", "nodes", "device_map"),
    "Allocator": ("allocator.expandable_segments", "allocator.max_split_size_mb"),
}
LABELS = {
    "trainer": "Whose step",
    "gpu": "GPU",
    "batch_size": "Batch size",
    "sequence_length": "Length",
    "lora.r": "Rank",
    "lora.use_dora": "DoRA",
    "lora.use_rslora": "Rank-stabilised",
    "dtype": "Weights' dtype",
    "prepare_for_kbit_training": "Prepare for k-bit training",
    "quantization.type": "Weights",
    "allocator.max_split_size_mb": "Largest block to split, MiB",
    "gradient_accumulation_steps": "Accumulation steps",
}
HELP = {
    "gpu": "A card of the list, or the memory of another: 24GiB.",
    "model": "A name of the list, or any model of the Hub.",
    "method": "",
    "batch_size": "Sequences a step.",
    "sequence_length": "Tokens of one.",
    "attention": "Which attention is run (attn_implementation).",
}
TITLES = {"full": "Full", "lora": "LoRA", "qlora": "QLoRA", "inference": "Generate"}
LISTS = {"model": "models", "gpu": "gpus"}


@dataclass(frozen=True)
class View:
    """What a page is made of: the form's ``values``, and either an ``answer`` or a ``problem``.

    ``address`` is the job as a query string; ``posted`` tells that the form holds a config that is too long for one.
    ``more`` has what is known of :func:`parts_of` the answer: what :func:`~vramplan.planning.advice.advise` says, and
    by field the largest that fits.
    """

    values: dict[str, str]
    answer: dict | None
    problem: PlanError | None
    address: str
    base_url: str
    posted: bool = False
    more: dict[str, Any] = field(default_factory=dict)


class Control(NamedTuple):
    """One input of the form. ``default`` is what an empty one means."""

    name: str
    label: str
    help: str
    choices: tuple[str, ...]
    numeric: bool
    list_id: str
    value: str
    default: str
    error: str


class Segment(NamedTuple):
    """A stretch of the bar; positions in percent."""

    kind: str
    name: str
    bytes: int
    x: float
    width: float


class Bar(NamedTuple):
    """The process against the card. ``card`` is where the card ends, in percent; None where none was asked for."""

    segments: list[Segment]
    card: float | None
    total: int


class Timeline(NamedTuple):
    """The answer's moments of load and steps, in order; the kinds that are ever alive, as (kind, name) in the order of
    stacking; and the bytes of each, a column a kind."""

    points: list[dict[str, Any]]
    kinds: list[tuple[str, str]]
    alive: list[list[int]]


class Row(NamedTuple):
    """A line of the layers' table: bytes (and ``parameters``) of all the modules that it stands for."""

    name: str
    note: str
    totals: dict[str, int]


class Block(NamedTuple):
    """``count`` layers that lie in one list, and their modules; without ``path``: what lies outside of lists."""

    path: str
    count: int
    totals: dict[str, int]
    rows: list[Row]


class Tree(NamedTuple):
    """The layers' table: from the model to its repeated blocks to their modules."""

    blocks: list[Block]
    totals: dict[str, int]


def page(view: View, live: bool = False) -> str:
    """The page; ``live``: the part of it that follows the form."""
    about = f"{words.model_name(view.answer)}: {words.settings(view.answer)}" if view.answer else WHAT
    name = "live.html" if live else "page.html"
    return _rendered(name, view=view, title=said(view), what=about, **_controls(view))


def parts_of(answer: dict) -> list[str]:
    """What there is to say beside an answer, in the order of the page: what would make the job fit its card, or
    what its merged model takes; how many sequences it holds, how long they may be; what other trainers take."""
    job = answer["job"]
    if words.asked_card(answer) is None:
        return []
    largest = ["batch_size", "sequence_length"][: 2 if words.length(answer) else 1]
    whose = [] if job["method"] == "inference" or job["objective"] != "sft" or job["trainer_args"] else ["trainers"]
    if words.state(answer) == "does_not_fit":
        return ["changes", *largest, *whose]
    return [*largest, *(["changes"] if job["lora"] else []), *whose]


def part(view: View, name: str) -> str:
    """One part of the advice."""
    return _rendered("advice_part.html", view=view, name=name)


def holders(found: list[dict]) -> str:
    """What is alive by module, for the timeline's readout."""
    return _rendered("alive.html", holders=found)


def said(view: View) -> str:
    """The verdict, or why there is none."""
    return words.verdict(view.answer) if view.answer else f"Cannot say: {told(view).message}"


_REFUSED = re.compile(r"`(?P<field>[a-z_]+(\.[a-z_]+)?)(\.\d+)?`: .* \(got .*\)", re.DOTALL)
"""How :func:`vramplan.job.read_job` says that a value is none of its field's."""
_NAMED = re.compile(r"`([^`]+)`")


def told(view: View) -> PlanError | None:
    """The view's problem in a person's words: a value that its field does not take beside what it takes, and fields by
    their labels. The API has the problem's own."""
    problem, values = view.problem, view.values
    if problem is None:
        return None
    found = _REFUSED.fullmatch(problem.message)
    name = found["field"] if found else None
    if name in fields() and name in values:
        field, text = fields()[name], _shown(values[name])
        hint = problem.hint if problem.hint.startswith("did you mean") else ""
        if field.kind in ("array", "string") and not field.choices:
            return PlanError(f"{_label(name)} cannot be {text}", hint or field.help, name)
        return PlanError(f"{_label(name)} takes {_taken(field, values[name])}, not {text}", hint, name)
    message, hint = (
        _NAMED.sub(lambda word: _label(word[1]) if word[1] in fields() else f"“{word[1]}”", text)
        for text in (problem.message, problem.hint)
    )
    return PlanError(message, hint, problem.field, problem.weights)


def _taken(field: Field, text: str) -> str:
    """What a field takes, as far as ``text`` is not that."""
    if field.choices:
        return f"{', '.join(field.choices[:-1])} or {field.choices[-1]}"
    kind = {"integer": "a whole number", "number": "a number"}[field.kind]
    least, above, most = field.bounds
    with suppress(ValueError):
        if most is not None and float(text) > most:
            return f"{kind} up to {most:,}"
    return f"{kind} above {above:g}" if above is not None else kind if least is None else f"{kind} from {least:g} on"


def _shown(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


def _label(name: str) -> str:
    """What a field is called on the page."""
    return LABELS.get(name) or name.split(".")[-1].replace("_", " ").capitalize()


def comparison(views: list[View], problem: PlanError | None, base_url: str) -> str:
    """Results side by side, each with its address; ``problem``: why a link was not added."""
    bytes = max((bar(view.answer).total for view in views if view.answer), default=0)
    title = " · ".join(words.model_name(view.answer) for view in views if view.answer) or "Compare"
    what = "Results side by side: verdict, peak and parts of each."
    address = urlencode([("job", view.address) for view in views])
    return _rendered(
        "compare.html",
        views=views,
        problem=problem,
        scale=bytes,
        address=address,
        base_url=base_url,
        title=title,
        what=what,
        kinds=[(kind, name) for kind, name in words.KINDS.items() if any(_part(view, kind) for view in views)],
        part=_part,
    )


def _part(view: View, kind: str) -> int:
    return view.answer["parts"].get(kind, 0) if view.answer else 0


def accuracy() -> str:
    """The page of accuracy: every measured row."""
    return _rendered(
        "accuracy.html",
        title="How right it is",
        what="Every measured row beside its plan, with its error.",
        tables=rows.tables(),
        columns=rows.COLUMNS,
        summaries=rows.summaries,
        error=rows.error,
    )


def how(view: View) -> str:
    """The page of how it works, with pictures of a real plan."""
    what = "A training step without a GPU: run on the meta device, every allocation noted, the allocator replayed."
    return _rendered("how.html", view=view, title="How it works", what=what)


def _rendered(template: str, **values: Any) -> str:
    return _templates().get_template(template).render(**values)


@lru_cache(maxsize=1)
def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    templates.filters |= {"size": words.size, "number": words.number, "glued": glued}
    templates.globals |= {
        "version": __version__,
        "words": words,
        "said": said,
        "told": told,
        "parts_of": parts_of,
        "titles": TITLES,
        "bar_of": bar,
        "timeline": timeline,
        "kinds_at": kinds_at,
        "moments": moments,
        "layer_columns": layer_columns,
        "layer_tree": layer_tree,
        "with_gpu": with_gpu,
        "with_change": with_change,
        "curl": curl,
        "gpus": all_gpus(),
        "models": MODELS,
        "examples": {name: urlencode(pairs) for name, pairs in EXAMPLES.items()},
    }
    return templates


def glued(text: str) -> str:
    """A sentence whose amounts are not broken before their unit."""
    return text.replace(" GiB", "\u00a0GiB")


def _controls(view: View) -> dict[str, Any]:
    controls = {name: _control(name, view) for names in (MAIN, *FOLDED.values()) for name in names}
    problem = told(view)
    at = _control_of(problem, controls)
    if at:
        controls[at] = controls[at]._replace(error=problem.message)
    elif problem and problem.field == "config":
        at = "config"
    folded = []
    for title, names in FOLDED.items():
        group = [controls[name] for name in names]
        folded.append((title, group, any(control.value or control.error for control in group)))
    return {"main": [controls[name] for name in MAIN], "folded": folded, "error_at": at, "problem": problem}


def _control(name: str, view: View) -> Control:
    field = fields()[name]
    return Control(
        name=name,
        label=_label(name),
        help=HELP.get(name, field.help),
        choices=field.choices if field.kind != "array" else (),
        numeric=field.kind in ("integer", "number"),
        list_id=LISTS.get(name, ""),
        value=view.values.get(name, ""),
        default=_default(name, view.answer),
        error="",
    )


def _control_of(problem: PlanError | None, controls: dict) -> str:
    """The control that a problem is shown at: its field's, else the first of the field's group."""
    field = problem.field if problem else None
    if field is None or field in controls:
        return field or ""
    return next((name for name in controls if name.startswith(field.partition(".")[0] + ".")), "")


def _default(name: str, answer: dict | None) -> str:
    """What the answer's job has for a field, as text."""
    value: Any = answer["job"] if answer else None
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(value)
    if isinstance(value, dict):  # a card of one's own
        return value["name"]
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def bar(answer: dict, scale: int = 0) -> Bar:
    """The parts of the peak, what is reserved beside them and the CUDA context, against the card. ``scale``: bytes of
    the whole width, where they are more."""
    peak, card = answer["peak"], words.asked_card(answer)
    total = max(peak["process"], card["memory_bytes"] if card else 0, scale)
    stretches = [
        *words.parts(answer),
        ("unused", "Reserved, unused", peak["reserved"] - peak["allocated"]),
        ("context", "CUDA context", peak["process"] - peak["reserved"]),
    ]
    segments, taken = [], 0
    for kind, name, count in stretches:
        if count:
            segments.append(Segment(kind, name, count, _percent(taken, total), _percent(count, total)))
            taken += count
    return Bar(segments, _percent(card["memory_bytes"], total) if card else None, total)


def timeline(answer: dict) -> Timeline:
    """The memory of load and steps in order of their allocations."""
    points = [point for point in answer["timeline"]["points"] if point["phase"] != "end"]
    columns = dict(
        zip(
            answer["timeline"]["kinds"],
            map(list, zip(*(point["bytes"] for point in points), strict=True)),
            strict=False,
        )
    )
    kinds = [(kind, name) for kind, name in words.KINDS.items() if any(columns.get(kind, ()))]
    return Timeline(points, kinds, [columns[kind] for kind, _ in kinds])


def kinds_at(timeline: Timeline, phase: dict) -> list[int]:
    """What is alive at a phase's peak, in the order of ``timeline.kinds``; nothing where the phase takes nothing."""
    moments = [i for i, point in enumerate(timeline.points) if _phase(point) == (phase["step"], phase["name"])]
    highest = max(moments, key=lambda i: timeline.points[i]["allocated"], default=None)
    return [0 if highest is None else column[highest] for column in timeline.alive]


def moments(answer: dict, timeline: Timeline) -> dict:
    """What static/timeline.js draws: moment by moment after which event, in which module, bytes reserved and, for each
    kind, alive. A phase has its step's title, its name and its last moment; ``peak`` is a moment; ``limit`` is where
    the card ends, in bytes, or None where that is far above."""
    points = timeline.points
    ends = [i for i, (one, next) in enumerate(pairwise([*points, None])) if not next or _phase(next) != _phase(one)]
    card = words.asked_card(answer)
    near = card and 0 < card["limit"] < 1.5 * answer["peak"]["reserved"]
    return {
        "kinds": [(kind, name.lower()) for kind, name in timeline.kinds],
        "alive": timeline.alive,
        **{key: [point[key] for point in points] for key in ("event", "module", "reserved")},
        "phases": [(words.step_title(*_phase(points[i])), points[i]["phase"], i) for i in ends],
        "peak": max(range(len(points)), key=lambda i: (points[i]["step"] > 0, points[i]["allocated"])),
        "limit": card["limit"] if near else None,
    }


def _phase(point: dict) -> tuple[int, str]:
    return point["step"], point["phase"]


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 3)


LAYER_COLUMNS = {
    "base": "Weights",
    **{field: column.title for field, column in WEIGHT_COLUMNS.items()},
    "adapters": "Adapters",
    "gradients": "Gradients",
    "optimizer_state": "Optimizer",
    "activations": "Activations",
    "activations_checkpointed": "Activations, checkpointed",
}


def layer_columns(answer: dict) -> list[tuple[str, str]]:
    """The columns of bytes of the layers' table as (field, name); those without a number are left out."""
    return [(field, name) for field, name in LAYER_COLUMNS.items() if any(layer[field] for layer in answer["layers"])]


def layer_tree(answer: dict) -> Tree:
    """The layers, gathered by the list that they lie in."""
    lists: list[tuple[str, list[tuple[str, str, dict]]]] = []
    for layer in answer["layers"]:
        found = _IN_LIST.fullmatch(layer["path"])
        path, index, name = (found[1], found[2], found[3]) if found else ("", "", layer["path"])
        rows = next((rows for known, rows in lists if path and known == path), None)
        if rows is None and not (lists and lists[-1][0] == path):
            lists.append((path, []))
        (lists[-1][1] if rows is None else rows).append((index, name or "(itself)", layer))
    blocks = []
    for path, found in lists:
        count = 1 + max((int(n) for index, _, _ in found for n in re.findall(r"\d+", index)), default=0)
        rows = []
        for index, name, layer in found:
            indexes = index.strip("{}").replace("..", "–")
            note = f"in {indexes}" if path and indexes != f"0–{count - 1}" and count > 1 else ""
            rows.append(Row(name or "(the whole)", note, _totals([layer])))
        blocks.append(Block(path, count, _totals([layer for _, _, layer in found]), rows))
    return Tree(blocks, _totals(answer["layers"]))


_IN_LIST = re.compile(r"(.*?)\.(\d+|\{[^}]*\})(?:\.(.+))?")


def _totals(layers: list[dict]) -> dict[str, int]:
    return {field: sum(layer[field] * layer["count"] for layer in layers) for field in ("parameters", *LAYER_COLUMNS)}


def with_gpu(view: View, gpu: str) -> str:
    """The address of the same job on a card of the catalogue; a card of one's own is in the address already."""
    if gpu not in {card.key for card in all_gpus()}:
        return view.address
    kept = {key: text for key, text in view.values.items() if not key.startswith("gpu.")}
    return urlencode({**kept, "gpu": gpu})


def with_change(view: View, change: dict[str, Any]) -> str:
    """The address of the same job with some of its fields set anew."""
    kept = {key: text for key, text in view.values.items() if key.partition(".")[0] not in change}
    return urlencode({**kept, **to_pairs(change)})


def curl(view: View) -> str:
    """The command that asks for this answer; a config is left for the reader to fill in."""
    values = dict(view.values)
    if view.posted:
        values.pop("model", None)
        values["config"] = '{"model_type": "…"}'
    body = json.dumps(to_job(values.items()), ensure_ascii=False).replace("'", "'\\''")
    return f"curl -s {view.base_url}estimate -H 'content-type: application/json' -d '{body}'"
