"""What a process holds on a card outside the caching allocator: CUDA context, modules, library handles. Bytes.

Measured on an H200 with driver 580 and torch 2.11.0+cu130, read after a training step: 766.8 MiB. Reports for other
cards lie between 287047680 B (lazy loading, PyTorch PR #86509) and 430 MiB after a start (RTX 6000 Ada, unsloth-zoo
#1053), growing by 50 to 200 MiB as kernels are first used. So for cards that nobody measured it is an interval.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
HOPPER_CONTEXT = 804_048_077  # 766.8 MiB


@dataclass(frozen=True)
class Context:
    """Bytes outside the allocator: the expected value and the interval it lies in, with where they come from."""

    expected: int
    low: int
    high: int
    source: str


def context(capability: tuple[int, int] | None) -> Context:
    """The context of a process that trains on a card of this compute capability."""
    if capability == (9, 0):
        return Context(HOPPER_CONTEXT, HOPPER_CONTEXT - 64 * MIB, HOPPER_CONTEXT + 64 * MIB, "measured on an H200")
    return Context(540 * MIB, 280 * MIB, 800 * MIB, "reports for other cards; none was measured here")


@dataclass(frozen=True)
class MemoryBudget:
    """What the allocator may reserve on a card: ``limit`` bytes, of which up to ``slack_low`` may be missing and up to
    ``slack_high`` more may be there; ``source`` says why."""

    limit: int
    slack_low: int
    slack_high: int
    source: str
