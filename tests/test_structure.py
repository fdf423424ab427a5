"""The architecture holds: imports run one way, ``memory/`` is pure, and no rule is keyed to a model's name."""

from __future__ import annotations

import ast
import re
import statistics
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
APP = ROOT / "app"
PURE = {"memory"}
ARRAYS = {"numpy", "numba"}
MODULES = sorted(APP.rglob("*.py"))


def layers() -> list[str]:
    """The parts of the package from the bottom up, as the map in its docstring has them."""
    rows = re.findall(
        r"^    (\S[\w/, ]*?)(?:\s{2,}\S.*)?$", ast.get_docstring(ast.parse((APP / "__init__.py").read_text())), re.M
    )
    names = [name.strip().rstrip("/") for row in rows for name in row.split(",") if "    " not in row]
    return [name for name in reversed(names) if (APP / name).is_dir() or (APP / f"{name}.py").exists()]


ORDER = layers()


def part_of(path: Path) -> str:
    return path.relative_to(APP).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The modules that a file imports: ours from the package on (``memory.events``), others by their first name."""
    package = path.relative_to(APP).parts[:-1]
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            out.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            dotted = ".".join(filter(None, base))
            out |= {f"app.{dotted}"} if dotted else {f"app.{alias.name}" for alias in node.names}
    return out


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(APP)))
def test_imports_run_one_way(path):
    part = part_of(path)
    for name in imported(path):
        pieces = name.split(".")
        if pieces[0] == "app" and pieces[1] in ORDER and part in ORDER:
            assert ORDER.index(pieces[1]) <= ORDER.index(part), f"{part} imports {name}"
        assert pieces[0] != "vramplan", f"{path} imports by the installed name: relative imports work under both"
        if part in PURE and pieces[0] != "app":
            assert pieces[0] in sys.stdlib_module_names | ARRAYS, f"{part} imports {name}"


def test_the_map_in_the_package_s_docstring_names_every_part():
    assert {part_of(path) for path in MODULES} - {"__init__", "__main__"} == set(ORDER)


def test_no_two_modules_have_one_name():
    """A stack trace names files: each name means one of them."""
    names = Counter(path.name for path in MODULES if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_every_package_is_installed():
    """pyproject.toml lists the packages by hand, for they lie in three folders."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    ours = {".".join(("vramplan", *path.parent.relative_to(APP).parts)) for path in MODULES}
    data = {
        ".".join(("vramplan", *path.relative_to(ROOT).parts))
        for folder in ("static", "templates")
        for path in [ROOT / folder, *(ROOT / folder).rglob("*")]
        if path.is_dir()
    }
    assert listed == ours | data


def test_no_rule_is_keyed_to_a_model():
    """No string of the engine is a model_type that transformers knows (but for one that is also a word)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    words = {"auto", "audio", "encoder", "decoder", "text", "vision"}
    for path in [*(APP / "dryrun").rglob("*.py"), *(APP / "memory").rglob("*.py"), *(APP / "planning").rglob("*.py")]:
        if path.name == "pretrace.py":
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & set(CONFIG_MAPPING_NAMES) - words, (path.name, strings & set(CONFIG_MAPPING_NAMES))


def functions() -> list[tuple[str, int]]:
    """Every function of the package, methods and inner ones too: where it stands, and how many lines it has."""
    return [
        (f"{path.relative_to(APP)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def test_functions_are_short():
    """The median has at most 10 lines, none more than 60."""
    sizes = functions()
    assert statistics.median(size for _, size in sizes) <= 10
    assert [where for where, size in sizes if size > 60] == []


def undocumented(tree: ast.AST, public: bool = True) -> Iterator[ast.AST]:
    """The public classes and functions without a docstring. What stands inside a function is not public."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            named = public and not node.name.startswith("_")
            if named and not ast.get_docstring(node):
                yield node
            yield from undocumented(node, named and isinstance(node, ast.ClassDef))
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from undocumented(node, public)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(APP)))
def test_public_names_have_docstrings(path):
    """All but the methods of a SymNode, which PyTorch names and documents."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has none"
    if path.name != "symbols.py":
        assert [f"{node.lineno} {node.name}" for node in undocumented(tree)] == []
