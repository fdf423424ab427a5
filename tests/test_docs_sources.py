"""Links into the sources of PyTorch and the libraries name one tag each, and lines that exist."""

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from vramplan.dryrun.sources import PINNED_TAGS

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "app").rglob("*.py"))
LINK = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+)/blob/([^/\s]+)/([^\s#)`;,]+)(?:#L(\d+))?")
NAME = re.compile(r"``(?:\w+[.:]+)*(\w+)")
PREFIXES = {"huggingface/transformers": "src/", "huggingface/peft": "src/", "huggingface/accelerate": "src/"}
"""The folder of a repository that is installed, where it is not the top one."""
ENGINES = ("vllm", "sglang", "llama.cpp")
"""Packages that are planned and not installed: their lines are checked by hand."""
BEFORE, AFTER = 250, 150
"""Characters around a link among which the function that is meant is named, in double backquotes."""
HEAD = 3
"""Lines after the cited one in which the name may stand: a decorator or a return type comes first."""


def links():
    for path in FILES:
        text = path.read_text()
        for match in LINK.finditer(text):
            around = text[max(match.start() - BEFORE, 0) : match.start()] + text[match.end() : match.end() + AFTER]
            names = NAME.findall(around)
            yield pytest.param(*match.groups(), names, id=f"{path.name}:{text.count(chr(10), 0, match.start()) + 1}")


@pytest.mark.parametrize("repository, tag, path, line, names", [*links()])
def test_a_link_names_the_pinned_tag_and_a_line_that_has_the_name(repository, tag, path, line, names):
    """Lines of PyTorch are checked by hand against its 2.11.0 wheel: another version is installed."""
    assert tag == PINNED_TAGS[repository]
    package = repository.partition("/")[2].lower()
    if package == "pytorch" or not path.endswith(".py"):
        return
    if package in ENGINES:
        return
    assert version(package) == tag.removeprefix("v"), "the pinned tag is not the installed version"
    file = Path(find_spec(package).origin).parents[1] / path.removeprefix(PREFIXES.get(repository, ""))
    lines = file.read_text().splitlines()
    assert line is None or int(line) <= len(lines), f"{path} has {len(lines)} lines"
    cited = lines if line is None else lines[int(line) - 1 : int(line) - 1 + HEAD]
    assert any(name in text for text in cited for name in names), f"none of {names} is at {path}#L{line}"


def test_every_linked_library_is_pinned():
    linked = {match[1] for path in FILES for match in LINK.finditer(path.read_text())}
    assert linked <= PINNED_TAGS.keys()
