"""The optimisers that a job can name, and how each is made.

Names are those of transformers' ``TrainingArguments.optim`` where it has one; then the class and its arguments are
those that transformers passes:
https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/trainer_optimizer.py#L195 ``_get_adafactor``.
``tests/test_registry.py`` holds both against the installed function. How to add one: ``docs/add-an-optimizer.md``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from . import load

LEARNING_RATE = 1e-4
"""The rate that every optimiser is made with. No allocation depends on it."""


@dataclass(frozen=True)
class Optimizer:
    """One optimiser: its class as ``module:name``, and the arguments that it is made with.

    ``named_by_transformers``: ``TrainingArguments.optim`` knows the name; the others are handed to a Trainer ready
    made. ``fused``, ``eight_bit`` and ``paged`` name the optimisers with the same update in one kernel, with its state
    in 8 bits, and with that state paged to the host.
    """

    constructor: str
    arguments: dict[str, Any] = field(default_factory=dict)
    named_by_transformers: bool = True
    fused: str | None = None
    eight_bit: str | None = None
    paged: str | None = None

    @property
    def state_bits(self) -> int:
        """Bits of one number of its state."""
        return int(self.arguments.get("optim_bits", 32))

    def make(self, parameters: Sequence[Any], keep_32_bits: Iterable[Any] = ()) -> Any:
        """A ``torch.optim.Optimizer`` over ``parameters``, tensors or groups of them.

        ``keep_32_bits`` are parameters whose state an 8-bit optimiser keeps in float32.
        """
        optimizer = load(self.constructor)(parameters, lr=LEARNING_RATE, **self.arguments)
        if self.state_bits == 8:
            _override_state_bits(optimizer, keep_32_bits)
        return optimizer


def _override_state_bits(optimizer: Any, keep_32_bits: Iterable[Any]) -> None:
    """Make an 8-bit optimiser of bitsandbytes keep the state of these parameters in 32 bits.

    transformers does so for embeddings:
    https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/trainer.py#L1289 ``GlobalOptimManager``.
    """
    for parameter in keep_32_bits:
        optimizer.mng.pid2config[id(parameter)] = {"optim_bits": 32}


def _bitsandbytes(kind: str, bits: int, is_paged: bool, **others: Any) -> Optimizer:
    """An optimiser of bitsandbytes, made as transformers makes it."""
    return Optimizer(f"bitsandbytes.optim:{kind}", {"optim_bits": bits, "is_paged": is_paged}, **others)


_ADAMW: dict[str, Any] = {"eight_bit": "adamw_8bit", "paged": "paged_adamw_8bit"}
_BY_HAND: dict[str, Any] = {"named_by_transformers": False}

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch": Optimizer("torch.optim:AdamW", fused="adamw_torch_fused", **_ADAMW),
    "adamw_torch_fused": Optimizer("torch.optim:AdamW", {"fused": True}, **_ADAMW),
    "adamw_torch_forloop": Optimizer(
        "torch.optim:AdamW", {"foreach": False}, fused="adamw_torch_fused", **_ADAMW, **_BY_HAND
    ),
    "adamw_8bit": _bitsandbytes("AdamW", 8, False, paged="paged_adamw_8bit"),
    "paged_adamw_8bit": _bitsandbytes("AdamW", 8, True),
    "paged_adamw_32bit": _bitsandbytes("AdamW", 32, True),
    "adafactor": Optimizer("transformers:Adafactor", {"scale_parameter": False, "relative_step": False}),
    "sgd": Optimizer("torch.optim:SGD"),
    "sgd_momentum": Optimizer("torch.optim:SGD", {"momentum": 0.9}, **_BY_HAND),
    "lion_8bit": _bitsandbytes("Lion", 8, False),
    "paged_lion_8bit": _bitsandbytes("Lion", 8, True),
    "lion_32bit": _bitsandbytes("Lion", 32, False),
    "paged_lion_32bit": _bitsandbytes("Lion", 32, True),
}
"""By the name that a job gives it, in the order in which the form shows them."""

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
