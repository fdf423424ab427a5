"""The answers for a program that reads a tensor's value on the host.

On the meta device no value exists. Each rule has the answer for one function of the software. If that function
is gone, the rule matches nothing: then the program gets no answer, or a loop may not end. :func:`check` raises instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from types import CodeType, FrameType
from typing import Any, NamedTuple

from ...errors import OurFault


class HostRead(NamedTuple):
    """A function that reads a value, and the answer.

    ``function``: its qualified name, in ``module``. ``versions``: of the package, for which the rule was checked.
    ``answer``: a value, or the name of a fact of the job (``MemoryTracker`` has them: full, single, length, generated,
    beams).
    """

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
    # "has every sequence ended?" Not before the job's length: ``new_tokens`` is a minimum too.
    HostRead("StopCheck.__call__", _GENERATION, _V5, "generated"),
    HostRead("GenerationMixin._beam_search", _GENERATION, _V5, "beams"),
    # "is a gradient infinite?" Then the step would be left out.
    HostRead("GradScaler._maybe_opt_step", "torch.amp.grad_scaler", ">=2.13,<3", False),
    # "is a logit infinite?" Then it would refuse.
    HostRead("Linear._get_lora_matrices", "peft.tuners.vblora.layer", ">=0.21,<0.22", False),
    # the largest position, plus one
    HostRead(
        "dynamic_rope_update.<locals>.longrope_frequency_update", "transformers.modeling_rope_utils", _V5, "length"
    ),
)
"""The functions that read a value themselves. A read in a function that they call does not match."""

_RULES = {(read.module, read.function): read for read in HOST_READS}
_checked: set[HostRead] = set()


def rule_for(frame: FrameType) -> HostRead | None:
    """The rule for the function that ``frame`` runs."""
    return _RULES.get((frame.f_globals.get("__name__", ""), frame.f_code.co_qualname))


def check() -> None:
    """Raise :class:`OurFault` if a module is loaded and has no function for one of its rules."""
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
    value = module
    for name in outer.split("."):
        value = vars(value).get(name)
        if value is None:
            return False
    code = getattr(value, "__code__", None)
    return not inner or (code is not None and function in _qualnames(code))


def _qualnames(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant.co_qualname
            yield from _qualnames(constant)
