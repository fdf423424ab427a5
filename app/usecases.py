"""The use cases: what can be asked of the planner. Whatever goes wrong leaves as a :class:`PlanError`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .errors import OurFault, PlanError, Unanswered
from .planning import fault_reports
from .probe import check_packages

T = TypeVar("T")


def plan(job: Any, *, all_layers: bool = False) -> dict:
    """The answer to one job. Raises :class:`PlanError` and nothing else."""
    from .planning.estimate import estimate

    return _told(lambda: estimate(job, all_layers=all_layers), job)


def other_trainers(job: Any, *, trace: bool = True) -> list[dict]:
    """What one job takes with the other trainers, as far as it can be planned; without ``trace``, as far as it is
    known. Raises :class:`PlanError` and nothing else."""
    from .planning.other_trainers import other_trainers

    return _told(lambda: other_trainers(job, trace=trace), job)


def alive(job: Any, event: int) -> list[dict]:
    """Who holds most after an event of one job's timeline. Raises :class:`PlanError` and nothing else."""
    from .planning.estimate import alive

    return _told(lambda: alive(job, event), job)


def solve(job: Any, target: str) -> dict:
    """The largest ``target`` of a job that fits. Raises :class:`PlanError` and nothing else."""
    from .planning.solver import solve

    return _told(lambda: solve(job, target), job)


def advise(job: Any) -> dict:
    """What to change so that one job fits its card. Raises :class:`PlanError` and nothing else."""
    from .planning.advice import advise

    return _told(lambda: advise(job), job)


def compare(what: Any) -> dict:
    """Jobs side by side. Raises :class:`PlanError` and nothing else."""
    from .planning.comparison import compare

    return _told(lambda: compare(what), what)


def serving(asked: Any) -> dict:
    """What the command of a server takes of a card, and whether it starts. Raises :class:`PlanError` and nothing
    else."""
    from .serving.server_plan import answer

    return _told(lambda: answer(asked), asked)


def probe(bench: Any, job: Any, **options: Any) -> tuple[dict, Any]:
    """A job measured on a bench beside its plan: the answer, and what it was made from. Raises :class:`PlanError` and
    nothing else."""
    check_packages()
    from .probe.measure import measured

    return _told(lambda: measured(bench, job, **options), job)


def recorded(path: str) -> tuple[dict, Any]:
    """A recording made elsewhere beside the plan that is made here, as :func:`probe`."""
    check_packages()
    from .probe.measure import from_recording
    from .probe.recording import read_recording

    return _told(lambda: from_recording(read_recording(path)), path)


def _told(use_case: Callable[[], T], job: Any) -> T:
    """What ``use_case`` makes of ``job``. Of a fault of ours a report is written."""
    try:
        return use_case()
    except OurFault as error:
        fault = error
    except PlanError:
        raise
    except Unanswered as given_up:
        if not isinstance(given_up.error, OurFault):
            raise
        fault = given_up.error
    except Exception as error:
        fault = OurFault(error)
    fault_reports.write(fault, job)
    raise fault from None


def failure(error: PlanError) -> dict:
    """An error as the JSON object that every interface writes."""
    return {"error": error.as_dict()}


BESIDE = ("memory_limit_bytes", "multiple_of", "prices")
"""What a line may hold beside its job, for the solver."""


def unwrap(item: Any) -> tuple[dict, Any]:
    """What to give back with the answer (``{"id": …}`` or nothing), and the job itself."""
    if isinstance(item, dict) and "job" in item and item.keys() <= {"id", "job", *BESIDE}:
        tag = {"id": item["id"]} if "id" in item else {}
        beside = {name: item[name] for name in BESIDE if name in item}
        return tag, {**item["job"], **beside} if beside and isinstance(item["job"], dict) else item["job"]
    return {}, item


def each(item: Any, use_case: Callable[[Any], dict]) -> dict:
    """The answer or the error of one item, a job or ``{"id": …, "job": {…}}``, with its id."""
    tag, job = unwrap(item)
    try:
        return {**tag, **use_case(job)}
    except PlanError as error:
        return {**tag, **failure(error)}
