"""Jobs side by side: up to six of them, or one varied over its methods, ranks, lengths, cards."""

from __future__ import annotations

import itertools
import math
from typing import Any

from ..errors import PlanError, near
from ..form import fields, to_job
from ..job import Job, read_job
from .planned_job import plan_job, summary

JOBS = 6
ROWS = 100
"""The most rows of one comparison: as many as one reads."""


def compare(data: Any) -> dict:
    """The rows of a comparison, in order: ``{"jobs": [job, …]}``, at most six, or ``{"job": …, "over": {field: [value,
    …]}}``, every combination of the values. ``over``'s fields are dotted names: ``method``, ``lora.r``, ``gpu``.

    A job that cannot be planned is a row with ``error``. Raises :class:`PlanError` where there is nothing to compare.
    """
    return {"over": list(data.get("over") or ()) if isinstance(data, dict) else [],
            "rows": [_row(varied, job) for varied, job in jobs_of(data)]}  # fmt: skip


def jobs_of(data: Any) -> list[tuple[dict, Any]]:
    """The jobs of a comparison, each with what was varied. Raises :class:`PlanError`."""
    if not isinstance(data, dict) or not ({"jobs"} == data.keys() or {"job", "over"} == data.keys()):
        raise PlanError(
            "a comparison is a list of jobs, or one job and what to vary",
            'send {"jobs": [{…}, {…}]} or {"job": {…}, "over": {"method": ["lora", "qlora"]}}',
        )
    if "jobs" in data:
        return [({}, job) for job in _jobs(data["jobs"])]
    over = _values(data["over"])
    if (count := math.prod(map(len, over.values()))) > ROWS:
        raise PlanError(f"a comparison of {count} jobs is too long", f"vary at most {ROWS}", "over")
    combinations = (dict(zip(over, values, strict=True)) for values in itertools.product(*over.values()))
    return [(varied, _varied(data["job"], varied)) for varied in combinations]


def _jobs(jobs: Any) -> list:
    if not isinstance(jobs, list) or not 0 < len(jobs) <= JOBS:
        raise PlanError(f"`jobs` should be a list of 1 to {JOBS} jobs", "to vary one job, send job and over", "jobs")
    return jobs


def _values(over: Any) -> dict[str, list]:
    """The values by field. Raises :class:`PlanError` for a field that no job has."""
    if not isinstance(over, dict) or not over:
        raise PlanError("`over` names nothing to vary", '{"lora.r": [8, 16, 32]}', "over")
    known = [*fields(), "gpu"]
    for field, values in over.items():
        if field not in known:
            raise PlanError(f"no job has a field `{field}`", near(field, known), "over")
        if not isinstance(values, list) or not values:
            raise PlanError(f"`over.{field}` should be a list of values", f'{{"{field}": [value, value]}}', "over")
    return over


def _varied(job: Any, values: dict[str, Any]) -> dict:
    """``job`` with the values of the dotted fields; one that holds text is read as a form's is."""
    if not isinstance(job, (dict, Job)):
        raise PlanError("`job` is no JSON object", 'send {"model": "…"}', "job")
    out = job.model_dump(exclude_unset=True) if isinstance(job, Job) else dict(job)
    for field, value in values.items():
        if isinstance(value, str):
            value = to_job([(field, value)])
            (parent, value), *_ = value.items()
        else:
            parent, _, name = field.partition(".")
            value = {name: value} if name else value
        nested = isinstance(value, dict) and "." in field and isinstance(out.get(parent), dict)
        out[parent] = {**out[parent], **value} if nested else value
    return out


def _row(varied: dict, data: Any) -> dict:
    try:
        planned = plan_job(read_job(data))
        found = summary(planned)
    except PlanError as error:
        return {"varied": varied, "error": error.as_dict()}
    job, facts = planned.job, planned.facts
    return {
        "varied": varied,
        "model": planned.source["id"] or facts["class"],
        "method": job.method,
        "parameters": facts["parameters"],
        "trainable_parameters": facts["trainable_parameters"],
        "batch_size": job.batch_size,
        "sequence_length": job.sequence_length,
        **found,
        "gpu": found["gpu"] if job.gpu is not None else None,
    }
