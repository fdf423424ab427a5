"""Tests keep what they trace in a folder of their own, and trace what the catalogue has traced before.

``--fast`` runs the files of :data:`FAST` alone, and lets nothing import torch.
"""

import os
import sys
import tempfile

import pytest

_FOLDER = tempfile.TemporaryDirectory()
os.environ["VRAMPLAN_CACHE"] = _FOLDER.name
os.environ["VRAMPLAN_STRICT"] = "1"  # a fault of ours that a trace could get over fails its test

FAST = {
    "test_allocator.py",
    "test_allocator_reference.py",
    "test_catalog.py",
    "test_cli.py",
    "test_fit.py",
    "test_hub.py",
    "test_store.py",
    "test_structure.py",
}
"""The files whose tests need no torch, or mark those that do as ``traces``."""


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="only tests that need no torch")


def pytest_configure(config):
    if config.getoption("--fast"):
        sys.modules["torch"] = None  # importing it fails


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--fast") and collection_path.name.startswith("test_") and collection_path.name not in FAST:
        return True
    return None


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fast"):
        left_out = [item for item in items if item.get_closest_marker("traces")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def sandbox():
    """The sandbox, for tests that call parts of a trace themselves."""
    from vramplan.dryrun import sandbox

    with sandbox.active():
        yield sandbox
