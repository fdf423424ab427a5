"""The memory that a job may use on a card: what PyTorch sees of it, less the CUDA context and what is reserved.

The card may be the catalogue's, one of the user's own, or the one in this machine. Prices are the user's, from a file:
none is kept here, for they change by the week.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

from ..catalog.gpus import MIB, Gpu, all_gpus, find_gpu
from ..errors import PlanError
from ..job import Job, OwnGpu
from ..memory.budget import Context, MemoryBudget, with_communicators
from ..registry.strategies import STRATEGIES
from .calibration import context_of

MEASURED_KERNELS = (9, 0)
"""The compute capability on which kernels and their workspaces were measured (H100 and H200)."""
DERIVED = 213 * MIB
"""How far readings of one and the same card lie apart (A100-SXM4-80GB: 81251 and 81038 MiB): what is not known of a
total that nobody read."""


def id_of(card: Gpu | OwnGpu) -> str:
    """What a card is called in an answer: the catalogue's key, or its own name."""
    return card.name if isinstance(card, OwnGpu) else card.key


HOST_MEMORY = 1 << 50
"""Bytes that a host is taken to have, where the job does not say."""


def usable(card: Gpu | OwnGpu) -> int:
    """Bytes of the card that PyTorch sees."""
    return card.memory_bytes if isinstance(card, OwnGpu) else card.total_memory


def known(card: Gpu | OwnGpu) -> Gpu | None:
    """The catalogue's card with the same chip; None: the job does not say which."""
    if isinstance(card, OwnGpu):
        return find_gpu(card.like) if card.like else None
    return card


def outside_of(card: Gpu | OwnGpu, job: Job | None = None) -> Context:
    """Bytes that a process holds on the card outside the allocator; ``job`` tells of how many ranks it is one."""
    chip = known(card)
    alone = context_of(card, chip.compute_capability if chip else None)
    if job is None:
        return alone
    return with_communicators(alone, job.gpu_count, STRATEGIES[job.strategy].communicators)


def with_card_memory(job: Job, card: Gpu | OwnGpu) -> Job:
    """A job whose ``device_map`` is found by the memory of the cards: what is free of them where it does not say, as
    accelerate asks the driver. Of a single card transformers leaves a tenth.

    Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/integrations/accelerate.py#L240
    ``get_balanced_memory``.
    """
    named = job.device_map or "auto"
    if job.strategy != "device-map" or job.max_memory is not None or not isinstance(named, str):
        return job
    free = usable(card) - outside_of(card, job).expected - job.reserve
    if job.gpu_count == 1 and named != "sequential":
        free = free * 9 // 10
    cards = {str(number): max(free, 0) for number in range(job.gpu_count)}
    return job.model_copy(update={"max_memory": cards | {"cpu": HOST_MEMORY}})


def budget_on(card: Gpu | OwnGpu, reserve: int, workspace: int, job: Job | None = None) -> MemoryBudget:
    """The bytes that the allocator may reserve on ``card`` when ``reserve`` bytes are left to others.

    ``workspace``: bytes of the plan that depend on kernels, not known of a card on which they were not measured.
    """
    chip = known(card)
    outside = outside_of(card, job)
    unknown, spare, reasons = outside.high - outside.expected, outside.expected - outside.low, [outside.source]
    if chip is None or chip.compute_capability != MEASURED_KERNELS:
        unknown, spare = unknown + workspace, spare + workspace
        reasons.append("its kernels' workspaces were not measured")
    if isinstance(card, Gpu) and not card.measured:
        unknown, spare = unknown + DERIVED, spare + DERIVED
        reasons.append("its memory is derived, not read")
    return MemoryBudget(usable(card) - outside.expected - reserve, unknown, spare, "context: " + "; ".join(reasons))


def every_card() -> list[Gpu]:
    """The catalogue's cards whose kernels are modelled, the smallest first."""
    return [card for card in all_gpus() if card.compute_capability is not None]


def local_card(name: str) -> tuple[OwnGpu, int]:
    """The card in this machine that ``local`` or ``local:1`` names, and the bytes of it that are in use.

    Read with NVML, as nvidia-smi reads it. Raises :class:`PlanError` where there is no driver or no such card.
    """
    import pynvml

    index = name.partition(":")[2] or "0"
    if not index.isdecimal():
        raise PlanError(f"{name!r} names no card of this machine", "write local, or local:1 for the second one", "gpu")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise PlanError(
            f"this machine has no NVIDIA driver to ask about its card: {error}",
            "name a card of the catalogue (vramplan gpus), or give its memory: --gpu 24GiB",
            "gpu",
        ) from None
    try:
        count = pynvml.nvmlDeviceGetCount()
        if int(index) >= count:
            raise PlanError(f"this machine has {count} cards, not a {name!r}", "the first one is local:0", "gpu")
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(index))
        model = pynvml.nvmlDeviceGetName(handle)
        capability = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError as error:
        raise PlanError(f"the driver does not tell this machine's card: {error}", "name its model", "gpu") from None
    finally:
        pynvml.nvmlShutdown()
    return OwnGpu(
        name=f"this machine's {model}", memory_bytes=memory.total - memory.reserved, like=like(model, capability)
    ), max(memory.used - memory.reserved, 0)


def like(model: str, capability: tuple[int, int]) -> str | None:
    """The catalogue's card of this name, else one with the same compute capability."""
    try:
        return find_gpu(model).key
    except PlanError:
        same = [card.key for card in all_gpus() if card.compute_capability == tuple(capability)]
        return same[0] if same else None


def read_prices(path: str) -> dict[str, float]:
    """Prices by the catalogue's key from a file of JSON (``{"rtx-4090": 0.44}``) or lines of ``card,price``.

    Their unit is the file's own. Raises :class:`PlanError`, for an unknown card one that names the nearest.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PlanError(f"the prices in {path} cannot be read: {error}", "name a file of lines card,price") from None
    try:
        given = json.loads(text)
    except ValueError:
        rows = [row for row in csv.reader(io.StringIO(text)) if row and not row[0].startswith("#")]
        given = {row[0]: row[-1].strip() for row in rows if re.search(r"\d", row[-1])}
    return check_prices(given, path)


def check_prices(given: object, where: str) -> dict[str, float]:
    """``given`` by the catalogue's keys, as numbers. Raises :class:`PlanError`."""
    if not isinstance(given, dict) or not given:
        raise PlanError(f"{where} holds no prices", 'write lines of card,price or {"rtx-4090": 0.44}', "prices")
    out = {}
    for name, price in given.items():
        try:
            value = float(price)
        except (TypeError, ValueError):
            value = -1.0
        if not 0 <= value < float("inf"):
            raise PlanError(f"the price of {name} is {price!r}", "write a number", "prices")
        out[find_gpu(str(name)).key] = value
    return out
