"""Many jobs at once: one answer or one error each, in order. Whatever goes wrong is an error of its job alone."""

from __future__ import annotations

import logging
from typing import Any

from app.errors import PlanError

log = logging.getLogger("vramplan")


class Unexpected(PlanError):
    """The planner's own failure, told in one sentence: the trace goes to the log at level debug."""

    def __init__(self, error: BaseException):
        text = (str(error).strip().splitlines() or [""])[0][:300]
        super().__init__(
            f"the planner failed on this job: {type(error).__name__}{': ' if text else ''}{text}",
            "this is a fault of vramplan, not of the job: please report it with the job",
        )


def plan(job: Any, *, all_layers: bool = False) -> dict:
    """The answer to one job. Raises :class:`PlanError` and nothing else."""
    try:
        from app.service import estimate

        return estimate(job, all_layers=all_layers)
    except PlanError:
        raise
    except Exception as error:
        log.debug("planning failed", exc_info=True)
        raise Unexpected(error) from None


def failure(error: PlanError) -> dict:
    """The error as every interface writes it."""
    return {"error": error.as_dict()}


def unwrap(item: Any) -> tuple[dict, Any]:
    """What to give back with the answer (``{"id": …}`` or nothing), and the job itself."""
    if isinstance(item, dict) and "job" in item and item.keys() <= {"id", "job"}:
        return ({"id": item["id"]} if "id" in item else {}), item["job"]
    return {}, item


def plan_item(item: Any, *, all_layers: bool = False) -> dict:
    """The answer or the error of one item, a job or ``{"id": …, "job": {…}}``, with its id."""
    tag, job = unwrap(item)
    try:
        return {**tag, **plan(job, all_layers=all_layers)}
    except PlanError as error:
        return {**tag, **failure(error)}
