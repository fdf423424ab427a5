"""A script's dry run, from outside: a process of its own, with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import PlanError

COMMAND = (sys.executable, "-m", f"{__package__}.script_process")
STEPS = 3
"""Steps of the optimiser that are run: the first, a steady one, and one more in which nothing may grow."""
SECONDS = 600.0
"""Seconds that a script may take."""
LAUNCHERS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""Variables by which a launcher of many processes says how many."""


def run_script(
    script: str, arguments: list[str], gpu: str | None = None, steps: int = STEPS, seconds: float = SECONDS
) -> dict[str, Any]:
    """The answer to the training script at the path ``script``, run with ``arguments`` on a dry card.

    It is the answer of :func:`vramplan.planning.estimate.estimate` without what only a job has (``job``, ``model``,
    ``layers``, ``after``), and with ``script``: its lines at the peak, and the values that were stated. Raises
    :class:`PlanError` where the script is no file, raises, takes longer than ``seconds``, or asks for many cards.
    """
    path = Path(script).resolve()
    if not path.is_file():
        raise PlanError(f"there is no script {script!r}", "give the path of a Python file", "script")
    if any(int(os.environ.get(name) or 1) > 1 for name in LAUNCHERS):
        raise PlanError("a launcher started several processes", "run vramplan run without torchrun", "script")
    with tempfile.TemporaryDirectory() as folder:
        request, out = Path(folder, "request.json"), Path(folder, "answer.json")
        asked = {"script": str(path), "arguments": arguments, "gpu": gpu, "steps": steps, "out": str(out)}
        request.write_text(json.dumps(asked))
        _wait(request, seconds)
        if not out.is_file():
            raise PlanError("the script's process ended without an answer", "see what it printed", "script")
        told = json.loads(out.read_text())
    if "error" in told:
        raise PlanError(**told["error"])
    return told


def _wait(request: Path, seconds: float) -> None:
    """Run the child until it ends. Raises :class:`PlanError` where it takes longer than ``seconds``."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    child = subprocess.Popen((*COMMAND, str(request)), env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        raise PlanError(
            f"the script made too few steps of its optimiser in {seconds:.0f} s",
            "give it less data or fewer --steps, or longer with --timeout",
            "script",
        ) from None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
