"""The one error that a user may be told."""

import difflib
import re
import traceback
from collections.abc import Iterable
from typing import Any

STRICT = "VRAMPLAN_STRICT"
"""The environment variable under which a fault of ours is raised where an answer could be given all the same: the tests
set it."""


class PlanError(Exception):
    """What was asked and what was found, with what to do next.

    ``message`` is one sentence of fact, ``hint`` one of advice. Every interface catches this class once:
    the command line prints it and exits with 2, the HTTP API answers 422, the page shows it at ``field``.
    ``weights``: what is known of a model that cannot be planned: its ``parameters``, their ``bytes`` as they are
    loaded or stored, and what they were counted ``from``.
    """

    def __init__(self, message: str, hint: str = "", field: str | None = None, weights: dict | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field
        self.weights = weights

    def as_dict(self) -> dict:
        """The error as a JSON object: ``message``, ``hint``, and ``field`` and ``weights`` where they are known."""
        out: dict[str, Any] = {"message": self.message, "hint": self.hint}
        if self.field:
            out["field"] = self.field
        if self.weights:
            out["weights"] = self.weights
        return out


class Limited(PlanError):
    """The refusal of this machine, not of the stack: a limit of time or memory. Another machine may answer, so no store
    keeps it."""


class OurFault(PlanError):
    """A fault of vramplan's own, and no property of the job.

    ``report`` is what a maintainer needs to see it again: the traceback, and what else is known where it was caught;
    ``name`` that of the file with it, where one was written. Neither message nor hint holds a path or a traceback.
    """

    def __init__(self, what: BaseException | str, report: dict | None = None):
        text = what if isinstance(what, str) else f"{type(what).__name__}{_first_line(what)}"
        hint = "this is a fault of vramplan, not of the job: please report it with the job"
        super().__init__(f"the planner failed on this job: {text}", hint)
        self.report = {} if report is None else report
        if isinstance(what, BaseException):
            self.report.setdefault("traceback", traceback.format_exception(what))
        self.what = text
        self.name: str | None = None


def _first_line(error: BaseException) -> str:
    """The first line of an error's text behind a colon, without what could be a path."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return f": {_PATH.sub('…', text)}" if text else ""


_PATH = re.compile(r"(?<![\w/\\])(?:[A-Za-z]:)?[/\\][\w.+-]+(?:[/\\][\w.+-]+)+")


class Unanswered(Exception):
    """What was asked was given up before there was an answer, for a reason that is not the job's: ``error`` tells it.

    No :class:`PlanError`: a search takes those for answers, and would find less than there is.
    """

    def __init__(self, error: PlanError):
        super().__init__(error.message)
        self.error = error


NEAR = 0.65
"""The least likeness, of 1, of two words of which one may be meant by the other: ``offload`` is not ``lora``."""


def nearest(word: str, words: Iterable[str]) -> list[str]:
    """The word of ``words`` that may be meant by ``word``, alone; else none."""
    return difflib.get_close_matches(word, list(words), 1, NEAR)


def near(word: str, words: Iterable[str]) -> str:
    """The hint for a word that is none of ``words``: the nearest of them, else all."""
    words = list(words)
    found = nearest(word, words)
    return f"did you mean {found[0]!r}?" if found else f"one of {', '.join(words)}"
