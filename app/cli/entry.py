"""The entry point of the command line."""

from __future__ import annotations

import os
import sys

import typer

from ..errors import OurFault, PlanError
from ..planning import fault_reports, tracer
from .console import CANNOT_SAY, tell
from .demo_command import demo
from .other_commands import gpus, models, serve, version
from .plan_commands import compare, estimate, solve
from .probe_command import probe
from .run_command import run
from .serving_command import serving

app = typer.Typer(
    name="vramplan",
    help="Will it fit? The GPU memory of a training step, from config.json alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (estimate, solve, compare, serving, probe, serve, gpus, models, demo, version):
    app.command()(command)
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(run)


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
        tell(error)
    except Exception as error:
        fault = OurFault(error)
        fault_reports.write(fault)
        tell(fault)
    sys.exit(CANNOT_SAY)
