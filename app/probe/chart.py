"""Both timelines on one axis: the bytes requested and not given back, phase by phase; as PNG or as HTML.

The card's counters also hold the rests of blocks that are not split: ``max_memory_allocated`` is a little more.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from ..memory.allocator.caching import round_size
from ..memory.events import EMPTY_CACHE, TraceLog
from .recorder import HISTORY_STEPS

POINTS = 400
"""Points of a phase's curve: the highest moment of each stretch."""


def draw(plan: TraceLog, measured: TraceLog, title: str, path: str | Path | io.StringIO) -> None:
    """Write the picture to ``path``, whose ending says what it is; to a stream as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.add_subplot()
    ours, theirs = _curves(measured), _curves(plan)
    names = in_order(theirs, ours)
    for at, name in enumerate(names):
        if at % 2:
            axes.axvspan(at, at + 1, color="0.94", zorder=0)
        label = f"{name[1]}\nstep {name[0]}" if name[0] else name[1]
        axes.text(at + 0.5, 1.01, label, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
    for curves, label, style in (
        (theirs, "planned", {"color": "#d1495b", "linewidth": 2.4, "alpha": 0.75}),
        (ours, "measured", {"color": "#00798c", "linewidth": 1.1}),
    ):
        x = [
            at + (n + 0.5) / len(curves[name])
            for at, name in enumerate(names)
            for n in range(len(curves.get(name, ())))
        ]
        y = [value / 2**30 for name in names for value in curves.get(name, ())]
        axes.plot(x, y, label=f"{label}: {max(y, default=0):.2f} GiB", **style)
    axes.set_xlim(0, max(len(names), 1))
    axes.set_ylim(0)
    axes.set_xticks([])
    axes.set_ylabel("requested, GiB")
    axes.set_title(title, pad=30, fontsize=11)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110, format=None if isinstance(path, (str, Path)) else "svg")


def page(plan: TraceLog, measured: TraceLog, title: str, lines: list[str]) -> str:
    """The picture as a page that needs nothing else: an SVG, and ``lines`` of text below it."""
    file = io.StringIO()
    draw(plan, measured, title, file)
    drawing = file.getvalue()
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}"
        "svg{width:100%;height:auto}pre{overflow-x:auto}</style>\n"
        f"{drawing[drawing.index('<svg') :]}\n<pre>{html.escape(chr(10).join(lines))}</pre>\n</html>\n"
    )


def in_order(theirs: Iterable[tuple], ours: Iterable[tuple]) -> list[tuple]:
    """The phases of both, step by step; what only one has in a step comes last there."""
    return sorted(dict.fromkeys([*theirs, *ours]), key=lambda name: name[0])


def _curves(trace_log: TraceLog) -> dict[tuple, list[int]]:
    """What is requested in each phase, by (step, phase, how often before): the highest moments of its stretches."""
    now = list(accumulate(_change(trace_log, event) for event in trace_log.events))
    out: dict[tuple, list[int]] = {}
    marks = [mark for mark in trace_log.marks if mark.name != EMPTY_CACHE and mark.step <= HISTORY_STEPS]
    begins = [mark.at for mark in trace_log.marks if mark.name != EMPTY_CACHE]
    ends = [*begins[1 : len(marks)], len(now)]
    for mark, end in zip(marks, ends, strict=False):
        values = now[mark.at : end]
        if not values:
            continue
        same = sum(name[:2] == (mark.step, mark.name) for name in out)
        name = (0, "load", 0) if mark.step == 0 else (mark.step, mark.name, same)
        stretch = max(1, len(values) // POINTS)
        out.setdefault(name, []).extend(max(values[at : at + stretch]) for at in range(0, len(values), stretch))
    return out


def _change(trace_log: TraceLog, event: int) -> int:
    size = round_size(trace_log.allocations[event if event >= 0 else ~event].size)
    return size if event >= 0 else -size
