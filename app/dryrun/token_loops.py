"""Loops over tokens, run for a few of them: the recurrent scan that transformers runs where no kernel is installed.

The iterations that run are taken for layers of a stack (a path of their own each, below the module's, which tells how
many there are), and the books are repeated to all tokens as they are over layers (:func:`unrolled`): once, when they
are those of the whole model. What the loop collected is filled up with its last entry, so that what follows has its
shape.
"""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from ..memory.events import TraceLog
from ..memory.repeat import Expansion, Stack, expand
from .sandbox import is_tracing, replaced
from .tracker import MemoryTracker

SCAN_FUNCTIONS = frozenset({"mamba_selective_scan"})
"""Functions of transformers whose loop over ``range(seq_len)`` does the same for every token (models/mamba/
modeling_mamba.py, and where it is copied): it multiplies, adds and collects."""
TOKENS_RUN = 8
"""Iterations that run: more than the three that differ (the first, the last, those between)."""
_LOOP = re.compile(r"(.*\.<(\d+) of (\d+) tokens>)\.\d+")


class TokenLoops:
    """The loops of one run, of which ``few`` tokens are run."""

    def __init__(self, tracker: MemoryTracker, few: int = TOKENS_RUN):
        self.tracker, self.few = tracker, few

    @contextmanager
    def shortened(self, model):
        """While ``model`` runs, its scans run for a few tokens only."""
        names = {type(module).__module__ for module in model.modules()}
        modules = [m for m in map(sys.modules.get, names) if any(hasattr(m, scan) for scan in SCAN_FUNCTIONS)]
        with ExitStack() as undo:
            for module in modules:
                undo.enter_context(replaced(module, "range", self._range))
            yield

    def _range(self, *bounds: int):
        frame = sys._getframe(1)
        scans = is_tracing() and frame.f_code.co_name in SCAN_FUNCTIONS
        if not scans or len(bounds) > 1 or bounds[0] <= 2 * self.few:
            return builtins.range(*bounds)
        return self._few(int(bounds[0]), frame)

    def _few(self, length: int, frame: FrameType) -> Iterator[int]:
        path = f"{self.tracker.current_fqn}.<{self.few} of {length} tokens>"
        for index in builtins.range(self.few):
            with self.tracker.attributed_to(f"{path}.{index}"):
                yield index
        for value in frame.f_locals.values():
            if isinstance(value, list) and len(value) == self.few:
                value.extend([value[-1].detach()] * (length - self.few))


def repeat_tokens(found: TraceLog | Expansion) -> TraceLog | Expansion:
    """The books of all tokens. Raises :class:`~vramplan.memory.repeat.NotRepeatable`."""
    short = found.short_log if isinstance(found, Expansion) else found
    if not any(map(_LOOP.fullmatch, {*short.event_fqns})):
        return found
    trace_log = found.trace_log() if isinstance(found, Expansion) else found
    loops = sorted({loop.groups() for loop in map(_LOOP.fullmatch, {*trace_log.event_fqns}) if loop})
    return expand(trace_log, [Stack((path,), (0,) * int(few), (0,) * int(all), loop=True) for path, few, all in loops])
