"""The card, before anything runs on it: is there one, can this torch use it, what is free. Through NVML alone."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass

import pynvml

from ..errors import PlanError


@dataclass(frozen=True)
class CardState:
    """A card as NVML sees it now. Bytes; ``others`` are the processes that hold memory there."""

    name: str
    capability: tuple[int, int]
    driver: str
    total: int
    free: int
    others: int
    exclusive: bool


def look() -> CardState:
    """The card that a probe would use. Raises :class:`PlanError` where there is none, or torch cannot use it."""
    import torch

    _check_torch(torch.__version__, torch.version.cuda, torch.version.hip)
    with _nvml():
        _check_driver(pynvml.nvmlSystemGetCudaDriverVersion_v2(), torch.version.cuda)
        handle = _handle()
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        mode = pynvml.nvmlDeviceGetComputeMode(handle)
        return CardState(
            _text(pynvml.nvmlDeviceGetName(handle)),
            tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            _text(pynvml.nvmlSystemGetDriverVersion()),
            memory.total,
            memory.free,
            len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
            mode == pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS,
        )


def _check_torch(version: str, cuda: str | None, hip: str | None) -> None:
    if hip is not None:
        raise PlanError(f"torch {version} is a ROCm build, whose kernels are not modelled", "probe on an NVIDIA card")
    if cuda is None:
        raise PlanError(
            f"torch {version} is a CPU build: it cannot use a GPU",
            "install torch's CUDA build (pytorch.org/get-started) in this environment",
        )


def _check_driver(supports: int, built_for: str) -> None:
    """A driver serves every CUDA version of its own major number (CUDA's minor version compatibility)."""
    if supports // 1000 < int(built_for.partition(".")[0]):
        raise PlanError(
            f"the NVIDIA driver is too old: it serves CUDA {supports // 1000}.{supports % 1000 // 10}, "
            f"torch was built for {built_for}",
            "update the driver, or install a torch built for an older CUDA",
        )


@contextmanager
def _nvml():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise PlanError(
            f"no NVIDIA driver answers here ({str(error).lower()})", "run the probe on a machine with an NVIDIA GPU"
        ) from None
    try:
        yield
    except pynvml.NVMLError as error:
        raise PlanError(f"the NVIDIA driver refuses: {str(error).lower()}", "see what nvidia-smi says") from None
    finally:
        pynvml.nvmlShutdown()


def _handle():
    """The first device that CUDA would show to this process (``CUDA_VISIBLE_DEVICES``: numbers or UUIDs)."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = pynvml.nvmlDeviceGetCount()
    first = "0" if wanted is None else wanted.split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return pynvml.nvmlDeviceGetHandleByUUID(first)
    if not first.isdigit() or int(first) >= count:
        hidden = "" if wanted is None else f" (CUDA_VISIBLE_DEVICES is {wanted!r})"
        raise PlanError(f"no NVIDIA GPU is visible here{hidden}", "run the probe on a machine with an NVIDIA GPU")
    return pynvml.nvmlDeviceGetHandleByIndex(int(first))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
