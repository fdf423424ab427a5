"""What a probe leaves on disk where it is asked to: snapshot, recording, timelines, a row for the accuracy table."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import PlanError
from .report import Probed, row_of

PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Keep:
    """``folder`` takes everything, ``picture`` both timelines, ``report`` one more row; None: nothing."""

    folder: str | None = None
    picture: str | None = None
    report: str | None = None

    def __post_init__(self):
        if self.picture is not None and Path(self.picture).suffix not in PICTURES:
            raise PlanError(f"{self.picture} is no picture", f"its name should end in {', '.join(PICTURES)}", "picture")

    def snapshot(self, name: str = "probe") -> str | None:
        """Where the measuring process writes the allocator's history, for pytorch.org/memory_viz."""
        if self.folder is None:
            return None
        return str(_folder(self.folder) / f"{_slug(name)}.snapshot.pickle")

    def all(self, answer: dict, probed: Probed, name: str = "probe") -> None:
        """Write what was asked for. Raises :class:`PlanError` where a file cannot be written."""
        plan, measured = probed.planned.trace_log, probed.recording.trace_log
        title = f"{_title(probed)} on {answer['card']['name']}"
        try:
            if self.folder is not None:
                from .chart import page

                base = _folder(self.folder) / _slug(name)
                probed.recording.save(f"{base}.recording.json.gz")
                html = page(plan, measured, title, _lines(answer))
                Path(f"{base}.timelines.html").write_text(html, encoding="utf-8")
            if self.picture is not None:
                from .chart import draw

                draw(plan, measured, title, self.picture)
            if self.report is not None:
                with open(self.report, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row_of(probed, name if name != "probe" else _title(probed))) + "\n")
        except OSError as error:
            raise PlanError(f"{error.filename} cannot be written: {error.strerror}", "name another place") from None


def _folder(name: str) -> Path:
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"{name} is no folder: {error.strerror}", "name a folder", "save") from None
    return Path(name)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _title(probed: Probed) -> str:
    job = probed.planned.job
    length = "" if job.sequence_length is None else f" s{job.sequence_length}"
    return f"{probed.planned.config['model_type']} {job.method} b{job.batch_size}{length} {job.trainer}"


def _lines(answer: dict) -> list[str]:
    out = [f"{'bytes':10} {'planned':>16} {'measured':>16} {'off by':>14}"]
    for row in answer["figures"]:
        cells = (_bytes(row.get(name), sign) for name, sign in (("planned", ""), ("measured", ""), ("difference", "+")))
        out.append("{:10} {:>16} {:>16} {:>14}".format(row["figure"], *cells))
    match = answer["match"]
    out += ["", f"{100 * match['share']:.3f} % of the bytes at the measured peak are events of the plan.", ""]
    for row in match["differences"]:
        whose = f"{row['module'] or 'the loop'}, {row['kind']} since {row['phase']}"
        out.append(f"{whose}: {_bytes(row['planned'])} planned, {_bytes(row['measured'])} measured; {row['op']}")
    return out


def _bytes(size: int | None, sign: str = "") -> str:
    return "-" if size is None else f"{size:{sign if size else ''},}"
