"""The optimisers that a job can name, and how each is made.

Names are those of transformers' ``TrainingArguments.optim`` where it has one; then the class and its arguments are
those that transformers passes:
https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/trainer_optimizer.py#L195 ``_get_adafactor``.
``tests/test_registry.py`` holds both against the installed function. How to add one: ``docs/add-an-optimizer.md``.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ..errors import PlanError
from . import load

LEARNING_RATE = 1e-4
"""The rate that every optimiser is made with. No allocation depends on it."""


@dataclass(frozen=True)
class Optimizer:
    """One optimiser: its class as ``module:name``, and the arguments that it is made with.

    ``constructor`` is None where transformers' own function makes it from the model: then ``package`` is the name of
    the package that has to be installed. ``named_by_transformers``: ``TrainingArguments.optim`` knows the name; the
    others are handed to a Trainer: ready made (``handed_over``), or as a class. ``in_backward``: it works within the
    backward pass, which only a Trainer arranges. ``on_triton``: on a card its kernels are Triton's. ``fused``,
    ``eight_bit`` and ``paged`` name the optimisers with the same update in one kernel, with its state in 8 bits, and
    with that state paged to the host.
    """

    constructor: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    named_by_transformers: bool = True
    handed_over: bool = False
    package: str | None = None
    in_backward: bool = False
    on_triton: bool = False
    fused: str | None = None
    eight_bit: str | None = None
    paged: str | None = None

    def make(self, parameters: Sequence[Any]) -> Any:
        """A ``torch.optim.Optimizer`` over ``parameters``, tensors or groups of them."""
        assert self.constructor is not None, "transformers makes it"
        return load(self.constructor)(parameters, lr=LEARNING_RATE, **self.arguments)


def _bitsandbytes(kind: str, bits: int, is_paged: bool, **others: Any) -> Optimizer:
    """An optimiser of bitsandbytes, made as transformers makes it."""
    return Optimizer(f"bitsandbytes.optim:{kind}", {"optim_bits": bits, "is_paged": is_paged}, **others)


_ADAMW: dict[str, Any] = {"eight_bit": "adamw_8bit", "paged": "paged_adamw_8bit"}
_BY_HAND: dict[str, Any] = {"named_by_transformers": False, "handed_over": True}

_GALORE = ("adamw", "adamw_8bit", "adafactor")

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
    "adagrad": Optimizer("torch.optim:Adagrad"),
    "rmsprop": Optimizer("torch.optim:RMSprop"),
    "ademamix": _bitsandbytes("AdEMAMix", 32, False),
    "ademamix_8bit": _bitsandbytes("AdEMAMix", 8, False),
    "paged_ademamix_32bit": _bitsandbytes("AdEMAMix", 32, True),
    "paged_ademamix_8bit": _bitsandbytes("AdEMAMix", 8, True),
    "adamw_bnb_8bit": _bitsandbytes("AdamW", 8, False, paged="paged_adamw_8bit"),
    "rmsprop_bnb": Optimizer("bitsandbytes.optim:RMSprop", {"optim_bits": 32}),
    "rmsprop_bnb_8bit": Optimizer("bitsandbytes.optim:RMSprop", {"optim_bits": 8}),
    "rmsprop_bnb_32bit": Optimizer("bitsandbytes.optim:RMSprop", {"optim_bits": 32}),
    **{f"galore_{name}": Optimizer(package="galore-torch") for name in _GALORE},
    **{f"galore_{name}_layerwise": Optimizer(package="galore-torch", in_backward=True) for name in _GALORE},
    "apollo_adamw": Optimizer(package="apollo-torch"),
    "apollo_adamw_layerwise": Optimizer(package="apollo-torch", in_backward=True),
    "lomo": Optimizer(package="lomo-optim", in_backward=True),
    "adalomo": Optimizer(package="lomo-optim", in_backward=True),
    "grokadamw": Optimizer(package="grokadamw"),
    "schedule_free_radam": Optimizer(package="schedulefree"),
    "schedule_free_adamw": Optimizer(package="schedulefree"),
    "schedule_free_sgd": Optimizer(package="schedulefree"),
    "stable_adamw": Optimizer(package="torch-optimi", on_triton=True),
    "adamw_torch_4bit": Optimizer(package="torchao"),
    "adamw_torch_8bit": Optimizer(package="torchao"),
}
"""By the name that a job gives it, in the order in which the form shows them.

Left out are those that transformers makes for TPUs and NPUs, and the one of torchdistx, which is no longer maintained.
"""

TORCH = "torch.optim."
TORCH_CLASSES = (
    "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax LBFGS Muon NAdam RAdam RMSprop Rprop SGD SparseAdam".split()
)
"""The optimisers of PyTorch, which a job names as ``torch.optim.NAME``."""
JOIN = "+"
"""Joins the names of two optimisers of a plain loop: the first one trains the matrices of the layers, the second one
all else, as Muon's users do."""


def optimizer_of(name: str) -> Optimizer:
    """The row of one optimiser's name. Raises :class:`ValueError` for an unknown name."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if name.startswith(TORCH) and name.removeprefix(TORCH) in TORCH_CLASSES:
        return Optimizer(f"torch.optim:{name.removeprefix(TORCH)}", named_by_transformers=False)
    near = difflib.get_close_matches(name, [*OPTIMIZERS, *(TORCH + name for name in TORCH_CLASSES)], 1)
    raise ValueError(f"unknown optimizer {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))


def _checked(name: str) -> str:
    parts = name.split(JOIN)
    for part in parts:
        optimizer_of(part)
    if len(parts) > 2:
        raise ValueError("two optimizers are joined at most")
    return name


if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)] | Annotated[str, Field(max_length=100), AfterValidator(_checked)]


def optimizers_for(name: str, model: Any) -> list[Any]:
    """The optimisers of a plain loop over all of ``model`` that is trained. Raises :class:`PlanError`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if JOIN not in name:
        return [_made(name, trained, model)]
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    is_matrix = {id(p): p.dim() == 2 and id(p) not in ends for p in trained}
    matrices, others = ([p for p in trained if is_matrix[id(p)] is wanted] for wanted in (True, False))
    first, second = name.split(JOIN)
    return [_made(first, matrices, model), _made(second, others, model)]


def _made(name: str, parameters: list, model: Any) -> Any:
    row = optimizer_of(name)
    if row.in_backward:
        raise PlanError(
            f"optimizer {name} works within the backward pass, as a plain loop does not",
            "set trainer to transformers",
            "optimizer",
        )
    if row.constructor is not None:
        return row.make(parameters)
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(folder, optim=name, learning_rate=LEARNING_RATE, report_to=[])
    try:
        kind, arguments = transformers.Trainer.get_optimizer_cls_and_kwargs(settings, model)
    except (ImportError, ValueError) as error:
        raise refused(name, error) from None
    return kind(parameters, **arguments)


def refused(name: str, error: Exception) -> PlanError:
    """What transformers says of an optimiser that it does not make here: its package is not installed, or its arguments
    are missing."""
    package = optimizer_of(name).package
    if isinstance(error, ImportError) and package is not None:
        return PlanError(f"optimizer {name} needs the package {package}", f"pip install {package}", "optimizer")
    return PlanError(f"optimizer {name}: {str(error).splitlines()[0]}", "choose another optimizer", "optimizer")
