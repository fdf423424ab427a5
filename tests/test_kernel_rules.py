"""The registry of kernel rules, and the workspaces of cuBLAS."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from vramplan.dryrun import cuda
from vramplan.dryrun.cuda.card_facts import Card
from vramplan.dryrun.cuda.registry import KERNELS, kernel
from vramplan.dryrun.cuda.temporaries import record_library_workspace
from vramplan.dryrun.tracker import MemoryTracker

FILES = sorted(Path(cuda.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", [p for p in FILES if "\n@kernel(" in p.read_text()], ids=lambda p: p.stem)
def test_importing_the_package_imports_every_file_of_rules(path):
    assert hasattr(cuda, path.stem), f"import {path.stem} in {cuda.__file__}"
    module = import_module(f"{cuda.__name__}.{path.stem}")
    assert any(handler.__module__ == module.__name__ for handler in KERNELS.values())


def test_an_operator_has_one_rule():
    with pytest.raises(ValueError, match="has a handler already: _matmul"):
        kernel(torch.ops.aten.mm.default)(lambda *args: None)


def test_cublas_has_a_workspace_for_each_thread_and_stream():
    tracker = MemoryTracker(Card())
    for in_backward in (False, True, False, True):
        tracker.in_backward = in_backward
        for stream in (0, 7):
            tracker.stream = stream
            record_library_workspace(tracker, "cublas_workspace", 4096)
    assert [entry.size for entry in tracker.trace_log.allocations] == [4096] * 4
