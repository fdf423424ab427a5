"""Cards, and the memory of them that PyTorch can really use.

`total_memory` is what `torch.cuda.get_device_properties` says on Linux, in bytes. It is less than
nvidia-smi shows, which is less than the box says, and it shrank over the years as drivers grew: the
table has the lowest value seen in public pastes. Where only nvidia-smi's total is known, the value is
that total less the gap of a measured card of the same architecture and class (GeForce, GDDR
workstation and server, HBM): the one with the same total, else the one with the largest gap, which
grows with the memory on a card larger than that one. Such rows have `measured=False`. On Windows
torch sees the whole of nvidia-smi's total.

Multiprocessors, bandwidths and compute capabilities are from the vendors' datasheets and TechPowerUp.

A part of a card is named after it: `a100-80gb:3g.40gb` is a MIG slice, `a6000:ecc` the card with ECC on.
"""

import difflib
import re
from dataclasses import dataclass, replace

from ..errors import PlanError

MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card, or one of the devices of a card that has several."""

    name: str
    key: str
    aliases: tuple[str, ...]
    marketed_gb: int
    total_memory: int
    measured: bool
    smi_memory: int | None
    arch: str
    compute_capability: tuple[int, int] | None
    sm_count: int | None
    bandwidth_gbs: float
    bf16: bool
    source: str


@dataclass(frozen=True, slots=True)
class Like:
    """An unmeasured total: that of nvidia-smi less the gap of a measured card."""

    key: str
    base: str = "nvidia-smi total"


PASTE = "lowest torch total_memory in public Linux pastes"
OOM = "total in public out-of-memory messages (±5 MiB)"
WINDOWS = "Windows or WSL total, as nvidia-smi's"

# name; key; aliases; GB on the box; torch MiB; nvidia-smi MiB; architecture and compute capability;
# multiprocessors; GB/s; source of the torch total
# fmt: off
_ROWS = (
    ("GeForce GTX 1080 Ti", "gtx-1080-ti", "1080-ti", 11, 11178, 11264, "Pascal 6.1", 28, 484.4),
    ("GeForce GTX 1080", "gtx-1080", "1080", 8, 8116, None, "Pascal 6.1", 20, 320.3),
    ("GeForce RTX 2080 Ti", "rtx-2080-ti", "2080-ti", 11, 11009, 11264, "Turing 7.5", 68, 616.0),
    ("GeForce RTX 2060", "rtx-2060", "2060", 6, Like("rtx-2080-ti", WINDOWS), 6144, "Turing 7.5", 30, 336.0),
    ("TITAN RTX", "titan-rtx", "", 24, 24212, 24576, "Turing 7.5", 72, 672.0),
    ("GeForce RTX 3060 12GB", "rtx-3060", "3060 3060-12gb", 12, 11931, 12288, "Ampere 8.6", 28, 360.0),
    ("GeForce RTX 3060 Ti", "rtx-3060-ti", "3060-ti", 8, Like("rtx-3060", WINDOWS), 8192, "Ampere 8.6", 38, 448.0),
    ("GeForce RTX 3080 10GB", "rtx-3080", "3080 3080-10gb", 10, Like("rtx-3060"), 10240, "Ampere 8.6", 68, 760.3),
    ("GeForce RTX 3090", "rtx-3090", "3090", 24, 24265, 24576, "Ampere 8.6", 82, 936.2),
    ("GeForce RTX 3090 Ti", "rtx-3090-ti", "3090-ti", 24, 24214, 24564, "Ampere 8.6", 84, 1010.0),
    ("GeForce RTX 4060 8GB", "rtx-4060", "4060 4060-8gb", 8, Like("rtx-4060-ti"), 8188, "Ada 8.9", 24, 272.0),
    ("GeForce RTX 4060 Ti 8GB", "rtx-4060-ti", "4060-ti 4060-ti-8gb", 8, 7806, 8188, "Ada 8.9", 34, 288.0),
    ("GeForce RTX 4060 Ti 16GB", "rtx-4060-ti-16gb", "4060-ti-16gb", 16,
     Like("rtx-4070-ti-super"), 16380, "Ada 8.9", 34, 288.0),
    ("GeForce RTX 4070", "rtx-4070", "4070", 12, Like("rtx-4070-ti-super"), 12282, "Ada 8.9", 46, 504.2),
    ("GeForce RTX 4070 Ti", "rtx-4070-ti", "4070-ti", 12,
     Like("rtx-4070-ti-super", WINDOWS), 12282, "Ada 8.9", 60, 504.2),
    ("GeForce RTX 4070 Ti SUPER", "rtx-4070-ti-super", "4070-ti-super", 16, 15934, 16376, "Ada 8.9", 66, 672.3),
    ("GeForce RTX 4080", "rtx-4080", "4080", 16, Like("rtx-4070-ti-super"), 16376, "Ada 8.9", 76, 716.8),
    ("GeForce RTX 4090", "rtx-4090", "4090", 24, 24217, 24564, "Ada 8.9", 128, 1010.0),
    ("GeForce RTX 4090 Laptop", "rtx-4090-laptop", "4090-laptop", 16,
     Like("rtx-4070-ti-super"), 16376, "Ada 8.9", 76, 576.0),
    ("GeForce RTX 4060 Laptop", "rtx-4060-laptop", "4060-laptop", 8, 7806, 8188, "Ada 8.9", 24, 256.0),
    ("GeForce RTX 5060 Ti 16GB", "rtx-5060-ti-16gb", "5060-ti-16gb", 16, 15841, None, "Blackwell 12.0", 36, 448.0),
    ("GeForce RTX 5070", "rtx-5070", "5070", 12, Like("rtx-5090", WINDOWS), 12227, "Blackwell 12.0", 48, 672.0),
    ("GeForce RTX 5070 Ti", "rtx-5070-ti", "5070-ti", 16, Like("rtx-5080"), 16303, "Blackwell 12.0", 70, 896.0),
    ("GeForce RTX 5080", "rtx-5080", "5080", 16, 15840, 16303, "Blackwell 12.0", 84, 960.0),
    ("GeForce RTX 5090", "rtx-5090", "5090", 32, 32113, 32607, "Blackwell 12.0", 170, 1790.0, OOM),

    # GDDR cards of workstations and servers. With ECC on, 15/16 of the memory is left: so the server cards are sold.
    # The totals of the RTX cards are with ECC off.
    ("RTX A4000", "a4000", "", 16, Like("a40"), 16376, "Ampere 8.6", 48, 448.0),
    ("RTX A5000", "a5000", "", 24, 24114, None, "Ampere 8.6", 64, 768.0),
    ("RTX A6000", "a6000", "a6000-48gb", 48, 48676, 49140, "Ampere 8.6", 84, 768.0),
    ("RTX 4000 Ada", "rtx-4000-ada", "4000-ada rtx-4000-sff-ada 4000-sff-ada", 20,
     Like("l40s"), 20475, "Ada 8.9", 48, 360.0),
    ("RTX 6000 Ada", "rtx-6000-ada", "6000-ada a6000-ada", 48, 48539, 49140, "Ada 8.9", 142, 960.0),
    ("RTX PRO 6000 Blackwell", "rtx-pro-6000", "pro-6000 "
     "rtx-pro-6000-blackwell-server-edition rtx-pro-6000-blackwell-workstation-edition "
     "rtx-pro-6000-blackwell-max-q-workstation-edition", 96, 97250, 97887, "Blackwell 12.0", 188, 1792.0),
    ("Tesla T4", "t4", "", 16, 14912, 15360, "Turing 7.5", 40, 320.0),
    ("A2 / A16", "a2", "a16", 16, Like("a40", "no reading: 15/16 of 16384 MiB"), None, "Ampere 8.6", 10, 200.1),
    # Not like the A10G of the same total: out-of-memory messages tell of 21.96 GiB on one of the 23-GB cards.
    ("A10", "a10", "a10-24gb", 24, Like("a40"), 23028, "Ampere 8.6", 72, 600.2),
    ("A10G", "a10g", "a10g-24gb", 24, 22587, 23028, "Ampere 8.6", 80, 600.2),
    ("A40", "a40", "a40-48gb", 48, 45416, 46068, "Ampere 8.6", 84, 695.8),
    ("L4", "l4", "l4-24gb", 24, 22563, 23034, "Ada 8.9", 58, 300.1),
    ("L20", "l20", "l20-48gb", 48, Like("l40s"), 46068, "Ada 8.9", 92, 864.0),
    ("L40S", "l40s", "l40s-48gb", 48, 45455, 46068, "Ada 8.9", 142, 864.0, OOM),

    # HBM
    ("Tesla P100 PCIe 16GB", "p100", "p100-16gb p100-pcie", 16, 16281, 16280, "Pascal 6.0", 56, 732.2),
    ("Tesla V100-SXM2-16GB", "v100-16gb", "v100", 16, 16160, None, "Volta 7.0", 80, 897.0),
    ("Tesla V100-SXM2-32GB", "v100-32gb", "", 32, 32501, 32768, "Volta 7.0", 80, 898.0),
    ("A30", "a30", "a30-24gb", 24, 24164, 24576, "Ampere 8.0", 56, 933.1),
    ("A100-SXM4-40GB", "a100-40gb", "a100-sxm-40gb a100-40gb-sxm", 40, 40441, 40960, "Ampere 8.0", 108, 1555.0),
    ("A100-PCIE-40GB", "a100-pcie-40gb", "a100-40gb-pcie", 40, 40326, 40960, "Ampere 8.0", 108, 1555.0),
    ("A100-SXM4-80GB", "a100-80gb", "a100 a100-sxm-80gb a100-80gb-sxm", 80, 81038, 81920, "Ampere 8.0", 108, 2039.0),
    ("A100 80GB PCIe", "a100-80gb-pcie", "a100-pcie-80gb", 80, 81154, 81920, "Ampere 8.0", 108, 1935.0),
    ("A800 80GB PCIe", "a800-80gb-pcie", "a800 a800-pcie", 80, Like("a100-80gb"), 81920, "Ampere 8.0", 108, 1940.0),
    ("H100 80GB HBM3", "h100", "h100-80gb h100-sxm h100-sxm5 h100-80gb-sxm", 80,
     81082, 81559, "Hopper 9.0", 132, 3350.0),
    ("H100 PCIe 80GB", "h100-pcie", "h100-80gb-pcie", 80, 81008, None, "Hopper 9.0", 114, 2000.0),
    ("H100 NVL 94GB", "h100-nvl", "h100-94gb", 94,
     94849, 95830, "Hopper 9.0", 132, 3940.0, "lowest total in public run records (torch 2.5)"),
    ("H800", "h800", "h800-sxm h800-80gb", 80, Like("h100"), 81559, "Hopper 9.0", 132, 3360.0),
    ("H20 96GB", "h20", "", 96, 97285, 97871, "Hopper 9.0", 78, 4000.0),
    ("H200 141GB", "h200", "h200-sxm", 141, 143073, 143771, "Hopper 9.0", 132, 4800.0, OOM),
    ("GH200 96GB", "gh200", "gh200-480gb gh200-120gb", 96, 96768, 97871, "Hopper 9.0", 132, 4000.0, OOM),
    ("B200", "b200", "b200-192gb b200-180gb b200-sxm", 192, 182631, 183359, "Blackwell 10.0", 148, 7700.0),
    ("GB200", "gb200", "gb200-nvl72", 192, Like("b200"), 189471, "Blackwell 10.0", 152, 8000.0),
    ("B300 SXM6 AC", "b300", "b300-sxm", 288, Like("b200"), 275040, "Blackwell Ultra 10.3", 148, 7750.0),
    ("GB300", "gb300", "gb300-nvl72", 288, Like("b200"), 284208, "Blackwell Ultra 10.3", None, 8000.0),

    # AMD
    ("AMD MI250X, one of its two dies", "mi250x", "mi250", 64, 65520, None, "CDNA2 gfx90a", 110, 1640.0),
    ("AMD MI300X", "mi300x", "mi300x-192gb", 192, 196291, 196592, "CDNA3 gfx942", 304, 5300.0, OOM),
    ("AMD Radeon RX 7900 XTX", "rx-7900-xtx", "7900-xtx", 24, 24560, 24560, "RDNA3 gfx1100", 48, 960.0),
)
# fmt: on


def _row(
    name: str,
    key: str,
    aliases: str,
    marketed_gb: int,
    torch: int | Like,
    smi: int | None,
    arch: str,
    multiprocessors: int | None,
    bandwidth: float,
    source: str = PASTE,
) -> Gpu:
    if isinstance(torch, Like):
        source = f"{torch.base}, less the gap of {torch.key}"
        total = _derive(torch.key, smi or marketed_gb * 1024 * 15 // 16)
    else:
        total = torch
    arch, version = arch.rsplit(" ", 1)
    capability = None if version.startswith("gfx") else tuple(map(int, version.split(".")))
    return Gpu(
        name=name,
        key=key,
        aliases=tuple(aliases.split()),
        marketed_gb=marketed_gb,
        total_memory=total * MIB,
        measured=isinstance(torch, int),
        smi_memory=smi and smi * MIB,
        arch=arch if capability else f"{arch} {version}",
        compute_capability=capability,
        sm_count=multiprocessors,
        bandwidth_gbs=bandwidth,
        bf16=capability is None or capability >= (8, 0),
        source=source,
    )


def _derive(like: str, smi: int) -> int:
    """Return the torch total in MiB that the gap of a measured card leaves of nvidia-smi's."""
    torch, of = next((row[4], row[5]) for row in _ROWS if row[1] == like)
    gap = of - torch
    return smi - max(gap, -(-gap * smi // of))


_MAKERS = {"nvidia", "geforce", "tesla", "quadro", "amd", "radeon", "instinct", "generation", "gpu"}


def _plain(name: str) -> str:
    """Return a name without case, punctuation and maker: what two spellings of one card share."""
    return "".join(word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in _MAKERS)


_GPUS = tuple(sorted((_row(*row) for row in _ROWS), key=lambda gpu: gpu.total_memory))
_BY_NAME = {_plain(name): gpu for gpu in _GPUS for name in (gpu.key, gpu.name, *gpu.aliases)}


def all_gpus() -> tuple[Gpu, ...]:
    """Return every card, the smallest memory first."""
    return _GPUS


def find_gpu(name: str) -> Gpu:
    """Return the card of that key, alias or full name, however it is spelled; after a colon, a part of it.

    Raises PlanError, naming the nearest, where there is none.
    """
    whole, colon, part = name.partition(":")
    plain = _plain(whole)
    if plain in _BY_NAME:
        gpu = _BY_NAME[plain]
        return _part(gpu, part.strip().lower()) if colon else gpu
    near = dict.fromkeys(_BY_NAME[n].key for n in difflib.get_close_matches(plain, _BY_NAME, n=3, cutoff=0.0))
    raise PlanError(
        f"The catalogue has no GPU called {name!r}.",
        f"The nearest names are {', '.join(near)}. Another card can be given by its memory: "
        '{"name": "…", "memory_bytes": …}.',
        field="gpu",
    )


def parts_of(gpu: Gpu) -> list[str]:
    """What may follow the card's key after a colon."""
    return [*_profiles(gpu), *(["ecc"] if gpu.key in ECC_OFF else [])]


MIG = {(8, 0): 7, (9, 0): 7, (10, 0): 7, (10, 3): 7}
"""Compute slices of the architectures that can be partitioned (NVIDIA's MIG user guide, "Supported MIG Profiles"). The
A30 has four."""
MIG_SHARE = 9728 / 10240
"""What torch sees of a slice's share of the memory: of an A100 80GB's 1g.10gb it is 9728 MiB, of an A100 40GB's 9856,
in public pastes. The lower."""
ECC_GAP = "a40"
"""With ECC on, 15/16 of the memory is left; the A40 is sold so and is one of these cards' chips."""
ECC_OFF = ("a4000", "a5000", "a6000", "rtx-4000-ada", "rtx-6000-ada")


def _part(gpu: Gpu, part: str) -> Gpu:
    """The card as `part` names it: a MIG profile, or `ecc`."""
    if part == "ecc":
        if gpu.key not in ECC_OFF:
            raise PlanError(
                f"{gpu.name} is not one whose ECC takes memory when it is switched on",
                f"its total is as it is sold: name {gpu.key}. Those are {', '.join(ECC_OFF)}",
                "gpu",
            )
        smi = (gpu.smi_memory or gpu.marketed_gb * 1024 * MIB) // MIB * 15 // 16
        return replace(
            gpu,
            name=f"{gpu.name} with ECC",
            key=f"{gpu.key}:ecc",
            aliases=(),
            total_memory=_derive(ECC_GAP, smi) * MIB,
            smi_memory=smi * MIB,
            measured=False,
            source=f"15/16 of nvidia-smi's total, less the gap of {ECC_GAP}",
        )
    profiles = _profiles(gpu)
    if part not in profiles:
        near = difflib.get_close_matches(part, profiles, 1, 0.0)
        raise PlanError(
            f"{gpu.name} has no part {part!r}",
            f"its MIG profiles are like {near[0]} ({', '.join(profiles)})" if near else "it cannot be partitioned",
            "gpu",
        )
    compute, eighths = profiles[part]
    slices = 4 if gpu.key == "a30" else MIG[gpu.compute_capability]
    total = gpu.smi_memory or gpu.marketed_gb * 1024 * MIB
    return replace(
        gpu,
        name=f"{gpu.name} MIG {part}",
        key=f"{gpu.key}:{part}",
        aliases=(),
        total_memory=int(total * eighths // 8 * MIG_SHARE) // MIB * MIB,
        smi_memory=total * eighths // 8,
        measured=False,
        sm_count=gpu.sm_count and gpu.sm_count * compute // slices,
        bandwidth_gbs=gpu.bandwidth_gbs * eighths / 8,
        source=f"{eighths}/8 of nvidia-smi's total, less what the A100's slices lack",
    )


def _profiles(gpu: Gpu) -> dict[str, tuple[int, int]]:
    """MIG profiles by name: compute slices, and eighths of the memory. A name has the gigabytes that are sold."""
    if gpu.compute_capability not in MIG:
        return {}
    shares = ((1, 2), (2, 4), (4, 8)) if gpu.key == "a30" else ((1, 1), (1, 2), (2, 2), (3, 4), (4, 4), (7, 8))
    names = {
        "a30": (6, 12, 24),
        40: (5, 10, 10, 20, 20, 40),
        80: (10, 20, 20, 40, 40, 80),
        94: (12, 24, 24, 47, 47, 94),
        96: (12, 24, 24, 48, 48, 96),
        141: (18, 35, 35, 71, 71, 141),
        192: (23, 45, 45, 90, 90, 180),
    }
    sizes = names.get(gpu.key, names.get(gpu.marketed_gb, ()))
    return {f"{share[0]}g.{size}gb": share for share, size in zip(shares, sizes, strict=False)}
