"""Small operations run on the card and planned: which attention kernel, and what kernels take beside their results."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from app.dryrun import cuda
from app.dryrun.trace import Ledger
from app.memory.allocator import round_size

BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
"""``torch.nn.attention.SDPBackend``."""


def _qkv(device: str, dtype: torch.dtype, heads: int, keys: int, size: int) -> list[torch.Tensor]:
    shapes = [(1, heads, 512, size), (1, keys, 512, size), (1, keys, 512, size)]
    return [torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


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


OPERATIONS: list[tuple[str, Callable[[str], None]]] = [
    ("the first product's peak", _product),
    ("the first product with a bias's peak", _product_with_bias),
    ("a bias gradient over 4096 rows' peak", _bias_gradient),
    ("the norm of 8 gradients' peak", _norms),
    *(
        (f"attention of {name}, forth and back: its peak", lambda device, case=case: _attention(device, *case))
        for name, *case in ATTENTION
    ),
]


def measure_kernels(card: cuda.Card) -> list[dict]:
    """Each operation's name, its planned and its measured bytes (or kernel). On the current CUDA device."""
    rows = []
    for name, dtype, heads, keys, size, masked in ATTENTION:
        query, key, value = _qkv("cuda", dtype, heads, keys, size)
        mask = torch.zeros(1, 1, 512, 512, dtype=dtype, device="cuda") if masked else None
        choice = torch._fused_sdp_choice(query, key, value, mask, 0.0, not masked, enable_gqa=heads != keys)
        planned = cuda.attention_backend(card, query, key, value, mask, 0.0, not masked, heads != keys)
        rows.append({"name": f"attention of {name}", "planned": planned, "measured": BACKENDS.get(choice, str(choice))})
    del query, key, value, mask
    for name, operation in OPERATIONS:
        rows.append({"name": name, "planned": planned_peak(operation, card), "measured": _measured_peak(operation)})
    return rows


def planned_peak(operation: Callable[[str], None], card: cuda.Card) -> int:
    """The most bytes that ``operation`` holds at once in its plan, in blocks."""
    ledger = Ledger(card)
    with cuda.as_if_cuda(card), ledger:
        operation("meta")
    now = peak = 0
    for event in ledger.books.events:
        size = round_size(ledger.books.allocations[event if event >= 0 else ~event].size)
        now += size if event >= 0 else -size
        peak = max(peak, now)
    return peak


def _measured_peak(operation: Callable[[str], None]) -> int:
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    operation("cuda")
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
