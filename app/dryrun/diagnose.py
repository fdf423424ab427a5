"""Whose fault an error is: the installed stack's, which refuses the job on a GPU too, or vramplan's own.

The traceback tells. What counts is the innermost frame that is neither PyTorch's nor Python's own library. An error of
the model's code is the stack's, and so is one of an operator that a rule of ours runs with the program's arguments. An
error that our own lines raise is ours. A rule that refuses what a card refuses raises
:class:`~vramplan.dryrun.cuda.as_on_card.AsOnCard`.
"""

from __future__ import annotations

import dis
import linecache
import logging
import os
import re
import sysconfig
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import STRICT, OurFault, PlanError
from ..job import Job
from ..memory.repeat import NotRepeatable
from .build.quantizers import packed_classes
from .cuda.as_on_card import AsOnCard
from .tracker import DataDependent, MemoryTracker, canonical_fqn

log = logging.getLogger("vramplan")

survived: Counter[str] = Counter()
"""How often a trace got over a fault of ours, by what was being done."""

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_PYTHON = sysconfig.get_path("stdlib") + os.sep
_RUN = MemoryTracker._run.__code__
"""What calls a rule, wherever that is defined."""
_COMPOSITE = "run_composite"
"""What calls a kernel of ours in the place of one that PyTorch composes of others."""
_PASS_ON = ("dryrun/sandbox.py",)
"""Our files that only pass calls on."""
_STAND_INS = ("dryrun/steps/", "dryrun/autocast.py")
"""Our files that restate what the stack or a user's script does."""
_TOO_LARGE = ("can't allocate memory", "Storage size calculation overflowed", "integer multiplication overflow")
"""What PyTorch says of sizes that the job asks for, whoever computes with them first."""


def raise_if_ours(error: BaseException) -> None:
    """Raise :class:`OurFault` where ``error`` is a fault of ours."""
    if is_ours(error):
        raise error if isinstance(error, OurFault) else OurFault(error) from error


def survive(error: BaseException, doing: str) -> None:
    """Get over an error that a fallback answers: told where it is a fault of ours, and raised under the tests."""
    if is_ours(error):
        survived[doing] += 1
        log.warning("a fault of vramplan's own while %s (%d so far)", doing, survived[doing], exc_info=error)
        if os.environ.get(STRICT):
            raise_if_ours(error)


def is_ours(error: BaseException) -> bool:
    """Whether our own lines raised ``error``."""
    if isinstance(error, (PlanError, DataDependent, NotRepeatable)):  # what we mean to say
        return isinstance(error, OurFault)
    if isinstance(error, (AsOnCard, MemoryError, RecursionError)) or any(words in str(error) for words in _TOO_LARGE):
        return False
    caller: CodeType | None = None
    ours = stands_in = False
    for code, last in _steps(error):
        rule, composite, caller = caller is _RUN, caller is not None and caller.co_name == _COMPOSITE, code
        if not _is_neutral(code.co_filename):
            ours = rule or code.co_filename.startswith(_OURS)
            stands_in = ours and (stands_in or composite or _is_a_stand_in(code.co_filename))
            ours = ours and not _runs_the_stack(code, last, stands_in)
    return ours


def _steps(error: BaseException) -> Iterator[tuple[CodeType, int]]:
    """The code of an error's frames from the outermost on, each with its last instruction."""
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame.f_code, step.tb_lasti
        step = step.tb_next


def _is_neutral(file: str) -> bool:
    """Whether a frame's file says nothing of whose an error is: PyTorch's, Python's, or ours that passes calls on."""
    if file.startswith(_OURS):
        return os.path.relpath(file, _OURS).replace(os.sep, "/") in _PASS_ON
    library = file.startswith((_PYTHON, "<")) and "site-packages" not in file
    return library or file.startswith(_TORCH)


def _is_a_stand_in(file: str) -> bool:
    """Whether the code of a file of ours does what the stack's or the user's own does elsewhere."""
    return os.path.relpath(file, _OURS).replace(os.sep, "/").startswith(_STAND_INS)


def _runs_the_stack(code: CodeType, last: int, stands_in: bool) -> bool:
    """Whether an instruction of our own code runs others' code with what the program gave it.

    ``func(*args, **kwargs)`` hands on the program's arguments; code that stands in for the stack's or the user's own
    calls with them whatever it calls. The values that are computed in memory are of our making.
    """
    operation = dis.opname[code.co_code[last]]
    if code.co_qualname == "KnownValues._compute":
        return False
    return operation == "CALL_FUNCTION_EX" or (stands_in and operation.startswith("CALL"))


@contextmanager
def explain_stack_errors(model, job: Job, known: bool):
    """What the stack itself refuses, as the error that a user is told; with ``known`` values, what they do not tell
    too."""
    try:
        yield
    except PlanError:
        raise
    except DataDependent as error:
        if not known:
            raise
        raise PlanError(
            f"{type(model).__name__} computes with values that a dry run does not have, at {error.where}",
            "its weights can be planned, its activations cannot",
            "model",
        ) from None
    except Exception as error:
        raise_if_ours(error)
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        place, hint = _where(error, job)
        raise PlanError(
            f"{type(model).__name__} does not run this job{place}: {_kind(error)}: {text}", hint, "model"
        ) from None


def _kind(error: Exception) -> str:
    """The name of an error's class; of a refusal of ours, of the class that the stack raises."""
    names = [base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins"]
    return names[0] if isinstance(error, AsOnCard) else type(error).__name__


def _where(error: Exception, job: Job) -> tuple[str, str]:
    """The innermost module that was running, and what can be done about it."""
    running, line = [], ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module):
            running.append(module)
            line = linecache.getline(frame.f_code.co_filename, number)
    hint = "the installed transformers would fail the same way on a GPU; check the sizes in the config, or the job"
    if job.trainer == "trl" and _is_raised_by_trl(error):
        hint = "TRL's trainer would fail the same way on a GPU: set trainer to transformers"
    if not running:
        return "", hint
    paths = {id(module): canonical_fqn(name) for name, module in running[0].named_modules()}
    path = paths.get(id(running[-1]), "")
    adapted = [module for module in running if isinstance(module, BaseTunerLayer)]
    if adapted:
        kind = type(adapted[-1].get_base_layer()).__name__
        name = paths[id(adapted[-1])].rpartition(".")[2]
        others = {paths[id(m)].rpartition(".")[2] for m in running[0].modules() if isinstance(m, BaseTunerLayer)}
        rest = ", ".join(sorted(others - {name}))
        hint = f"PEFT's adapter does not fit a {kind}: set lora.target_modules to names without {name}: {rest}"
    elif packed := [name for name in _WEIGHT.findall(line) if _is_packed(running[-1], name)]:
        head = paths.get(id(running[0].get_output_embeddings()))
        left = sorted({*job.quantization.skip_modules, *packed} | ({head} if head else set()))
        hint = (
            "its code takes a weight itself, which is packed when it is quantised: leave it as it is with "
            f"quantization.skip_modules {left}"
        )
    return f" at {path}" if path else "", hint


def _is_raised_by_trl(error: Exception) -> bool:
    """Whether TRL's own code ran last, and no module that it had called."""
    last = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if "/trl/" in frame.f_code.co_filename:
            last = True
        elif isinstance(frame.f_locals.get("self"), torch.nn.Module):
            last = False
    return last


_WEIGHT = re.compile(r"self\.(\w+)\.weight")


def _is_packed(module: torch.nn.Module, name: str) -> bool:
    return isinstance(getattr(getattr(module, name, None), "weight", None), packed_classes())
