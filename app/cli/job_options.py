"""The options that spell a job, shared by every command that takes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from ..errors import PlanError
from ..form import fields, read_object, to_job
from ..planning.cards import local_card
from .console import Maybe
from .job_files import read_job_file, read_text

CARDS = "Many cards"
MORE = "More of the job"
ADAPTERS = "Adapters and quantisation"
KEYWORD = inspect.Parameter.KEYWORD_ONLY

_KEYS: dict[str, str] = {}
"""The job's field behind each option that has one, by the option's parameter."""


def job_field(key: str, *flags: str, panel: str = "The job") -> Any:
    """An option for one field of the job; its help is the schema's. The value stays text: the schema judges it."""
    name = flags[0].lstrip("-")
    _KEYS[name.replace("-", "_")] = key
    field = fields()[key]
    help = field.help + (f" One of {', '.join(field.choices)}." if field.choices else "")
    metavar = {"integer": "N", "number": "X", "array": "A,B", "object": "JSON"}.get(field.kind, "NAME")
    return Annotated[Maybe, typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)]


JOB_OPTIONS = {
    "model": Annotated[Maybe, typer.Argument(help=fields()["model"].help, show_default=False)],
    "named": Annotated[Maybe, typer.Option("--model", help="The same as MODEL.", metavar="MODEL")],
    "config": Annotated[Maybe, typer.Option(help="A config.json instead of MODEL (-: stdin).", metavar="FILE")],
    "job": Annotated[Maybe, typer.Option(help="A whole job as JSON; options change it.", metavar="FILE")],
    "method": job_field("method", "--method", "-m"),
    "gpu": job_field("gpu", "--gpu", "-g"),
    "batch_size": job_field("batch_size", "--batch-size", "-b"),
    "sequence_length": job_field("sequence_length", "--sequence-length", "-s"),
    "gradient_checkpointing": job_field("gradient_checkpointing", "--gradient-checkpointing"),
    "optimizer": job_field("optimizer", "--optimizer"),
    "trainer": job_field("trainer", "--trainer"),
    "objective": job_field("objective", "--objective"),
    "dtype": job_field("dtype", "--dtype"),
    "reserve": job_field("reserve", "--reserve"),
    "strategy": job_field("strategy", "--strategy", panel=CARDS),
    "gpu_count": job_field("gpu_count", "--gpu-count", panel=CARDS),
    "nodes": job_field("nodes", "--nodes", panel=CARDS),
    "device_map": job_field("device_map", "--device-map", panel=CARDS),
    "lora_r": job_field("lora.r", "--lora-r", panel=ADAPTERS),
    "lora_alpha": job_field("lora.alpha", "--lora-alpha", panel=ADAPTERS),
    "lora_dropout": job_field("lora.dropout", "--lora-dropout", panel=ADAPTERS),
    "lora_targets": job_field("lora.target_modules", "--lora-targets", panel=ADAPTERS),
    "quantization": job_field("quantization.type", "--quantization", panel=ADAPTERS),
    "double_quant": job_field("quantization.double_quant", "--double-quant", panel=ADAPTERS),
    "adapter": job_field("adapter", "--adapter", panel=ADAPTERS),
    "prompt_length": job_field("prompt_length", "--prompt-length", panel=MORE),
    "completion_length": job_field("completion_length", "--completion-length", panel=MORE),
    "trainer_args": job_field("trainer_args", "--trainer-args", panel=MORE),
    "generation_args": job_field("generation_args", "--generation-args", panel=MORE),
    "processor": job_field("processor", "--processor", panel=MORE),
    "mixed_precision": job_field("mixed_precision", "--mixed-precision", panel=MORE),
    "attention": job_field("attention", "--attention", panel=MORE),
    "attention_mask": job_field("attention_mask", "--attention-mask", panel=MORE),
    "gradient_accumulation_steps": job_field(
        "gradient_accumulation_steps", "--gradient-accumulation-steps", panel=MORE
    ),
    "target_length": job_field("target_length", "--target-length", panel=MORE),
    "new_tokens": job_field("new_tokens", "--new-tokens", panel=MORE),
    "images": job_field("images", "--images", panel=MORE),
    "image_size": job_field("image_size", "--image-size", panel=MORE),
    "expert_routing": job_field("expert_routing", "--expert-routing", panel=MORE),
    "task": job_field("task", "--task", panel=MORE),
    "revision": job_field("revision", "--revision", panel=MORE),
    "set_": Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field: lora.use_dora=true.", rich_help_panel=MORE),
    ],
}
"""What every command about a job takes, by parameter."""


def of_a_job(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options that spell a job; its first parameter is the job that they spell, or None where
    none is given."""

    @wraps(command)
    def run(**given: Any) -> None:
        options = {name: given.pop(name) for name in JOB_OPTIONS}
        command(_spelled(options), **given)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    job = [inspect.Parameter(name, KEYWORD, default=None, annotation=hint) for name, hint in JOB_OPTIONS.items()]
    run.__signature__ = inspect.Signature([parameter.replace(kind=KEYWORD) for parameter in (*job[:4], *own, *job[4:])])
    run.__annotations__ = {name: parameter.annotation for name, parameter in run.__signature__.parameters.items()}
    return run


def _spelled(options: dict[str, Any]) -> dict | None:
    """The job that the options spell, unchecked."""
    pairs = [(_KEYS[name], value) for name, value in options.items() if name in _KEYS and value is not None]
    pairs += [pair(text) for text in options["set_"] or ()]
    if not pairs and not any(options[name] for name in ("model", "named", "config", "job")):
        return None
    if options["model"] is not None and options["named"] is not None:
        raise PlanError(
            f"two models are named: {options['model']} and --model {options['named']}", "leave one of them out", "model"
        )
    whole = merge(read_job_file(options["job"]) if options["job"] else {}, to_job(pairs))
    if (name := options["model"] or options["named"]) is not None:
        whole["model"] = name
    if options["config"] is not None:
        whole["config"] = read_object(read_text(options["config"]), "config", "name the model's own config.json")
    return _with_local_card(whole)


def _with_local_card(job: dict) -> dict:
    """The job with the card that ``local`` stands for; what others hold of it now is kept free for them."""
    name = job.get("gpu")
    if not isinstance(name, str) or name.partition(":")[0] != "local":
        return job
    card, busy = local_card(name)
    reserve = job.get("reserve", 0)
    return {**job, "gpu": card.model_dump(), "reserve": busy + reserve if isinstance(reserve, int) else reserve}


def pair(text: str) -> tuple[str, str]:
    """The field and the text of ``FIELD=VALUE``. Raises :class:`PlanError`."""
    key, equals, value = text.partition("=")
    if not equals:
        raise PlanError(f"--set {text}: no value", "write --set FIELD=VALUE")
    return key.strip(), value


def merge(base: dict, changes: dict) -> dict:
    """``base`` with ``changes`` over it, one level into nested objects."""
    out = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict) and key != "config"
        out[key] = {**out[key], **value} if nested else value
    return out
