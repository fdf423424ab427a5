"""A model with fewer layers, and what its measurement says of the whole one."""

from __future__ import annotations

import torch

from ..dryrun.repeat_layers import repeated, shortened


def depth_of(base: torch.nn.Module) -> int:
    """The layers of the deepest stack that repeats; 0 where none does."""
    return max((len(group.types) for group in repeated(base)), default=0)


def with_layers(base: torch.nn.Module, count: int) -> torch.nn.Module:
    """``base`` with ``count`` layers of each stack: its first ones, and the last."""
    groups = repeated(base)
    kept = []
    for group in groups:
        depth = len(group.types)
        kept.append(list(range(depth)) if count >= depth else [*range(count - 1), depth - 1])
    return shortened(base, groups, kept)


def depths_for(count: int) -> tuple[int, int]:
    """The two depths that are measured for ``--layers count``."""
    return max(2, count // 2), max(count, 4)


def extrapolate(
    depths: tuple[int, int], planned: tuple[int, int], measured: tuple[int, int], whole: int, at: int
) -> int:
    """Bytes at depth ``whole``, for which ``at`` is planned: the plan, and what both depths measured beside theirs.

    The plan's growth from layer to layer is exact in what it knows; what it does not know is taken to grow by the same
    bytes with every layer, as it did between the two depths.
    """
    first, second = (m - p for m, p in zip(measured, planned, strict=True))
    return at + second + (second - first) * (whole - depths[1]) // (depths[1] - depths[0])
