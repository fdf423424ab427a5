"""The pages of docs/ name files, tests and words that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in (ROOT / "docs").glob("*.md")
    if path.stem.startswith("add-") or path.stem in ("architecture", "glossary")
)
CODE = "\n".join(
    path.read_text(encoding="utf-8") for part in ("app", "tests") for path in sorted((ROOT / part).rglob("*.py"))
)
FILE = re.compile(r"\b((?:app|tests|docs|templates|static)/[\w./-]*\w)")
LINK = re.compile(r"\]\(([^)#:]+)\)")
WORD = re.compile(r"`@?([A-Za-z_][\w.]*)(?:\(.*?\))?`")
OTHERS = {"NAME", "SFTTrainer", "MemTracker", "CUDACachingAllocator", "NotImplemented", "None", "gloo", "resize_"}
"""Words of the field, and of the command line."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_files_that_there_are(page):
    text = page.read_text(encoding="utf-8")
    missing = {name for name in FILE.findall(text) if not (ROOT / name).exists()}
    missing |= {name for name in LINK.findall(text) if not (page.parent / name).exists()}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_words_of_the_code(page):
    """Each word in backquotes is somewhere in the code, its last part at least."""
    words = {word.rpartition(".")[2] for word in WORD.findall(page.read_text(encoding="utf-8"))}
    assert not {word for word in words - OTHERS if not re.search(rf"\b{word}\b", CODE)}


def test_every_table_of_names_has_its_page():
    own = {"__init__", "tasks"}  # tasks are transformers'
    tables = {path.stem for path in (ROOT / "app" / "registry").glob("*.py")} - own
    pages = " ".join(page.stem for page in PAGES)
    for table in tables:
        assert re.search(rf"add-an?-{table.removesuffix('s').replace('strategie', 'strategy')}\b", pages), table
