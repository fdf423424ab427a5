"""What a program is told that reads a tensor's value on the host: the functions that do, and the answers.

A rule stands for one function of the installed stack. Where that function is gone, nothing would match, and the program
would be told nothing or, worse, go on without end: :func:`check` raises instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from types import CodeType, FrameType
from typing import Any, NamedTuple

from ...errors import OurFault


class HostRead(NamedTuple):
    """A function that reads a value: its qualified name and its module, the versions of the module's package in which
    it was read, and the answer: a value, or what the job says of it."""

    function: str
    module: str
    versions: str
    answer: bool | str


_MASKS, _GENERATION, _V5 = "transformers.masking_utils", "transformers.generation.utils", ">=5.17,<6"

HOST_READS = (
    # "is every sequence one sequence?"
    HostRead("find_packed_sequence_indices", _MASKS, _V5, "single"),
    # "does the mask hide nothing?"
    HostRead("_ignore_causal_mask_sdpa", _MASKS, _V5, "full"),
    HostRead("_ignore_bidirectional_mask_sdpa", _MASKS, _V5, "full"),
    HostRead("create_recurrent_attention_mask", _MASKS, _V5, "full"),
    HostRead("flash_attention_mask", _MASKS, _V5, "full"),
    HostRead("fast_all", _MASKS, _V5, "full"),
    # "does a sequence begin or end with padding?" Then it would only warn.
    HostRead("PreTrainedModel.warn_if_padding_and_no_attention_mask", "transformers.modeling_utils", _V5, False),
    # "is a special token negative, is the mask of the wrong kind?"
    HostRead("GenerationMixin._prepare_special_tokens", _GENERATION, _V5, False),
    HostRead("GenerationMixin.generate", _GENERATION, _V5, False),
    # "has every sequence ended?" Not before the length that was asked for: new tokens are a minimum too.
    HostRead("StopCheck.__call__", _GENERATION, _V5, "generated"),
    # "is a gradient infinite?" Then the step would be left out.
    HostRead("GradScaler._maybe_opt_step", "torch.amp.grad_scaler", ">=2.13,<3", False),
    # the largest position, plus one
    HostRead(
        "dynamic_rope_update.<locals>.longrope_frequency_update", "transformers.modeling_rope_utils", _V5, "length"
    ),
)
"""The functions that read a value themselves: not in what they call."""

_RULES = {(read.module, read.function): read for read in HOST_READS}
_checked: set[HostRead] = set()


def rule_for(frame: FrameType) -> HostRead | None:
    """The rule for the function that ``frame`` runs."""
    return _RULES.get((frame.f_globals.get("__name__", ""), frame.f_code.co_qualname))


def check() -> None:
    """Raise :class:`OurFault` for a rule whose function a module that is loaded does not have."""
    for read in HOST_READS:
        if read not in _checked and read.module in sys.modules:
            if not _has(sys.modules[read.module], read.function):
                package = read.module.partition(".")[0]
                raise OurFault(
                    f"{read.module} has no {read.function}, whose question a trace answers: {package} "
                    f"{version(package)} is installed, the rule is for {read.versions}"
                )
            _checked.add(read)


def _has(module: Any, function: str) -> bool:
    """Whether a module defines a function of this qualified name, within another function too."""
    outer, _, inner = function.partition(".<locals>.")
    found = module
    for name in outer.split("."):
        found = vars(found).get(name)
        if found is None:
            return False
    code = getattr(found, "__code__", None)
    return not inner or code is not None and function in _qualnames(code)


def _qualnames(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant.co_qualname
            yield from _qualnames(constant)
