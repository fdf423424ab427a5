"""Published configs of 90 architectures: each is planned, or refused with the stack's own reason.

The configs are in ``shared/configs`` beside the repository, their parameter counts in its ``PARAMS.md``. Every job runs
in a process of its own that is cold but for the imports (``alone.py``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIGS = Path(os.environ.get("VRAMPLAN_SHARED", ROOT.parent / "shared")) / "configs"
pytestmark = pytest.mark.skipif(not CONFIGS.exists(), reason="the configs are not beside the repository")
GIB = 1 << 30
LORA = {"target_modules": "all-linear"}
METHODS = {"full": {}, "lora": {"lora": LORA}, "qlora": {"lora": LORA}}


def ids() -> list[str]:
    return sorted(path.stem.replace("__", "/", 1) for path in CONFIGS.glob("*.json"))


def config_of(id: str) -> dict:
    return json.loads((CONFIGS / f"{id.replace('/', '__', 1)}.json").read_text())


def job_of(id: str, method: str) -> dict:
    job = {"config": config_of(id), "method": method, **METHODS[method]}
    return {**job, "batch_size": 1, "sequence_length": 512, "gradient_checkpointing": True}


def run(jobs: list[dict]) -> list[dict]:
    """What ``alone.py`` says of each job, in order."""
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "alone.py", "60", str(16 * GIB)],
        input="\n".join(map(json.dumps, jobs)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(jobs), done.stderr[-2000:]
    return lines


def counts() -> dict[str, set[int]]:
    """The parameter counts of ``PARAMS.md`` by id: of the class that was built, and of the one that the config names."""
    out = {}
    for line in (CONFIGS / "PARAMS.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 9 and "/" in cells[0]:
            numbers = re.findall(r"\d{1,3}(?:,\d{3})+", f"{cells[4]} {cells[6]}")
            out[cells[0]] = {int(number.replace(",", "")) for number in numbers}
    return out


NO_CLASS = "has no model_type"
ON_THE_STACK = {
    "albert/albert-base-v1": "does not support gradient checkpointing",
    "BAAI/bge-reranker-v2-m3 qlora": "only Tensors of floating point dtype can require gradients",
    "openbmb/MiniCPM3-4B": "it lacks 'factor'",
    "poolside/Laguna-XS.2-FP8": "does not accept this laguna config",
    "stepfun-ai/Step-3.7-Flash": "Could not find a `sliding_window` argument",
    "stepfun-ai/Step-3.7-Flash-FP8": "Could not find a `sliding_window` argument",
    "Zyphra/Zamba2-7B": "is invalid for input of size",
}
"""What the installed stack cannot run, and what it says: found by running it, with weights where the model is small."""
