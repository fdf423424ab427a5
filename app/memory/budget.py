"""What a process holds on a card outside the caching allocator, and what is left to the allocator. Bytes.

Outside are the CUDA context, loaded modules and the handles of libraries. Measured on an H200 with driver 580 and torch
2.11.0+cu130, after a training step: 766.8 MiB. Reports for other cards lie between 287047680 bytes (lazy loading,
https://github.com/pytorch/pytorch/pull/86509) and 430 MiB after a start (RTX 6000 Ada,
https://github.com/unslothai/unsloth-zoo/issues/1053), and grow by 50 to 200 MiB as kernels are first used. So for cards
that nobody measured it is an interval.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
HOPPER_CONTEXT = 804_048_077
"""766.8 MiB, see above."""

FIRST_COMMUNICATOR = {1: 1_240_268_800 - 650_969_088, 2: 1_536_032_768 - 651_034_624}
"""What NCCL takes with the first collective, by ranks: its kernels, and buffers for each peer. ``shared/measured``."""
NEXT_COMMUNICATOR = 512_000_000
"""What a second communicator of two ranks takes: 488 MiB more were used by jobs that make one (``shared/measured``)."""
COMMUNICATOR_SPREAD = 32 * MIB
"""How far measured processes with the same communicators lie apart, at most."""
MORE_PEERS = 1024 * MIB
"""What more than two ranks may take beside: 544 to 688 MB were reported of four cards' communicators
(https://github.com/NVIDIA/nccl/issues/964); nobody measured more here."""


@dataclass(frozen=True)
class Context:
    """Bytes outside the allocator: the expected value, the interval that it lies in, and where both come from."""

    expected: int
    low: int
    high: int
    source: str


def context(capability: tuple[int, int] | None) -> Context:
    """The context of a process that trains on a card of this compute capability."""
    if capability == (9, 0):
        return Context(HOPPER_CONTEXT, HOPPER_CONTEXT - 64 * MIB, HOPPER_CONTEXT + 64 * MIB, "measured on an H200")
    return Context(540 * MIB, 280 * MIB, 800 * MIB, "reports for other cards; none was measured here")


def with_communicators(context: Context, ranks: int, communicators: int) -> Context:
    """``context`` with so many NCCL communicators of ``ranks`` ranks each beside it."""
    if not communicators:
        return context
    more = FIRST_COMMUNICATOR[min(ranks, 2)] + (communicators - 1) * NEXT_COMMUNICATOR
    unknown = COMMUNICATOR_SPREAD + (MORE_PEERS if ranks > 2 else 0)
    known = "measured on two H100" if ranks <= 2 else "measured with two ranks; more may take more"
    source = f"{context.source}; {communicators} NCCL communicator(s), {known}"
    return Context(
        context.expected + more, context.low + more - COMMUNICATOR_SPREAD, context.high + more + unknown, source
    )


@dataclass(frozen=True)
class MemoryBudget:
    """What the allocator may reserve on a card: ``limit`` bytes.

    Up to ``slack_low`` of them may be missing, and up to ``slack_high`` may be there beside them; ``source`` says why.
    """

    limit: int
    slack_low: int
    slack_high: int
    source: str
