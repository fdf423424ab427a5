"""``vramplan probe``: a job, a suite or a recording beside its plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from ..errors import PlanError
from ..probe import check_packages
from ..render import probed
from ..render.visible import Console
from ..usecases import failure, recorded
from ..usecases import probe as measure
from .console import DOES_NOT_FIT, FITS, Json, Maybe, told_as
from .job_options import of_a_job

PROBE_SECONDS = 600.0
"""Seconds that one job may take."""


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
    with told_as(as_json):
        check_packages()
    from ..probe.keep import Keep

    if sum(given is not None for given in (whole, suite, recording)) != 1:
        raise PlanError("probe takes a job, --suite or --recording", "vramplan probe qwen2.5-0.5b -m lora")
    keep = Keep(save, picture, report)
    if suite is not None:
        if layers or picture:
            raise PlanError("--suite measures whole models, one after the other", "leave --layers and --picture out")
        raise typer.Exit(_suite(suite, yes, timeout, keep, as_json))
    with told_as(as_json):
        if recording is not None:
            answer, found = recorded(recording)
        else:
            with bench_of(yes, timeout) as bench:
                answer, found = measure(bench, whole, layers=layers, snapshot=keep.snapshot())
        keep.all(answer, found)
    raise typer.Exit(_tell_probe(answer, as_json))


def _suite(name: str, yes: bool, timeout: float, keep: Any, as_json: bool) -> int:
    """Measure every job of a suite, with a bar; then the accuracy table of this card."""
    from ..probe.suite import suite as jobs_of

    jobs = jobs_of(name)
    measured: list[tuple[str, dict]] = []
    failed: list[tuple[str, str]] = []
    errors = Console(stderr=True)
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=errors, disable=not errors.is_terminal) as progress,
        bench_of(yes, timeout, ahead=1) as bench,
    ):
        with told_as(as_json):
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
def bench_of(yes: bool, timeout: float, ahead: int = 0) -> Iterator[Any]:
    """This machine's card; where somebody sits at a terminal, they are asked, and shown each phase."""
    check_packages()
    from ..probe.measure import Bench

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
