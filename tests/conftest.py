"""Tests keep what they trace in a folder of their own, and trace what the catalogue has traced before."""

import os
import tempfile

import pytest

_FOLDER = tempfile.TemporaryDirectory()
os.environ["VRAMPLAN_CACHE"] = _FOLDER.name
os.environ["VRAMPLAN_STRICT"] = "1"  # a fault of ours that a trace could get over fails its test


@pytest.fixture
def sandbox():
    """The sandbox, for tests that call parts of a trace themselves."""
    from vramplan.dryrun import sandbox

    with sandbox.active():
        yield sandbox
