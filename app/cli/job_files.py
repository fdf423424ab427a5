"""Reading of jobs from files and standard input, and answers line by line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..form import read_json, read_object
from ..usecases import each, failure
from .console import CANNOT_SAY, FITS


def read_text(path: str) -> str:
    """The text of a file, or of standard input (``-``). Raises :class:`PlanError`."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def read_job_file(path: str) -> dict:
    """The job in a JSON file, unchecked. Raises :class:`PlanError`."""
    return read_object(read_text(path), "job", 'a job is {"model": "…", "method": "qlora"}')


def each_line(path: str, use_case: Callable[[Any], dict]) -> int:
    """One JSON line out for each job line in, as soon as it is planned."""
    code = FITS
    for line in lines_of(path):
        if not line.strip():
            continue
        try:
            out = each(read_json(line, "line", "a line is one job as JSON"), use_case)
        except PlanError as error:
            out = failure(error)
        code = CANNOT_SAY if "error" in out else code
        print(json.dumps(out), flush=True)
    return code


def lines_of(path: str) -> Iterator[str]:
    """The lines of a file, or of standard input (``-``), as they come. Raises :class:`PlanError`."""
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
