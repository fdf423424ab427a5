"""The store of what probes measured of a card: a file for each card, driver and torch, which later plans use."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import platformdirs

from ..catalog.gpus import Gpu
from ..job import OwnGpu
from ..memory.budget import Context, context
from ..memory.kernel_facts import KernelFacts

SPREAD = 64 << 20
"""Bytes that the context of a job may lie from that of others on one card, as kernels are loaded when they are first
used: 45 jobs on an H100 held 742 to 808 MiB (docs/probe.md)."""


@dataclass(frozen=True)
class Facts:
    """A card as probes measured it. Bytes.

    ``card`` is a key of the catalogue, or a card's own name. ``context`` is what a process held outside the allocator
    in the last probe, ``lowest`` and ``highest`` over all of them. ``kernels`` is what its kernels were found to do
    otherwise than the dry run's sources say, ``unexplained`` are rows of name, planned and measured that no such fact
    accounts for.
    """

    card: str
    driver: str
    torch: str
    date: str
    context: int
    lowest: int
    highest: int
    kernels: KernelFacts = KernelFacts()
    unexplained: list[dict] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Where the figures come from, as a plan says it."""
        return f"measured by a probe of this card, {self.date}, driver {self.driver}, torch {self.torch}"


@lru_cache(maxsize=1)
def folder() -> Path:
    """The folder of the files, in the user's data folder."""
    return platformdirs.user_data_path("vramplan") / "cards"


def _path(card: str, driver: str, torch: str) -> Path:
    return folder() / (re.sub(r"[^\w.+-]+", "_", f"{card}-{driver}-{torch}") + ".json")


def is_known(card: str, driver: str, torch: str) -> bool:
    """Whether a probe has measured that card with that driver and torch."""
    return _read(_path(card, driver, torch)) is not None


def store(facts: Facts, calibrated: bool) -> Path:
    """Write the file of a card. The context's interval covers earlier probes of the same card, driver and torch too;
    their findings about kernels are kept if this probe was not ``calibrated``."""
    path = _path(facts.card, facts.driver, facts.torch)
    earlier = _read(path)
    if earlier is not None:
        facts = replace(facts, lowest=min(facts.lowest, earlier.lowest), highest=max(facts.highest, earlier.highest))
        if not calibrated:
            facts = replace(facts, kernels=earlier.kernels, unexplained=earlier.unexplained)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}.tmp")
    written.write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")
    written.replace(path)  # whole, and the folder's time tells of it
    return path


def _read(path: Path) -> Facts | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        attention, sizes = ([tuple(row) for row in rows] for rows in told["kernels"])
        return Facts(**{**told, "kernels": KernelFacts(tuple(attention), tuple(sizes))})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def known(card: str) -> Facts | None:
    """The facts of the last probe of ``card``; None where nobody probed it here."""
    time = last_stored()
    return None if time is None else _all_of(folder(), time).get(card)


def last_stored() -> int | None:
    """When facts of any card were stored last, in nanoseconds; None: there are none."""
    try:
        return os.stat(folder()).st_mtime_ns
    except OSError:
        return None


@lru_cache(maxsize=4)
def _all_of(place: Path, time: int) -> dict[str, Facts]:
    """The last facts of each card."""
    found = [facts for path in sorted(place.glob("*.json")) if (facts := _read(path)) is not None]
    return {facts.card: facts for facts in sorted(found, key=lambda facts: facts.date)}


def name_of(gpu: Gpu | OwnGpu) -> str:
    """The name of a card in the file names."""
    return gpu.key if isinstance(gpu, Gpu) else gpu.like or gpu.name


def context_of(gpu: Gpu | OwnGpu, capability: tuple[int, int] | None) -> Context:
    """Bytes that a process holds on a card outside the allocator: as a probe measured them here, else the default for
    the compute capability."""
    facts = known(name_of(gpu))
    if facts is None:
        return context(capability)
    return Context(facts.context, facts.lowest - SPREAD, facts.highest + SPREAD, facts.source)


def kernels_found(gpu: Gpu | OwnGpu) -> KernelFacts:
    """How this card's kernels were measured to differ from what the dry run states; empty without a probe of it."""
    facts = known(name_of(gpu))
    return KernelFacts() if facts is None else facts.kernels


def warnings_of(gpu: Gpu | OwnGpu) -> list[str]:
    """The warnings of a plan that uses a probe's measurements: which, and what it could not use."""
    facts = known(name_of(gpu))
    if facts is None:
        return []
    found = list(_words(facts.kernels))
    kernels = f"; its kernels are planned as that probe found them: {', '.join(found)}" if found else ""
    rows = (f"on this card {row['name']} was measured as {row['measured']}" for row in facts.unexplained)
    return [
        f"the bytes outside the allocator are {facts.source}{kernels}",
        *(f"{said}, and is planned as {row['planned']}" for said, row in zip(rows, facts.unexplained, strict=True)),
    ]


def _words(kernels: KernelFacts) -> Iterator[str]:
    cases = Counter((stated, chosen) for _, stated, chosen in kernels.attention)
    examples = {(stated, chosen): case for case, stated, chosen in reversed(kernels.attention)}
    for (stated, chosen), count in cases.items():
        where = f"for {examples[stated, chosen]}" + (f" and {count - 1} other kinds" if count > 1 else "")
        yield f"attention runs {chosen}, not {stated}, {where}"
    for operator, told, found in kernels.sizes:
        yield f"{operator} takes {found:,} bytes where its source says {told:,}"
