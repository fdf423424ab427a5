"""What a probe leaves: the job, the card, the stack, the figures and the trace log of a real run, as one file."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import PlanError
from ..memory.events import Allocation, Mark, TraceLog

OK, OUT_OF_MEMORY, FAILED = "ok", "out_of_memory", "failed"


@dataclass
class Recording:
    """``job`` is resolved and holds its config; ``layers`` how many of the model's were built (None: all).

    ``phases`` are :class:`~vramplan.probe.recorder.Figures`, ``card`` what :meth:`CudaMeter.facts` tells;
    ``outcome`` is one of the three words above, ``reason`` the stack's own message where it is not ``ok``.
    """

    job: dict
    layers: int | None
    task: str
    card: dict
    stack: dict
    outcome: str = OK
    reason: str = ""
    placed: int = 0
    optimizer_state: int | None = None
    trainable_parameters: int = 0
    phases: list[dict] = field(default_factory=list)
    trace_log: TraceLog = field(default_factory=TraceLog)
    cap: int | None = None
    seconds: float = 0.0

    @property
    def steps(self) -> list[dict]:
        """The phases of steps, without the load's."""
        return [phase for phase in self.phases if phase["step"] > 0]

    def peak(self, figure: str) -> int | None:
        """The largest ``figure`` over all steps; None where the card did not tell it."""
        values = [phase[figure] for phase in self.steps if phase[figure] is not None]
        return max(values) if values else None

    def save(self, path: str | Path) -> None:
        """Write the recording to a file of compressed JSON."""
        with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as file:
            json.dump({**self._plain(), "books": _pack(self.trace_log)}, file, separators=(",", ":"))

    def _plain(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "trace_log"}


def read_recording(path: str | Path) -> Recording:
    """A recording that was saved. Raises :class:`PlanError` where ``path`` holds none."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            data = json.load(file)
        packed = data.pop("books")
        return Recording(**data, trace_log=_unpack(packed))
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{path} is no recording of a probe: {error}", "vramplan probe --save makes one") from None


COLUMNS = {"module": "fqn", "kind": "kind", "phase": "phase", "op": "op"}
"""Column of a saved recording to the field of an allocation."""


def _pack(trace_log: TraceLog) -> dict:
    """TraceLog with each text once, and what is alike written together: columns, not rows."""
    texts: dict[str, int] = {}
    number = lambda text: texts.setdefault(text, len(texts))  # noqa: E731
    columns = {
        "size": [a.size for a in trace_log.allocations],
        **{name: [number(getattr(a, field)) for a in trace_log.allocations] for name, field in COLUMNS.items()},
        "events": trace_log.events,
        "sites": [number(site) for site in trace_log.event_fqns],
        "marks": [list(mark) for mark in trace_log.marks],
    }
    return {"texts": list(texts), **columns}


def _unpack(data: dict) -> TraceLog:
    texts = data["texts"]
    rows = zip(data["size"], *([texts[i] for i in data[name]] for name in COLUMNS), strict=True)
    return TraceLog(
        [Allocation(*row) for row in rows],
        data["events"],
        [texts[i] for i in data["sites"]],
        [Mark(*mark) for mark in data["marks"]],
    )
