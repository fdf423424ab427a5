"""The process in which a script runs: ``python -m vramplan.script.script_process REQUEST``.

The request is a file of JSON: script, arguments, gpu, steps, out. What the script prints goes to the standard error.
At ``out`` lies the answer at the end, or ``{"error": …}``.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from ..errors import OurFault, PlanError
from ..planning import fault_reports


def main() -> None:
    """Run the script of the request, and write its answer."""
    request = json.loads(Path(sys.argv[1]).read_text())
    os.dup2(2, 1)
    try:
        told: dict[str, Any] = _answer(request)
    except PlanError as error:
        told = {"error": error.as_dict()}
    except Exception as error:
        fault = OurFault(error)
        fault_reports.write(fault)
        told = {"error": fault.as_dict()}
    Path(request["out"]).write_text(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)  # threads and processes of the script are not waited for


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from ..dryrun import sandbox
    from ..dryrun.cuda.as_if_cuda import as_if_cuda
    from ..dryrun.cuda.card_facts import Card
    from ..dryrun.steps import empty_triton
    from ..dryrun.steps.dry_run import paged_states_elsewhere
    from ..form import to_job
    from ..job import read_job
    from ..planning.cards import usable
    from ..planning.resolve import card_of, chip_of
    from .answer import answer_of
    from .dry_card import dry_card
    from .no_weights import without_weights
    from .script_tracker import ScriptTracker

    gpu = card_of(read_job(to_job({"model": "a/script", "gpu": request["gpu"] or ""}.items())))
    capability, multiprocessors = chip_of(gpu)
    tracker = ScriptTracker(Card(capability, multiprocessors), request["script"], request["steps"])
    sandbox.hold()
    empty_triton.Kernel.values = tracker.values
    with (
        sandbox.locked(),
        as_if_cuda(tracker.card),
        paged_states_elsewhere(),
        empty_triton.installed(on_meta=False),
        without_weights(tracker),
        dry_card(tracker, gpu.name, usable(gpu), capability),
    ):
        _run(request, tracker)
        tracker.finish()
        if not any(mark.step or mark.name == "eval" for mark in tracker.trace_log.marks):
            raise PlanError("the script called no model on the card", "it trains with a model on cuda", "script")
    return answer_of(tracker, gpu)


def _run(request: dict[str, Any], tracker) -> None:
    """Run the script as ``python script arguments`` does. Raises :class:`PlanError` where it raises."""
    from .script_tracker import EnoughSteps

    script = request["script"]
    sys.argv = [script, *request["arguments"]]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except EnoughSteps:
        return
    except PlanError:
        raise
    except SystemExit as ended:
        if ended.code not in (None, 0) and not tracker.finished:
            raise PlanError(f"the script ended itself with {ended.code!r}", "see what it printed", "script") from None
    except BaseException as error:
        traceback.print_exc()
        raise PlanError(*_told(error, script), "script") from None


def _told(error: BaseException, script: str) -> tuple[str, str]:
    """What is said of a script that raised: the error, its line, and a hint."""
    lines = [entry for entry in traceback.extract_tb(error.__traceback__) if entry.filename == script]
    where = f" at {lines[-1].filename}:{lines[-1].lineno}: {lines[-1].line}" if lines else ""
    words = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"the script raised {words}{where}", "its own traceback stands above"


if __name__ == "__main__":
    main()
