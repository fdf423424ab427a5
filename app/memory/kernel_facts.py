"""What a probe found the kernels of a card to do otherwise than ``app/dryrun/cuda`` says."""

from __future__ import annotations

from typing import NamedTuple


class KernelFacts(NamedTuple):
    """Empty: nothing. Plain tuples, to be part of keys.

    ``attention`` are (case, the kernel that the sources say runs, the one that does); ``sizes`` are (operator, bytes
    that its source says it takes beside its results, bytes that it took), measured once: other sizes of the same
    operator are taken to be in proportion.
    """

    attention: tuple[tuple[str, str, str], ...] = ()
    sizes: tuple[tuple[str, int, int], ...] = ()

    def backend(self, case: str, stated: str) -> str:
        """The attention kernel that runs in ``case`` where the sources say ``stated``."""
        return next((found for what, said, found in self.attention if (what, said) == (case, stated)), stated)

    def size(self, operator: str, stated: int) -> int:
        """Bytes that ``operator`` takes where its source says ``stated``."""
        for name, said, found in self.sizes:
            if name == operator:
                return stated * found // said
        return stated
