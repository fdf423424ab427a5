"""What a probe found the kernels of a card to do, where the rules of ``dryrun/cuda`` say otherwise."""

from __future__ import annotations

from typing import NamedTuple


class KernelFacts(NamedTuple):
    """A probe's findings; empty: it found nothing. They are plain tuples, since they are part of a profile's key.

    ``attention`` are (case, the kernel that PyTorch's sources select, the one that runs). ``sizes`` are (operator,
    bytes that the rule says it allocates beside its results, bytes that it allocated), measured once: other sizes of
    the same operator are taken to be in proportion.
    """

    attention: tuple[tuple[str, str, str], ...] = ()
    sizes: tuple[tuple[str, int, int], ...] = ()

    def backend(self, case: str, stated: str) -> str:
        """The attention kernel that runs in ``case`` where the rule says ``stated``."""
        return next((found for where, rule, found in self.attention if (where, rule) == (case, stated)), stated)

    def size(self, operator: str, stated: int) -> int:
        """Bytes that ``operator`` allocates where the rule says ``stated``."""
        for name, rule, found in self.sizes:
            if name == operator:
                return stated * found // rule
        return stated
