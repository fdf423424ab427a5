"""What a stored trace is found under: a digest of everything that shapes it besides the job.

There are two keys. The file that the package brings along is keyed by the job and by :data:`FORMAT`, and is used where
the installed stack is the one that traced it: a test traces its jobs again and compares bytes. The user's own cache is
keyed by the code itself too, for nobody tests what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType

from .. import __version__
from ..errors import PlanError
from ..resources import CATALOG, PACKAGE

FORMAT = 2
"""Version of the stored bytes. Raise it when the same job is stored as other bytes, and run ``make pretrace``."""
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
"""The packages whose code a trace runs."""
SOURCES = ("dryrun", "memory", "registry", "job.py", "planning/config_limits.py", "planning/fingerprint.py")
"""Files and folders of this package that shape a trace."""

SHIPPED_STACK = CATALOG / "stack.json"
"""The versions that traced the file which the package brings along; ``make pretrace`` writes it."""


@lru_cache(maxsize=1)
def installed_stack() -> dict[str, str]:
    """The versions of the stack that are installed here, by package; without torch's build tag (``+cpu``)."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name).partition("+")[0]
    return found


@lru_cache(maxsize=1)
def shipped_stack() -> dict[str, str]:
    """The versions that traced the file which the package brings along, by package."""
    try:
        versions: dict[str, str] = json.loads(SHIPPED_STACK.read_text(encoding="utf-8"))
    except OSError:
        return {}
    return versions


def can_trace() -> bool:
    """Whether every package that a trace needs is installed."""
    return installed_stack().keys() == set(LIBRARIES)


class NotTraced(PlanError):
    """The error for a job that the package brings no trace of, where the packages that would trace it are missing.

    It says nothing about the job: a search must not take it for a job that cannot run, and no cache keeps it.
    """

    def __init__(self) -> None:
        missing = ", ".join(name for name in LIBRARIES if name not in installed_stack())
        super().__init__(
            f"this job is not one of those that come with the package, and tracing it needs {missing}",
            'pip install "vramplan[trace]"',
        )


def use_shipped() -> bool:
    """Whether to answer from the traces that the package brings along: they are of the installed versions, or nothing
    here could trace the job again."""
    return not can_trace() or installed_stack() == shipped_stack()


def stack_warnings() -> list[str]:
    """What an answer says where it is made from traces of other versions than those that are installed."""
    shipped = shipped_stack()
    others = [
        f"{name} {shipped[name]} (installed: {number})"
        for name, number in installed_stack().items()
        if number != shipped.get(name, number)
    ]
    if can_trace() or not others:
        return []
    return [f"the plan is one of {', '.join(others)}; to plan with what is installed: pip install 'vramplan[trace]'"]


def stack() -> dict[str, str]:
    """The versions that plans are traced with, by package: the installed ones; without them, those of the plans that
    the package brings along."""
    return {"vramplan": __version__, **(installed_stack() if can_trace() else shipped_stack())}


def shipped_key(kind: str) -> str:
    """The key of ``kind`` in the file that the package brings along (hex SHA-256)."""
    return sha256(f"{FORMAT} {kind}".encode()).hexdigest()


def cache_key(kind: str) -> str:
    """The key of ``kind`` in the user's own cache (hex SHA-256)."""
    return sha256(f"{code_digest()} {json.dumps(stack())} {kind}".encode()).hexdigest()


@lru_cache(maxsize=1)
def code_digest() -> str:
    """A digest of the code that shapes a trace. Comments, docstrings, line numbers and assertions do not change it."""
    digest = sha256()
    for path in _sources():
        digest.update(digest_of_source(path.read_bytes()))
    return digest.hexdigest()


def digest_of_source(source: bytes) -> bytes:
    """The SHA-256 of the instructions that Python compiles ``source`` to, without what only readers see."""
    code = compile(source, "", "exec", dont_inherit=True, optimize=2)
    return sha256(repr(_instructions(code)).encode()).digest()


def _sources() -> Iterator[Path]:
    for name in SOURCES:
        path = PACKAGE / name
        yield from sorted(path.rglob("*.py")) if path.is_dir() else (path,)


def _instructions(code: CodeType) -> tuple:
    constants = tuple(map(_constant, code.co_consts))
    return code.co_qualname, code.co_flags, code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants


def _constant(value: object) -> object:
    """A constant whose text is the same in every process: sets are sorted, functions are their instructions."""
    if isinstance(value, CodeType):
        return _instructions(value)
    if isinstance(value, (frozenset, tuple)):
        inner = [repr(_constant(item)) for item in value]
        return type(value).__name__, sorted(inner) if isinstance(value, frozenset) else inner
    return value
