"""PyTorch's own record of what its allocator did as a trace log: every allocation, and where it was made.

The record is ``device_traces`` of ``torch.cuda.memory._snapshot()`` (torch/cuda/memory.py has its fields): of interest
are ``alloc`` and ``free_completed``; their ``size`` is what was asked for, before any rounding.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache

from ..memory.events import EMPTY_CACHE, Allocation, Mark, TraceLog

LIBRARIES = re.compile(r"^(torch|accelerate)/|<|app/probe/|(^|/)contextlib\.py$")
"""Files, from their library's name on, that say nothing about who asked: the caller beyond them is meant."""


def log_of(trace: Iterable[dict], marks: list[tuple[int, str, int]], places: list[tuple[int, str]]) -> TraceLog:
    """The trace log of ``trace``: kinds are left to the plan, ``op`` is the innermost Python function that asked.

    ``marks`` are (events before it, phase, step), ``places`` (allocations before it, module path); both count from
    where the record begins.
    """
    trace_log = TraceLog()
    live: dict[int, int] = {}
    counts = [count for count, _ in places]
    phases = [(at, name, step) for at, name, step in marks if name != EMPTY_CACHE]
    starts = [at for at, _, _ in phases]
    for entry in trace:
        action = entry["action"]
        if action == "alloc":
            key = len(trace_log.allocations)
            at = bisect_right(counts, key) - 1
            module = places[at][1] if at >= 0 else ""
            phase = phases[max(bisect_right(starts, len(trace_log.events)) - 1, 0)][1] if phases else "load"
            trace_log.allocations.append(Allocation(entry["size"], module, "temporaries", phase, caller(entry)))
            trace_log.events.append(key)
            trace_log.event_fqns.append(module)
            live[entry["addr"]] = key
        elif action == "free_completed" and entry["addr"] in live:
            trace_log.events.append(~live.pop(entry["addr"]))
            trace_log.event_fqns.append("")
    end = len(trace_log.events)
    trace_log.marks = [Mark(min(at, end), name, step) for at, name, step in marks]
    return trace_log


def caller(entry: dict) -> str:
    """``file:line function`` of the innermost frame outside PyTorch; empty in the autograd engine's own thread."""
    for frame in entry.get("frames") or ():
        file = _within(frame["filename"])
        if not LIBRARIES.search(file):
            return f"{file}:{frame['line']} {frame['name']}"
    return ""


@lru_cache(maxsize=4096)
def _within(file: str) -> str:
    """A file's path from where Python found its package: nobody's home folder is written down."""
    packages = re.split("(?:site|dist)-packages/", file)
    if len(packages) > 1:
        return packages[-1]
    roots = [root.rstrip("/") + "/" for root in sys.path if root and file.startswith(root.rstrip("/") + "/")]
    return file.removeprefix(max(roots, key=len)) if roots else "/".join(file.split("/")[-2:])
