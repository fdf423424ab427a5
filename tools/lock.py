"""Write the lock files from what is installed here: ``.venv/bin/python tools/lock.py``.

requirements-core.lock has the packages that the core's dependencies lead to, requirements.lock those of all extras
besides. Packages that nothing of ours asks for are left out; so is torch's build tag (``+cpu``).
"""

from __future__ import annotations

import re
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
CORE, ALL = ROOT / "requirements-core.lock", ROOT / "requirements.lock"
HEAD = "# {what}, pinned. Written by: .venv/bin/python tools/lock.py\n"


def closure(extras: set[str]) -> set[str]:
    """The packages that vramplan with these extras needs here, by their normalised names."""
    found: set[str] = set()
    waiting = [("vramplan", frozenset(extras))]
    seen = set(waiting)
    while waiting:
        name, wanted = waiting.pop()
        found.add(name)
        for line in requires(name) or ():
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in ("", *wanted)]
            if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
                entry = (normal(requirement.name), frozenset(requirement.extras))
                waiting += [entry] if entry not in seen else []
                seen.add(entry)
    return found - {"vramplan"}


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(names: set[str]) -> str:
    """The lines of a lock file for these packages."""
    return "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in sorted(names))


def locks() -> tuple[str, str]:
    """The texts of the two files."""
    core = closure(set())
    rest = closure({"trace", "probe", "test"}) - core
    return (
        HEAD.format(what="The packages of the core") + pins(core),
        HEAD.format(what="The packages of every extra, the tests' too") + f"-r {CORE.name}\n" + pins(rest),
    )


if __name__ == "__main__":
    for path, text in zip((CORE, ALL), locks(), strict=True):
        path.write_text(text, encoding="utf-8")
