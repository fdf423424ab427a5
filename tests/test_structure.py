"""The architecture holds: imports run one way, ``memory/`` is pure, and no rule is keyed to a model's name."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

APP = Path(__file__).parent.parent / "app"
ORDER = [
    "errors",
    "progress",
    "config",
    "job",
    "catalog",
    "memory",
    "dryrun",
    "calibration",
    "hub",
    "store",
    "plan",
    "cards",
    "weigh",
    "solver",
    "advice",
    "service",
    "pretrace",
    "probe",
    "form",
    "compare",
    "batch",
    "workers",
    "warmed",
    "desk",
    "remember",
    "answer",
    "render",
    "web",
    "cli",
]
"""From the bottom up: a part imports only parts that stand before it (or its own)."""
PURE = {"memory"}
ARRAYS = {"numpy", "numba"}
MODULES = sorted(APP.rglob("*.py"))


def part_of(path: Path) -> str:
    first = path.relative_to(APP).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            out.add(node.module)
            out.update(f"{node.module}.{alias.name}" for alias in node.names)
    return out


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(APP)))
def test_imports_run_one_way(path):
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] == "app" and len(pieces) > 1 and pieces[1] in ORDER:
            assert ORDER.index(pieces[1]) <= ORDER.index(part), f"{part} imports {name}"
        if part in PURE and pieces[0] != "app":
            assert pieces[0] in sys.stdlib_module_names | ARRAYS, f"{part} imports {name}"


def test_every_part_has_its_place():
    parts = {part_of(path) for path in MODULES} - {"__init__", "__main__"}
    assert parts == set(ORDER)


def test_no_rule_is_keyed_to_a_model():
    """No string of the engine is a model_type that transformers knows (but for one that is also a word)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    words = {"auto", "audio", "encoder", "decoder", "text", "vision"}
    for path in [
        *(APP / "dryrun").rglob("*.py"),
        *(APP / "memory").rglob("*.py"),
        *(APP / f"{name}.py" for name in ("plan", "cards", "weigh", "solver", "advice", "service", "compare")),
    ]:
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & set(CONFIG_MAPPING_NAMES) - words, (path.name, strings & set(CONFIG_MAPPING_NAMES))
