"""The usual jobs of the catalogue's models, traced ahead into the file that the package brings along.

``python -m vramplan.planning.pretrace`` writes it (``make pretrace``).

A plan finds them there as it finds what it has traced itself (:mod:`vramplan.planning.profile_store`). A test
traces a sample of them again, and a slow test all, and compares bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..errors import PlanError
from ..job import Job, read_job
from ..registry.trainers import TRAINERS
from .fingerprint import SHIPPED_STACK, installed_stack
from .profile_cache import SHIPPED, build_shipped, store_trace
from .resolve import card_of, config_of, resolved
from .tracer import InProcessTracer, request_of

METHODS = ("full", "lora", "qlora")
QUESTION = {
    "method": "qlora",
    "quantization": {"type": "nf4", "double_quant": True},
    "lora": {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "gradient_checkpointing": True,
    "batch_size": 1,
    "sequence_length": 2048,
}
"""QLoRA as its paper's readers run it: the main question."""
ASKED = ("llama-2-7b", "llama-2-13b", "codellama-34b", "llama-3.1-70b", "llama-3.1-8b")
USUAL = (
    "llama-2-7b llama-2-13b llama-3-8b llama-3.1-8b llama-3.1-70b llama-3.2-1b llama-3.2-3b tinyllama "
    "mistral-7b mistral-7b-v0.3 mistral-nemo qwen2.5-0.5b qwen2.5-1.5b qwen2.5-3b qwen2.5-7b qwen2.5-14b qwen2.5-32b "
    "qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b gemma-2-2b gemma-2-9b smollm2-135m gpt2"
).split()
IN_FULL = ("phi-3-mini", "phi-4")
"""PEFT knows no target modules for them: each asks for others."""


SHOWN = (
    {"model": "llama-3.1-70b", "method": "qlora", "gpu": "a100-80gb", "sequence_length": 2048},
    {"model": "llama-3.1-8b", "method": "qlora", "gpu": "rtx-4090", "sequence_length": 2048},
    {"model": "llama-3.1-8b", "method": "lora", "gpu": "h100", "batch_size": 4, "sequence_length": 2048,
     "gradient_checkpointing": True},
    {"model": "qwen3-0.6b", "method": "full", "gpu": "t4", "sequence_length": 1024},
)  # fmt: skip
"""The page's first visit and its examples: QLoRA of 2048 tokens does not run like that of the default 1024."""


def usual_jobs() -> list[dict]:
    """What people ask first of each model of the catalogue, on the default card's kernels; and what the demo and the
    page show first, with every trainer, so that the advice, too, is there in a moment."""
    jobs = [{"model": name, "method": method} for name in USUAL for method in METHODS]
    jobs += [{"model": name, "method": "full"} for name in IN_FULL]
    shown = [*({**QUESTION, "model": name} for name in ASKED), *SHOWN]
    return [*jobs, *shown, *({**job, "trainer": name} for job in shown for name in TRAINERS)]


def pretrace(job: Job) -> None:
    """Trace a job (resolved) for every batch and length that runs like it, and read it. Raises :class:`PlanError`."""
    from .estimate import estimate

    request = request_of(job, config_of(job)[0], card_of(job))
    store_trace("general", request, InProcessTracer().trace("general", request))
    estimate(job.model_dump(exclude_unset=True))


def _one(path: Path, job: dict) -> str:
    build_shipped(path)
    try:
        pretrace(resolved(read_job(job)))
    except PlanError as error:
        return f"{job['model']} {job['method']}: {error.message}"
    return ""


def build(path: Path, jobs: list[dict], processes: int) -> list[str]:
    """Write ``path`` anew; what is told of jobs that are refused."""
    with suppress(OSError):
        path.unlink()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        refused = [said for said in pool.imap(partial(_one, path), jobs) if said]
    path.with_name(SHIPPED_STACK.name).write_text(json.dumps(installed_stack(), indent=1) + "\n", encoding="utf-8")
    with sqlite3.connect(path) as base:
        base.execute("update entries set used = 0")
    base.execute("pragma journal_mode = delete")
    base.execute("vacuum")
    base.close()
    return refused


if __name__ == "__main__":
    for said in build(SHIPPED, usual_jobs(), os.cpu_count() or 1):
        print(said, file=sys.stderr)
    print(f"{SHIPPED}: {SHIPPED.stat().st_size} bytes")
