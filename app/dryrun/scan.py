"""Loops over tokens, run for a few of them: the recurrent scan that transformers runs where no kernel is installed.

The iterations that run are taken for layers of a stack (a path of their own each, below the module's), and the books
are repeated to all tokens as they are over layers (:func:`app.memory.fold.expand`). What the loop collected is filled
up with its last entry, so that what follows has its shape.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from app.dryrun.trace import Ledger
from app.memory.event import Books
from app.memory.fold import Stack, Unfoldable, expand

SCANS = frozenset({"mamba_selective_scan"})
"""Functions of transformers whose loop over ``range(seq_len)`` does the same for every token (models/mamba/
modeling_mamba.py, and where it is copied): it multiplies, adds and collects."""
FEW = 8
"""Iterations that run: more than the three that differ (the first, the last, those between)."""
_MARK = ".<tokens>"


class Scans:
    """The loops of one run, of which ``few`` tokens are run; ``lengths`` tells by path how many tokens they have."""

    def __init__(self, ledger: Ledger, few: int = FEW):
        self.ledger, self.few = ledger, few
        self.lengths: dict[str, int] = {}

    @contextmanager
    def shortened(self, model):
        """While ``model`` runs, its scans run for a few tokens only."""
        names = {type(module).__module__ for module in model.modules()}
        modules = [m for m in map(sys.modules.get, names) if any(hasattr(m, scan) for scan in SCANS)]
        for module in modules:
            module.range = self._range
        try:
            yield
        finally:
            for module in modules:
                del module.range

    def _range(self, *bounds: int):
        frame = sys._getframe(1)
        if frame.f_code.co_name not in SCANS or len(bounds) > 1 or bounds[0] <= 2 * self.few:
            return builtins.range(*bounds)
        return self._few(int(bounds[0]), frame)

    def _few(self, length: int, frame: FrameType) -> Iterator[int]:
        path = self.ledger.place + _MARK
        if self.lengths.setdefault(path, length) != length:
            raise Unfoldable(f"the scans of {path} have several lengths")
        for index in builtins.range(self.few):
            with self.ledger.at(f"{path}.{index}"):
                yield index
        for value in frame.f_locals.values():
            if isinstance(value, list) and len(value) == self.few:
                value.extend([value[-1].detach()] * (length - self.few))

    def whole(self, books: Books) -> Books:
        """The books of all tokens. Raises :class:`Unfoldable`."""
        if not self.lengths:
            return books
        stacks = [Stack((path,), (0,) * self.few, (0,) * length) for path, length in self.lengths.items()]
        books = expand(books, stacks).books()
        plain = {name: name.partition(_MARK)[0] for name in {*books.sites, *(a.module for a in books.allocations)}}
        return replace(
            books,
            allocations=[entry._replace(module=plain[entry.module]) for entry in books.allocations],
            sites=[plain[site] for site in books.sites],
        )
