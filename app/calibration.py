"""What probes found out about a card: kept for this user, per card, driver and stack, and used by later plans."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import platformdirs

from app.catalog.gpus import Gpu
from app.job import OwnGpu
from app.memory.overheads import Context, context

SPREAD = 64 << 20
"""Bytes that the context of a job may lie from that of others on one card, as kernels are loaded when they are first
used: 45 jobs on an H100 held 742 to 808 MiB (docs/probe.md)."""


@dataclass(frozen=True)
class Facts:
    """A card as probes measured it. Bytes.

    ``card`` is a key of the catalogue, or a card's own name. ``context`` is what a process held outside the allocator
    in the last probe, ``lowest`` and ``highest`` over all of them. ``kernels`` are rows of name, planned and measured:
    which attention kernel runs, the bytes of workspaces and of kernels' temporaries.
    """

    card: str
    driver: str
    torch: str
    date: str
    context: int
    lowest: int
    highest: int
    kernels: list[dict] = field(default_factory=list)

    @property
    def source(self) -> str:
        return f"measured by a probe of this card, {self.date}, driver {self.driver}, torch {self.torch}"

    @property
    def unlike_planned(self) -> list[dict]:
        return [row for row in self.kernels if row["planned"] != row["measured"]]


def folder() -> Path:
    """Where facts are kept: the user's data folder, as each system has it."""
    return platformdirs.user_data_path("vramplan") / "cards"


def store(facts: Facts) -> Path:
    """Keep ``facts``; the contexts of earlier probes of that card, driver and torch widen the interval."""
    path = folder() / (re.sub(r"[^\w.+-]+", "_", f"{facts.card}-{facts.driver}-{facts.torch}") + ".json")
    earlier = _read(path)
    if earlier is not None:
        facts = Facts(
            **{
                **asdict(facts),
                "lowest": min(facts.lowest, earlier.lowest),
                "highest": max(facts.highest, earlier.highest),
                "kernels": facts.kernels or earlier.kernels,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")
    return path


def _read(path: Path) -> Facts | None:
    try:
        return Facts(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def known(card: str) -> Facts | None:
    """The facts of the last probe of ``card``; None where nobody probed it here."""
    found = [facts for path in folder().glob("*.json") if (facts := _read(path)) is not None and facts.card == card]
    return max(found, key=lambda facts: facts.date, default=None)


def name_of(gpu: Gpu | OwnGpu) -> str:
    """What facts of this card are kept under."""
    return gpu.key if isinstance(gpu, Gpu) else gpu.like or gpu.name


def context_of(gpu: Gpu | OwnGpu, capability: tuple[int, int] | None) -> Context:
    """What a process holds on a card of this compute capability outside the allocator: as it was probed here, else as
    it is known."""
    facts = known(name_of(gpu))
    if facts is None:
        return context(capability)
    return Context(facts.context, facts.lowest - SPREAD, facts.highest + SPREAD, facts.source)


def warnings_of(gpu: Gpu | OwnGpu) -> list[str]:
    """What a plan says of the facts that it uses, and of kernels that were measured to be other than planned."""
    facts = known(name_of(gpu))
    if facts is None:
        return []
    out = [f"the bytes outside the allocator are {facts.source}"]
    for row in facts.unlike_planned:
        out.append(f"on this card {row['name']} was measured as {row['measured']}, and is planned as {row['planned']}")
    return out
