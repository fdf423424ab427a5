"""How a job is spread over cards: the options of each strategy, and where its code is.

A strategy that is planned has no ``refusal``. How to add one: ``docs/add-a-strategy.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True)
class Strategy:
    """One way to spread a job.

    ``plan`` names the class that plans it, relative to ``dryrun.parallel`` (None: nothing changes). ``options`` are the
    fields of a job that are its own. ``one_process``: one process drives all the cards, on one machine.
    ``communicators``: how many of NCCL's a rank makes. ``refusal`` says why it is not planned (None: it is), ``hint``
    what to do instead.
    """

    plan: str | None = None
    options: tuple[str, ...] = ()
    one_process: bool = False
    communicators: int = 0
    refusal: str | None = None
    hint: str = ""


_NOT_YET: Any = {"refusal": "it is not planned yet", "hint": "plan it with strategy ddp or fsdp2"}

STRATEGIES: dict[str, Strategy] = {
    "single": Strategy(one_process=True),
    "ddp": Strategy(".ddp:Ddp", options=("ddp",), communicators=1),
    "fsdp2": Strategy(".fsdp2:Fsdp2", options=("fsdp",), communicators=1),
    "zero1": Strategy(".zero:Zero", ("deepspeed",), communicators=2),
    "zero2": Strategy(".zero:Zero", ("deepspeed",), communicators=2),
    "zero3": Strategy(".zero:Zero", ("deepspeed",), communicators=2),
    "tensor-parallel": Strategy(".tensor_parallel:TensorParallel", communicators=1),
    "device-map": Strategy(".device_map:DeviceMap", ("device_map", "max_memory"), one_process=True),
}
"""By the name that a job gives it."""

if TYPE_CHECKING:
    StrategyName = str
else:
    StrategyName = Literal[tuple(STRATEGIES)]
