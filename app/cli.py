"""``vramplan``: the command line.

``estimate`` exits with 0 where the job fits its card (or names none), 1 where it does not, 2 where nobody can say.
Nothing here imports torch; the dry run does, when there is a job to run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from app.batch import Unexpected, advise, each, failure, plan
from app.batch import solve as largest
from app.catalog.gpus import all_gpus
from app.catalog.models import MODELS, search_models
from app.errors import PlanError
from app.form import fields, read_json, read_object, to_job
from app.render import terminal, words

FITS, DOES_NOT_FIT, CANNOT_SAY = 0, 1, 2

app = typer.Typer(
    name="vramplan",
    help="Will it fit? The GPU memory of a training step, from config.json alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_KEYS: dict[str, str] = {}
"""The job's field behind each option of ``estimate``, by the option's parameter."""


def _field(key: str, *flags: str, panel: str = "The job") -> Any:
    """An option for one field of the job; its help is the schema's. The value stays text: the schema judges it."""
    name = flags[0].lstrip("-")
    _KEYS[name.replace("-", "_")] = key
    field = fields()[key]
    help = field.help + (f" One of {', '.join(field.choices)}." if field.choices else "")
    metavar = {"integer": "N", "number": "X", "array": "A,B"}.get(field.kind, "NAME")
    return typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


MORE = "More of the job"
ADAPTERS = "Adapters and quantisation"
Maybe = str | None


@app.command()
def estimate(
    context: typer.Context,
    model: Annotated[Maybe, typer.Argument(help=fields()["model"].help, show_default=False)] = None,
    config: Annotated[Maybe, typer.Option(help="A config.json instead of MODEL (-: stdin).", metavar="FILE")] = None,
    job: Annotated[Maybe, typer.Option(help="A whole job as JSON; options change it.", metavar="FILE")] = None,
    jobs: Annotated[Maybe, typer.Option(help="Many jobs, one a line of JSON (-: stdin).", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The answer as JSON.")] = False,
    advised: Annotated[bool, typer.Option("--advise", help="Plan every change that could make it fit.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Every layer, repeated ones too.")] = False,
    method: Annotated[Maybe, _field("method", "--method", "-m")] = None,
    gpu: Annotated[Maybe, _field("gpu", "--gpu", "-g")] = None,
    batch_size: Annotated[Maybe, _field("batch_size", "--batch-size", "-b")] = None,
    sequence_length: Annotated[Maybe, _field("sequence_length", "--sequence-length", "-s")] = None,
    gradient_checkpointing: Annotated[Maybe, _field("gradient_checkpointing", "--gradient-checkpointing")] = None,
    optimizer: Annotated[Maybe, _field("optimizer", "--optimizer")] = None,
    trainer: Annotated[Maybe, _field("trainer", "--trainer")] = None,
    dtype: Annotated[Maybe, _field("dtype", "--dtype")] = None,
    lora_r: Annotated[Maybe, _field("lora.r", "--lora-r", panel=ADAPTERS)] = None,
    lora_alpha: Annotated[Maybe, _field("lora.alpha", "--lora-alpha", panel=ADAPTERS)] = None,
    lora_dropout: Annotated[Maybe, _field("lora.dropout", "--lora-dropout", panel=ADAPTERS)] = None,
    lora_targets: Annotated[Maybe, _field("lora.target_modules", "--lora-targets", panel=ADAPTERS)] = None,
    quantization: Annotated[Maybe, _field("quantization.type", "--quantization", panel=ADAPTERS)] = None,
    double_quant: Annotated[Maybe, _field("quantization.double_quant", "--double-quant", panel=ADAPTERS)] = None,
    mixed_precision: Annotated[Maybe, _field("mixed_precision", "--mixed-precision", panel=MORE)] = None,
    attention: Annotated[Maybe, _field("attention", "--attention", panel=MORE)] = None,
    attention_mask: Annotated[Maybe, _field("attention_mask", "--attention-mask", panel=MORE)] = None,
    gradient_accumulation_steps: Annotated[
        Maybe, _field("gradient_accumulation_steps", "--gradient-accumulation-steps", panel=MORE)
    ] = None,
    target_length: Annotated[Maybe, _field("target_length", "--target-length", panel=MORE)] = None,
    new_tokens: Annotated[Maybe, _field("new_tokens", "--new-tokens", panel=MORE)] = None,
    task: Annotated[Maybe, _field("task", "--task", panel=MORE)] = None,
    revision: Annotated[Maybe, _field("revision", "--revision", panel=MORE)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field: lora.use_dora=true.", rich_help_panel=MORE),
    ] = None,
) -> None:
    """Plan the memory of one step: does it fit, how much is left, what takes it.

    Exit codes: 0 fits, 1 does not fit the card of --gpu, 2 cannot say.
    """
    pairs = [(_KEYS[name], value) for name, value in context.params.items() if name in _KEYS and value is not None]
    pairs += [_pair(text) for text in set_ or ()]
    if jobs is not None:
        if model or config or job or pairs or advised:
            raise PlanError("--jobs takes every job from its own line", "leave the other options out", "jobs")
        raise typer.Exit(_each_line(jobs, lambda one: plan(one, all_layers=layers)))
    whole = _merge(_read_job(job) if job else {}, to_job(pairs))
    if model is not None:
        whole["model"] = model
    if config is not None:
        whole["config"] = read_object(_read(config), "config", "name the model's own config.json")
    try:
        with _waiting("Running the step on the meta device"):
            answer = plan(whole, all_layers=layers)
        if advised:
            with _waiting("Planning every change"):
                answer["advice"] = advise(whole)
    except PlanError as error:
        if as_json:
            print(json.dumps(failure(error)))
        raise
    if as_json:
        print(json.dumps(answer))
    else:
        terminal.show(answer, Console())
    raise typer.Exit(DOES_NOT_FIT if words.state(answer) == "does_not_fit" else FITS)


@app.command()
def solve(
    target: Annotated[str, typer.Option("--for", help="batch_size, sequence_length or r, the rank.")] = "batch_size",
    job: Annotated[Maybe, typer.Option(help="A whole job as JSON.", metavar="FILE")] = None,
    jobs: Annotated[Maybe, typer.Option(help="Many jobs, one a line of JSON (-: stdin).", metavar="FILE")] = None,
    memory_limit_bytes: Annotated[int | None, typer.Option(help="What the allocator may hold, in bytes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The answer as JSON.")] = False,
) -> None:
    """Find the largest batch, length or rank whose step fits in so much allocator memory."""
    if (job is None) == (jobs is None):
        raise PlanError("solve takes --job or --jobs", "a line of --jobs is a job with memory_limit_bytes", "jobs")
    limit = {} if memory_limit_bytes is None else {"memory_limit_bytes": memory_limit_bytes}
    if jobs is not None:
        raise typer.Exit(_each_line(jobs, lambda one: largest(one | limit if isinstance(one, dict) else one, target)))
    with _waiting("Running steps on the meta device"):
        answer = largest({**_read_job(job), **limit}, target)
    if as_json:
        print(json.dumps(answer))
    else:
        print(f"{target} {answer[target]} is the largest whose step fits in {words.size(answer['memory_limit_bytes'])}")
    raise typer.Exit(FITS if answer[target] else DOES_NOT_FIT)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise PlanError(f"--set {text}: no value", "write --set FIELD=VALUE")
    return key.strip(), value


def _merge(base: dict, changes: dict) -> dict:
    """``base`` with ``changes`` over it, one level into nested objects."""
    out = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict) and key != "config"
        out[key] = {**out[key], **value} if nested else value
    return out


def _read(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _read_job(path: str) -> dict:
    return read_object(_read(path), "job", 'a job is {"model": "…", "method": "qlora"}')


def _each_line(path: str, use_case: Callable[[Any], dict]) -> int:
    """One JSON line out for each job line in, as soon as it is planned."""
    code = FITS
    for line in _lines(path):
        if not line.strip():
            continue
        try:
            out = each(read_json(line, "line", "a line is one job as JSON"), use_case)
        except PlanError as error:
            out = failure(error)
        code = CANNOT_SAY if "error" in out else code
        print(json.dumps(out), flush=True)
    return code


def _lines(path: str) -> Iterator[str]:
    if path == "-":
        yield from sys.stdin
        return
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> PlanError:
    reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
    return PlanError(f"{path} cannot be read: {reason}", "name a file of JSON")


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Serve the page and the HTTP API. Local folders are read as models only for this machine's own users."""
    import uvicorn

    from app.web import create_app

    local = host in ("127.0.0.1", "::1", "localhost")
    uvicorn.run(create_app(local_files=local, warm=True), host=host, port=port, server_header=False)


@app.command()
def gpus(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the cards of the catalogue, the smallest first."""
    if as_json:
        print(json.dumps([asdict(card) for card in all_gpus()]))
    else:
        terminal.gpus(all_gpus(), Console())


@app.command()
def models(
    query: Annotated[list[str] | None, typer.Argument(help="Words of a model's name.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the models that need no download; any other is fetched from the Hub by its id."""
    text = " ".join(query or ())
    found = search_models(text, limit=len(MODELS))
    if not found:
        raise PlanError(f"the catalogue has no model like {text!r}", "give its whole Hub id to vramplan estimate")
    if as_json:
        print(json.dumps([{"id": m.id, "parameters": m.parameters, "aliases": m.aliases} for m in found]))
    else:
        terminal.models(found, Console())


QUESTION = {
    "model": "llama-3.1-70b",
    "method": "qlora",
    "quantization": {"type": "nf4", "double_quant": True},
    "lora": {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "gradient_checkpointing": True,
    "batch_size": 1,
    "sequence_length": 2048,
}
LADDER = ("llama-2-7b", "llama-2-13b", "codellama-34b", "llama-3.1-70b")


@app.command()
def demo() -> None:
    """Answer the main question: QLoRA of a 70B model, on 80 GB and on 48 GB; then what 7B to 70B need."""
    console = Console()
    for card in ("a100-80gb", "a6000"):
        with _waiting(f"Planning {QUESTION['model']} on {card}"):
            answer = plan({**QUESTION, "gpu": card})
        if card == "a100-80gb":
            terminal.show(answer, console)
        else:
            console.print()
            console.print(Text(words.verdict(answer), terminal.STATES[words.state(answer)]))
    table = terminal.ladder()
    for name in LADDER:
        with _waiting(f"Planning {name}"):
            terminal.ladder_row(table, plan({**QUESTION, "model": name}))
    console.print(Text("\nThe same job for smaller models", "bold"))
    console.print(table, highlight=False)


@app.command()
def version() -> None:
    """Print the versions that plans are traced with."""
    from app.plan import stack

    for name, number in stack().items():
        print(name, number)


def _waiting(text: str):
    """A spinner on standard error, where somebody looks at it."""
    errors = Console(stderr=True)
    return errors.status(f"{text} …") if errors.is_terminal else nullcontext()


def _tell(error: PlanError) -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("Cannot say: ", "bold red"), error.message), highlight=False)
    if error.weights:
        console.print(Text.assemble(("Weights: ", "dim"), words.weights(error.weights)), highlight=False)
    if error.hint:
        console.print(Text.assemble(("Try: ", "dim"), error.hint), highlight=False)


def main() -> None:
    """Run the command line. Every error that a user can cause ends here, in two lines and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app()
    except PlanError as error:
        _tell(error)
    except Exception as error:
        _tell(Unexpected(error))
    sys.exit(CANNOT_SAY)
