"""``vramplan estimate``, ``solve`` and ``compare``."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from ..errors import PlanError
from ..form import read_json
from ..job import TARGETS
from ..planning.cards import read_prices
from ..render import probed, terminal, words
from ..render.comparison_csv import to_csv
from ..render.visible import Console
from ..usecases import advise, other_trainers, plan, unwrap
from ..usecases import compare as side_by_side
from ..usecases import probe as measure
from ..usecases import solve as largest
from .console import CANNOT_SAY, DOES_NOT_FIT, FITS, Jobs, Json, Prices, told_as, waiting
from .job_files import each_line, lines_of
from .job_options import of_a_job, pair
from .probe_command import PROBE_SECONDS, bench_of


@of_a_job
def estimate(
    whole: dict | None,
    jobs: Jobs = None,
    as_json: Json = False,
    advised: Annotated[bool, typer.Option("--advise", help="Plan every change that could make it fit.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Every layer, repeated ones too.")] = False,
    trainers: Annotated[
        bool, typer.Option("--trainers", help="Plan the other trainers' steps too; else what is known is said.")
    ] = False,
    run: Annotated[bool, typer.Option("--probe", help="Run it on this machine's GPU too, beside the plan.")] = False,
) -> None:
    """Plan the memory of one step: does it fit, how much is left, what takes it.

    Exit codes: 0 fits, 1 does not fit the card of --gpu, 2 cannot say.
    """
    if jobs is not None:
        if whole is not None or advised or run or trainers:
            raise PlanError("--jobs takes every job from its own line", "leave the other options out", "jobs")
        raise typer.Exit(each_line(jobs, lambda one: plan(one, all_layers=layers)))
    with told_as(as_json):
        with waiting("Running the step on the meta device"):
            answer = plan(whole or {}, all_layers=layers)
        if advised:
            with waiting("Planning every change"):
                answer["advice"] = advise(whole)
        if trainers or not as_json:
            with waiting("Planning it with the other trainers"):
                answer["other_trainers"] = other_trainers(whole or {}, trace=trainers)
        if run:
            with bench_of(False, PROBE_SECONDS) as bench:
                answer["probe"], _ = measure(bench, whole)
    if as_json:
        print(json.dumps(answer))
    else:
        terminal.show(answer, Console())
        if run:
            print()
            probed.show(answer["probe"], Console())
    raise typer.Exit(DOES_NOT_FIT if words.state(answer) == "does_not_fit" else FITS)


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
            each_line(jobs, lambda one: largest({**one, **beside} if isinstance(one, dict) else one, target))
        )
    with told_as(as_json), waiting("Running steps on the meta device"):
        answer = largest({**(whole or {}), **beside}, target)
    if as_json:
        print(json.dumps(answer))
    else:
        terminal.solved(answer, target, Console())
    raise typer.Exit(FITS if answer[target] else DOES_NOT_FIT)


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
        lines = (read_json(line, "line", "a line is one job as JSON") for line in lines_of(jobs) if line.strip())
        asked: dict = {"jobs": [unwrap(line)[1] for line in lines]}
    else:
        pairs = [pair(text) for text in over or ()]
        asked = {"job": whole, "over": {field: values.split(",") for field, values in pairs}}
    with told_as(as_json), waiting("Running the steps on the meta device"):
        answer = side_by_side(asked)
    if as_json:
        print(json.dumps(answer))
    elif as_csv:
        sys.stdout.write(to_csv(answer))
    else:
        terminal.comparison(answer, Console())
    raise typer.Exit(CANNOT_SAY if all("error" in row for row in answer["rows"]) else FITS)
