"""Loops over tokens, of which a few iterations run: the recurrent scan of transformers without a kernel for it.

Each iteration that runs gets an fqn of its own below the module's, which also tells how many iterations there are.
:func:`repeat_tokens` repeats them to all tokens, as layers of a stack are repeated. That is done once, on the trace log
of the whole model. A list that the loop filled gets copies of its last entry, so that it has the right length.
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
"""Functions of transformers whose loop over ``range(seq_len)`` does the same for every token.

Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/models/mamba/modeling_mamba.py#L174
``mamba_selective_scan``, which other models copy: it multiplies, adds and collects."""
TOKENS_RUN = 8
"""Iterations that run. Three of them may differ: the first, the last, and all between."""
_LOOP = re.compile(r"(.*\.<(\d+) of (\d+) tokens>)\.\d+")


class TokenLoops:
    """The scans of one run, of which ``few`` iterations run."""

    def __init__(self, tracker: MemoryTracker, few: int = TOKENS_RUN):
        self.tracker, self.few = tracker, few

    @contextmanager
    def shortened(self, model):
        """The scans of ``model`` run for a few tokens only, while the context lasts."""
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
        fqn = f"{self.tracker.current_fqn}.<{self.few} of {length} tokens>"
        for index in builtins.range(self.few):
            with self.tracker.attributed_to(f"{fqn}.{index}"):
                yield index
        for value in frame.f_locals.values():
            if isinstance(value, list) and len(value) == self.few:
                value.extend([value[-1].detach()] * (length - self.few))


def repeat_tokens(log: TraceLog | Expansion) -> TraceLog | Expansion:
    """The trace log with its loops repeated to all tokens. Raises :class:`~vramplan.memory.repeat.NotRepeatable`."""
    short = log.short_log if isinstance(log, Expansion) else log
    if not any(map(_LOOP.fullmatch, {*short.event_fqns})):
        return log
    trace_log = log.trace_log() if isinstance(log, Expansion) else log
    loops = sorted({loop.groups() for loop in map(_LOOP.fullmatch, {*trace_log.event_fqns}) if loop})
    stacks = [Stack((fqn,), (0,) * int(few), (0,) * int(total), loop=True) for fqn, few, total in loops]
    return expand(trace_log, stacks)
