"""Small operations run on the card and planned: which attention kernel, and what kernels take beside their results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F

from ..dryrun import sandbox
from ..dryrun.cuda.as_if_cuda import as_if_cuda
from ..dryrun.cuda.attention import attention_backend, attention_case
from ..dryrun.cuda.card_facts import MEASURABLE, Card
from ..dryrun.tracker import MemoryTracker
from ..memory.allocator.caching import round_size
from ..memory.kernel_facts import KernelFacts

BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
"""``torch.nn.attention.SDPBackend``."""


def _qkv(
    device: str, dtype: torch.dtype, heads: int, keys: int, size: int, make: Callable = torch.zeros
) -> list[torch.Tensor]:
    shapes = [(1, heads, 512, size), (1, keys, 512, size), (1, keys, 512, size)]
    return [make(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


# --- which attention kernel runs ----------------------------------------------------------------------------


def attention_choices(card: Card, device: str = "cuda") -> tuple[int, list[tuple[str, str, str]]]:
    """How many cases the device was asked about, and (case, stated, chosen) of those in which it chooses another
    kernel than is stated for ``card``. Nothing is run: PyTorch tells its choice (``_fused_sdp_choice``)."""
    asked, other = 0, []
    for call in _calls(device):
        asked += 1
        stated = attention_backend(card, *call)
        *tensors, gqa = call
        chosen = BACKENDS.get(torch._fused_sdp_choice(*tensors, enable_gqa=gqa), stated)
        if chosen != stated:
            other.append((attention_case(*tensors[:5]), stated, chosen))
    return asked, other


def _calls(device: str) -> Iterator[tuple]:
    """Calls of every dtype and head size, grouped or not, with a mask or without, with dropout, and without gradients:
    query, key, value, mask, dropout, whether causal, whether grouped."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for dtype, size, keys in product(dtypes, range(8, 257, 8), (8, 2)):
        query, key, value = _qkv(device, dtype, 8, keys, size, torch.empty)
        hides = torch.empty(1, 1, 512, 512, dtype=dtype, device=device)
        for mask, dropout, grad in product((None, hides), (0.0, 0.1), (True, False)):
            if grad or not dropout:
                with torch.set_grad_enabled(grad):
                    yield query, key, value, mask, dropout, mask is None, keys != 8


# --- what kernels take --------------------------------------------------------------------------------------

ATTENTION = [
    ("bf16 heads of 64", torch.bfloat16, 16, 16, 64, False),
    ("bf16 heads of 128, 4 of them to a key", torch.bfloat16, 16, 4, 128, False),
    ("bf16 heads of 256", torch.bfloat16, 8, 8, 256, False),
    ("bf16 heads of 64 with a mask", torch.bfloat16, 16, 16, 64, True),
    ("fp32 heads of 64", torch.float32, 16, 16, 64, False),
]


def _attention(device: str, dtype, heads: int, keys: int, size: int, masked: bool) -> None:
    query, key, value = _qkv(device, dtype, heads, keys, size)
    mask = torch.zeros(1, 1, 512, 512, dtype=dtype, device=device) if masked else None
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=not masked, enable_gqa=heads != keys)
    out.backward(torch.zeros_like(out))


def _product(device: str) -> None:
    a = torch.zeros(64, 64, dtype=torch.bfloat16, device=device)
    a @ a


def _product_with_bias(device: str) -> None:
    a = torch.zeros(64, 64, dtype=torch.bfloat16, device=device)
    F.linear(a, a, a[0].contiguous())


def _bias_gradient(device: str) -> None:
    torch.zeros(4096, 3072, dtype=torch.bfloat16, device=device).sum(0)


def _norms(device: str) -> None:
    torch._foreach_norm([torch.zeros(1 << 20, device=device) for _ in range(8)])


OPERATIONS: dict[str, Callable[[str], None]] = {
    "the first product's peak": _product,
    "the first product with a bias's peak": _product_with_bias,
    "a bias gradient over 4096 rows' peak": _bias_gradient,
    "the norm of 8 gradients' peak": _norms,
    **{
        f"attention of {name}, forth and back: its peak": lambda device, case=case: _attention(device, *case)
        for name, *case in ATTENTION
    },
}


def measure_kernels(card: Card) -> dict:
    """What the current CUDA device chooses other than is stated for ``card``, and the peak of each operation, bytes."""
    asked, other = attention_choices(card)
    return {
        "asked": asked,
        "attention": other,
        "peaks": {name: _measured_peak(run) for name, run in OPERATIONS.items()},
    }


def _measured_peak(operation: Callable[[str], None]) -> int:
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    operation("cuda")
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def planned_peak(operation: Callable[[str], None], card: Card) -> tuple[int, Counter]:
    """The most bytes that ``operation`` holds at once in its plan, in blocks; and of workspaces that can be otherwise,
    what each operator asked for then."""
    tracker = MemoryTracker(card)
    with sandbox.active(), as_if_cuda(card), tracker:
        operation("meta")
    now = peak = 0
    held: Counter = Counter()
    then: Counter = Counter()
    for event in tracker.trace_log.events:
        entry = tracker.trace_log.allocations[event if event >= 0 else ~event]
        sign = 1 if event >= 0 else -1
        now += sign * round_size(entry.size)
        if entry.op in MEASURABLE:
            held[entry.op] += sign * entry.size
        if now > peak:
            peak, then = now, +held
    return peak, then


def facts_of(measured: dict, card: Card) -> tuple[KernelFacts, list[dict]]:
    """What :func:`measure_kernels` found, as facts that change a plan for ``card``; and what it found that no fact
    explains: rows of name, planned and measured.

    Operation by operation, from the simplest on: what is measured beside the plan belongs to the largest workspace
    there that no simpler operation has shown to be right.
    """
    facts, known, unexplained = KernelFacts(tuple(map(tuple, measured["attention"]))), set(), []
    for name, operation in OPERATIONS.items():
        peak, held = planned_peak(operation, Card(card.capability, card.multiprocessors, facts))
        beside = measured["peaks"][name] - peak
        mine = max((op for op in held if op not in known), key=held.__getitem__, default=None)
        if beside and (mine is None or held[mine] + beside < 0):
            unexplained.append({"name": name, "planned": peak, "measured": measured["peaks"][name]})
        elif beside:
            facts = facts._replace(sizes=(*facts.sizes, (mine, held[mine], held[mine] + beside)))
        if mine is not None:
            known.add(mine)
    return facts, unexplained
