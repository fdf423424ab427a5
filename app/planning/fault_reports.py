"""A report of a fault of vramplan's own: one file in the user's cache folder, to attach where it is told."""

from __future__ import annotations

import json
import logging
import os
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import STRICT, OurFault, Unanswered
from .fingerprint import stack
from .profile_store import own_path

KEPT = 20
"""Reports that are kept, the latest."""
log = logging.getLogger("vramplan")


def folder() -> Path:
    """Where reports lie."""
    return own_path().parent / "reports"


def path_of(fault: OurFault) -> Path | None:
    """The file with the report of a fault; None: it could not be written."""
    return None if fault.name is None else folder() / f"{fault.name}.json"


def write(fault: OurFault, job: Any = None) -> None:
    """Write what is known of a fault, once, and name the report in its hint. ``job`` as it was asked."""
    if fault.name is not None:
        return
    report = {"vramplan": __version__, "message": fault.message, "job": job, **fault.report, "versions": stack()}
    text = json.dumps(report, indent=1, default=str)
    fault.name = f"{time.strftime('%Y%m%d-%H%M%S')}-{sha256(text.encode()).hexdigest()[:8]}"
    log.info("%s (report %s)", fault.message, fault.name)
    try:
        _store(fault.name, text)
    except OSError as error:
        log.warning("the report %s cannot be written: %s", fault.name, error)
        fault.name = None
        return
    fault.hint = f"this is a fault of vramplan, not of the job: please report it, with report {fault.name}"


def go_on_without(given_up: Unanswered) -> None:
    """Report a fault of ours in what an answer can do without. Raises it under the tests, and what is no such fault."""
    if not isinstance(given_up.error, OurFault) or os.environ.get(STRICT):
        raise given_up
    write(given_up.error)


def _store(name: str, text: str) -> None:
    folder().mkdir(parents=True, exist_ok=True)
    (folder() / f"{name}.json").write_text(text)
    for old in sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime_ns)[:-KEPT]:
        old.unlink(missing_ok=True)
