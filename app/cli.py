"""``vramplan``: the command line.

``estimate`` exits with 0 where the job fits its card (or names none), 1 where it does not, 2 where nobody can say.
Nothing here imports torch; the dry run does, when there is a job to run.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.text import Text

from .catalog.gpus import all_gpus, parts_of
from .catalog.models import MODELS, search_models
from .errors import PlanError
from .form import fields, read_json, read_object, to_job
from .job import TARGETS
from .planning import tracer
from .planning.cards import local_card, read_prices
from .planning.pretrace import ASKED, QUESTION
from .progress import listener
from .render import probed, terminal, words
from .render.comparison_csv import to_csv
from .usecases import Unexpected, advise, each, failure, plan, recorded, unwrap
from .usecases import compare as side_by_side
from .usecases import probe as measure
from .usecases import solve as largest

FITS, DOES_NOT_FIT, CANNOT_SAY = 0, 1, 2
PROBE_SECONDS = 600.0

app = typer.Typer(
    name="vramplan",
    help="Will it fit? The GPU memory of a training step, from config.json alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_KEYS: dict[str, str] = {}
"""The job's field behind each option that has one, by the option's parameter."""


def _field(key: str, *flags: str, panel: str = "The job") -> Any:
    """An option for one field of the job; its help is the schema's. The value stays text: the schema judges it."""
    name = flags[0].lstrip("-")
    _KEYS[name.replace("-", "_")] = key
    field = fields()[key]
    help = field.help + (f" One of {', '.join(field.choices)}." if field.choices else "")
    metavar = {"integer": "N", "number": "X", "array": "A,B"}.get(field.kind, "NAME")
    return Annotated[Maybe, typer.Option(*flags, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)]


MORE = "More of the job"
ADAPTERS = "Adapters and quantisation"
Maybe = str | None

JOB_OPTIONS = {
    "model": Annotated[Maybe, typer.Argument(help=fields()["model"].help, show_default=False)],
    "config": Annotated[Maybe, typer.Option(help="A config.json instead of MODEL (-: stdin).", metavar="FILE")],
    "job": Annotated[Maybe, typer.Option(help="A whole job as JSON; options change it.", metavar="FILE")],
    "method": _field("method", "--method", "-m"),
    "gpu": _field("gpu", "--gpu", "-g"),
    "batch_size": _field("batch_size", "--batch-size", "-b"),
    "sequence_length": _field("sequence_length", "--sequence-length", "-s"),
    "gradient_checkpointing": _field("gradient_checkpointing", "--gradient-checkpointing"),
    "optimizer": _field("optimizer", "--optimizer"),
    "trainer": _field("trainer", "--trainer"),
    "dtype": _field("dtype", "--dtype"),
    "reserve": _field("reserve", "--reserve"),
    "lora_r": _field("lora.r", "--lora-r", panel=ADAPTERS),
    "lora_alpha": _field("lora.alpha", "--lora-alpha", panel=ADAPTERS),
    "lora_dropout": _field("lora.dropout", "--lora-dropout", panel=ADAPTERS),
    "lora_targets": _field("lora.target_modules", "--lora-targets", panel=ADAPTERS),
    "quantization": _field("quantization.type", "--quantization", panel=ADAPTERS),
    "double_quant": _field("quantization.double_quant", "--double-quant", panel=ADAPTERS),
    "mixed_precision": _field("mixed_precision", "--mixed-precision", panel=MORE),
    "attention": _field("attention", "--attention", panel=MORE),
    "attention_mask": _field("attention_mask", "--attention-mask", panel=MORE),
    "gradient_accumulation_steps": _field("gradient_accumulation_steps", "--gradient-accumulation-steps", panel=MORE),
    "target_length": _field("target_length", "--target-length", panel=MORE),
    "new_tokens": _field("new_tokens", "--new-tokens", panel=MORE),
    "images": _field("images", "--images", panel=MORE),
    "image_size": _field("image_size", "--image-size", panel=MORE),
    "expert_routing": _field("expert_routing", "--expert-routing", panel=MORE),
    "task": _field("task", "--task", panel=MORE),
    "revision": _field("revision", "--revision", panel=MORE),
    "set_": Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field: lora.use_dora=true.", rich_help_panel=MORE),
    ],
}
"""What every command that is asked of a job takes, by parameter."""


def of_a_job(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options that spell a job; its first parameter is the job that they spell, or None where
    none is given."""

    @wraps(command)
    def run(**given: Any) -> None:
        options = {name: given.pop(name) for name in JOB_OPTIONS}
        command(_spelled(options), **given)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    job = [inspect.Parameter(name, KEYWORD, default=None, annotation=hint) for name, hint in JOB_OPTIONS.items()]
    run.__signature__ = inspect.Signature([parameter.replace(kind=KEYWORD) for parameter in (*job[:3], *own, *job[3:])])
    run.__annotations__ = {name: parameter.annotation for name, parameter in run.__signature__.parameters.items()}
    return run


KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _spelled(options: dict[str, Any]) -> dict | None:
    """The job that the options spell, unchecked."""
    pairs = [(_KEYS[name], value) for name, value in options.items() if name in _KEYS and value is not None]
    pairs += [_pair(text) for text in options["set_"] or ()]
    if not pairs and not any(options[name] for name in ("model", "config", "job")):
        return None
    whole = _merge(_read_job(options["job"]) if options["job"] else {}, to_job(pairs))
    if options["model"] is not None:
        whole["model"] = options["model"]
    if options["config"] is not None:
        whole["config"] = read_object(_read(options["config"]), "config", "name the model's own config.json")
    return _with_local_card(whole)


def _with_local_card(job: dict) -> dict:
    """The job with the card that ``local`` stands for; what others hold of it now is kept free for them."""
    name = job.get("gpu")
    if not isinstance(name, str) or name.partition(":")[0] != "local":
        return job
    card, busy = local_card(name)
    reserve = job.get("reserve", 0)
    return {**job, "gpu": card.model_dump(), "reserve": busy + reserve if isinstance(reserve, int) else reserve}


Jobs = Annotated[Maybe, typer.Option(help="Many jobs, one a line of JSON (-: stdin).", metavar="FILE")]
Json = Annotated[bool, typer.Option("--json", help="The answer as JSON.")]
Prices = Annotated[
    Maybe,
    typer.Option(help="Your prices: a file of lines card,price, or JSON; cards are ranked by them.", metavar="FILE"),
]


@app.command()
@of_a_job
def estimate(
    whole: dict | None,
    jobs: Jobs = None,
    as_json: Json = False,
    advised: Annotated[bool, typer.Option("--advise", help="Plan every change that could make it fit.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Every layer, repeated ones too.")] = False,
    run: Annotated[bool, typer.Option("--probe", help="Run it on this machine's GPU too, beside the plan.")] = False,
) -> None:
    """Plan the memory of one step: does it fit, how much is left, what takes it.

    Exit codes: 0 fits, 1 does not fit the card of --gpu, 2 cannot say.
    """
    if jobs is not None:
        if whole is not None or advised or run:
            raise PlanError("--jobs takes every job from its own line", "leave the other options out", "jobs")
        raise typer.Exit(_each_line(jobs, lambda one: plan(one, all_layers=layers)))
    with _told_as(as_json):
        with _waiting("Running the step on the meta device"):
            answer = plan(whole or {}, all_layers=layers)
        if advised:
            with _waiting("Planning every change"):
                answer["advice"] = advise(whole)
        if run:
            with _bench(False, PROBE_SECONDS) as bench:
                answer["probe"], _ = measure(bench, whole)
    if as_json:
        print(json.dumps(answer))
    else:
        terminal.show(answer, Console())
        if run:
            print()
            probed.show(answer["probe"], Console())
    raise typer.Exit(DOES_NOT_FIT if words.state(answer) == "does_not_fit" else FITS)


@app.command()
@of_a_job
def solve(
    whole: dict | None,
    target: Annotated[
        str, typer.Option("--for", help=f"{', '.join(TARGETS)}: the largest that fits, or the smallest card.")
    ] = "batch_size",
    memory_limit_bytes: Annotated[
        int | None, typer.Option(help="What the allocator may hold, instead of a card.", metavar="N")
    ] = None,
    multiple_of: Annotated[int | None, typer.Option(help="Only multiples of it.", metavar="N")] = None,
    prices: Prices = None,
    jobs: Jobs = None,
    as_json: Json = False,
) -> None:
    """Find the largest batch, length or rank that fits a card; the smallest card; the largest model.

    Exit codes: 0 found, 1 nothing fits, 2 cannot say.
    """
    beside: dict[str, Any] = {"memory_limit_bytes": memory_limit_bytes, "multiple_of": multiple_of}
    beside["prices"] = read_prices(prices) if prices else None
    beside = {name: value for name, value in beside.items() if value is not None}
    if jobs is not None:
        if whole is not None:
            raise PlanError("--jobs takes every job from its own line", "leave the other options out", "jobs")
        raise typer.Exit(
            _each_line(jobs, lambda one: largest({**one, **beside} if isinstance(one, dict) else one, target))
        )
    with _told_as(as_json), _waiting("Running steps on the meta device"):
        answer = largest({**(whole or {}), **beside}, target)
    if as_json:
        print(json.dumps(answer))
    else:
        terminal.solved(answer, target, Console())
    raise typer.Exit(FITS if answer[target] else DOES_NOT_FIT)


@app.command()
@of_a_job
def compare(
    whole: dict | None,
    over: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=A,B", help="Vary a field: method=lora,qlora, lora.r=8,16, gpu=rtx-4090,24GiB."),
    ] = None,
    jobs: Jobs = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="The rows as CSV, sizes in bytes.")] = False,
    as_json: Json = False,
) -> None:
    """Hold jobs side by side: up to six of --jobs, or one varied with --over."""
    if (jobs is None) == (whole is None):
        raise PlanError(
            "compare takes --jobs, or one job and --over", "vramplan compare MODEL --over lora.r=8,16", "jobs"
        )
    if jobs is not None:
        lines = (read_json(line, "line", "a line is one job as JSON") for line in _lines(jobs) if line.strip())
        asked: dict = {"jobs": [unwrap(line)[1] for line in lines]}
    else:
        pairs = [_pair(text) for text in over or ()]
        asked = {"job": whole, "over": {field: values.split(",") for field, values in pairs}}
    with _told_as(as_json), _waiting("Running the steps on the meta device"):
        answer = side_by_side(asked)
    if as_json:
        print(json.dumps(answer))
    elif as_csv:
        sys.stdout.write(to_csv(answer))
    else:
        terminal.comparison(answer, Console())
    raise typer.Exit(CANNOT_SAY if all("error" in row for row in answer["rows"]) else FITS)


@contextmanager
def _told_as(as_json: bool) -> Iterator[None]:
    """Errors on standard output too, where the answer would have been JSON."""
    try:
        yield
    except PlanError as error:
        if as_json:
            print(json.dumps(failure(error)))
        raise


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
@of_a_job
def probe(
    whole: dict | None,
    suite: Annotated[Maybe, typer.Option(help="Many jobs instead: quick or full.", metavar="NAME")] = None,
    recording: Annotated[
        Maybe, typer.Option(help="Compare what --save wrote elsewhere; needs no GPU.", metavar="FILE")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=2, help="Measure a model of so many layers, and extrapolate.", metavar="N")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Try what is predicted not to fit.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one job may take.")] = PROBE_SECONDS,
    save: Annotated[Maybe, typer.Option(help="Keep snapshot, recording and timelines.", metavar="DIR")] = None,
    picture: Annotated[Maybe, typer.Option(help="Both timelines as a picture (.png, .svg).", metavar="FILE")] = None,
    report: Annotated[
        Maybe, typer.Option(help="Add a row for the accuracy table; it names no person and no path.", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the job on this machine's GPU, with random weights, and show plan and measurement side by side.

    Nothing is downloaded but config.json. Exit codes: 0 measured, 1 out of memory, 2 cannot say.
    """
    from .probe.keep import Keep

    if sum(given is not None for given in (whole, suite, recording)) != 1:
        raise PlanError("probe takes a job, --suite or --recording", "vramplan probe qwen2.5-0.5b -m lora")
    keep = Keep(save, picture, report)
    if suite is not None:
        if layers or picture:
            raise PlanError("--suite measures whole models, one after the other", "leave --layers and --picture out")
        raise typer.Exit(_suite(suite, yes, timeout, keep, as_json))
    with _told_as(as_json):
        if recording is not None:
            answer, found = recorded(recording)
        else:
            with _bench(yes, timeout) as bench:
                answer, found = measure(bench, whole, layers=layers, snapshot=keep.snapshot())
        keep.all(answer, found)
    raise typer.Exit(_tell_probe(answer, as_json))


def _suite(name: str, yes: bool, timeout: float, keep: Any, as_json: bool) -> int:
    """Measure every job of a suite, with a bar; then the accuracy table of this card."""
    from .probe.suite import suite as jobs_of

    jobs = jobs_of(name)
    measured: list[tuple[str, dict]] = []
    failed: list[tuple[str, str]] = []
    errors = Console(stderr=True)
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=errors, disable=not errors.is_terminal) as progress,
        _bench(yes, timeout, ahead=1) as bench,
    ):
        with _told_as(as_json):
            bench.look()  # no card is said once, not job by job
        bar = progress.add_task("", total=len(jobs))
        for title, job in jobs:
            progress.update(bar, description=title)
            try:
                answer, found = measure(bench, job, snapshot=keep.snapshot(title))
                keep.all(answer, found, title)
                broke = answer["broke_in"]
                failed += [(title, probed.verdict(answer))] if broke else []
                measured += [] if broke else [(title, answer)]
            except PlanError as error:
                answer = failure(error)
                failed.append((title, error.message))
            if as_json:
                print(json.dumps({"id": title, **answer}), flush=True)
            progress.advance(bar)
    if not measured:
        raise PlanError(f"no job of the suite could be measured: {failed[0][1]}", "see the card with nvidia-smi")
    if not as_json:
        probed.suite(measured, failed, Console())
    return FITS


@contextmanager
def _bench(yes: bool, timeout: float, ahead: int = 0) -> Iterator[Any]:
    """This machine's card; where somebody sits at a terminal, they are asked, and shown each phase."""
    from .probe.measure import Bench

    errors = Console(stderr=True)
    status = errors.status("Planning …") if errors.is_terminal and not ahead else None

    def tell(phase: str, step: int) -> None:
        if status is not None:
            status.start()
            status.update(f"Measuring: {phase}" + (f", step {step}" if step else ""))

    def ask(question: str) -> bool:
        if status is not None:
            status.stop()
        return typer.confirm(f"{question}. Try it under a cap?", err=True)

    bench = Bench(yes, ask if sys.stdin.isatty() else None, timeout, tell, ahead=ahead)
    try:
        if status is not None:
            status.start()
        yield bench
    finally:
        if status is not None:
            status.stop()
        bench.close()


def _tell_probe(answer: dict, as_json: bool) -> int:
    if as_json:
        print(json.dumps(answer))
    else:
        probed.show(answer, Console())
    return DOES_NOT_FIT if answer["broke_in"] else FITS


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    allow_probe: Annotated[
        bool, typer.Option("--allow-probe", help="Let POST /probe run jobs on this machine's GPU.")
    ] = False,
) -> None:
    """Serve the page and the HTTP API. Local folders are read as models only for this machine's own users."""
    import uvicorn

    from .server.app import create_app

    local = host in ("127.0.0.1", "::1", "localhost")
    uvicorn.run(
        create_app(local_files=local, warm=True, allow_probe=allow_probe), host=host, port=port, server_header=False
    )


@app.command()
def gpus(prices: Prices = None, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the cards of the catalogue, the smallest first; with --prices those that have one, the cheapest first."""
    cards, known = all_gpus(), read_prices(prices) if prices else {}
    if known:
        cards = sorted((card for card in cards if card.key in known), key=lambda card: known[card.key])
    if as_json:
        print(json.dumps([{**asdict(card), "parts": parts_of(card), "price": known.get(card.key)} for card in cards]))
    else:
        terminal.gpus(cards, known, Console())


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


LADDER = ASKED[:4]


@app.command()
def demo() -> None:
    """Answer the main question: QLoRA of a 70B model, on 80 GB and on 48 GB; then what 7B to 70B need."""
    console = Console()
    for card in ("a100-80gb", "a6000"):
        with _waiting(f"Planning {LADDER[-1]} on {card}"):
            answer = plan({**QUESTION, "model": LADDER[-1], "gpu": card})
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
    from .planning.fingerprint import stack

    for name, number in stack().items():
        print(name, number)


@contextmanager
def _waiting(text: str) -> Iterator[None]:
    """A spinner on standard error, where somebody looks at it, that says what is being done."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield
        return
    with errors.status(f"{text} …") as status:
        before = listener.set(lambda words: status.update(f"{text}: {words} …"))
        try:
            yield
        finally:
            listener.reset(before)


def _tell(error: PlanError) -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble(("Cannot say: ", "bold red"), error.message), highlight=False)
    if error.weights:
        console.print(Text.assemble(("Weights: ", "dim"), words.weights(error.weights)), highlight=False)
    if error.hint:
        console.print(Text.assemble(("Try: ", "dim"), error.hint), highlight=False)


def main() -> None:
    """Run the command line. Every error that a user can cause ends here, in two lines and exit code 2."""
    tracer.process_is_ours = True
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
