"""Published configs of 90 architectures: each is planned for every method, or refused for the stack's own reason.

Every job runs in a process of its own that is cold but for the imports (``alone.py``): full, lora and qlora with
all-linear, one sequence of 512 tokens, checkpointing on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from published import config_of, ids, needs_configs

pytestmark = needs_configs
ROOT = Path(__file__).parent.parent
GIB = 1 << 30
LORA = {"target_modules": "all-linear"}
METHODS = {"full": {}, "lora": {"lora": LORA}, "qlora": {"lora": LORA}}
PATIENCE = 240
"""Seconds after which a job counts as hung, on the busiest machine."""
NO_CLASS = "has no model_type"
STORED = (
    "has no quantizer for",
    "transformers does not quantise again",
    "does not support training on",
    "names no `quant_method`",
    "its stored weights cannot be loaded for training",
)
"""How transformers takes what is stored quantised already; the hint names the nearest job that works."""
STACK = {
    "albert/albert-base-v1": "does not support gradient checkpointing",
    "BAAI/bge-reranker-v2-m3": "only Tensors of floating point dtype can require gradients",
    "openai/whisper": "longer than this model's 448 positions",
    "openai/clip": "longer than this model's 77 positions",
    "openbmb/MiniCPM3-4B": "it lacks 'factor'",
    "poolside/Laguna-XS.2-FP8": "does not accept this laguna config",
    "stepfun-ai/Step-3.7-Flash": "Could not find a `sliding_window` argument",
    "Zyphra/Zamba2-7B": "is invalid for input of size",
    "state-spaces/mamba": "Module 'out_proj' is incompatible with Mamba-based models",
    "nvidia/Nemotron-H": "Module 'out_proj' is incompatible with Mamba-based models",
    "nvidia/NVIDIA-Nemotron": "Module 'out_proj' is incompatible with Mamba-based models",
    "deepseek-ai/DeepSeek-V4": "PEFT's adapter does not fit a DeepseekV4GroupedLinear",
    "RedHatAI/DeepSeek-V4": "PEFT's adapter does not fit a DeepseekV4GroupedLinear",
}
"""By the beginning of an id, what the installed stack itself cannot run, and what is said of it."""
SAMPLE = {
    "full": """albert/albert-base-v1 EleutherAI/pythia-410m Qwen/Qwen2.5-VL-7B-Instruct Qwen/Qwen3-30B-A3B-FP8
        bigscience/bloom-560m deepseek-ai/DeepSeek-V3 google/flan-t5-base google/gemma-3-4b-it
        google/vit-base-patch16-224-in21k meta-llama/Llama-3.1-8B microsoft/deberta-v3-base openai/clip-vit-base-patch32
        openai/gpt-oss-20b openai/whisper-tiny openbmb/MiniCPM3-4B state-spaces/mamba-130m-hf Qwen/Qwen-7B
        nvidia/GLM-5.1-NVFP4 openai-community/gpt2 databricks/dbrx-base""",
    "lora": """01-ai/Yi-6B-Chat Qwen/Qwen2-VL-2B-Instruct allenai/OLMo-1B-hf answerdotai/ModernBERT-base
        deepseek-ai/DeepSeek-Coder-V2-Instruct google/gemma-2-2b mistralai/Mixtral-8x7B-v0.1 tiiuae/falcon-7b
        moonshotai/Kimi-K2-Instruct zai-org/GLM-4.5-Air""",
    "qlora": """BAAI/bge-reranker-v2-m3 CohereLabs/aya-23-8B HuggingFaceTB/SmolLM3-3B microsoft/phi-2
        llava-hf/llava-1.5-7b-hf Qwen/Qwen3-8B-FP8 bigcode/starcoder2-3b facebook/opt-125m meta-llama/Llama-2-7b-hf
        Qwen/Qwen3-Next-80B-A3B-Instruct""",
}
"""Of every kind of architecture and of refusal some."""


def job_of(id: str, method: str) -> dict:
    job = {"config": config_of(id), "method": method, **METHODS[method]}
    return {**job, "batch_size": 1, "sequence_length": 512, "gradient_checkpointing": True}


def run(jobs: list[tuple[str, str]]) -> dict[tuple[str, str], dict]:
    """What ``alone.py`` says of each id and method; two at a time."""

    def half(part: list[tuple[str, str]]) -> list[dict]:
        done = subprocess.run(
            [sys.executable, Path(__file__).parent / "alone.py", str(PATIENCE), str(16 * GIB)],
            input="\n".join(json.dumps(job_of(*job)) for job in part),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(lines) == len(part), done.stderr[-2000:]
        return lines

    parts = [jobs[::2], jobs[1::2]]
    with ThreadPoolExecutor() as threads:
        answers = list(threads.map(half, parts))
    return {job: answer for part, lines in zip(parts, answers) for job, answer in zip(part, lines)}


def said_of(id: str, answer: dict) -> str:
    """``planned``, or whose reason it is that it is not. Fails where it is nobody's."""
    assert "died" not in answer and answer["rss"] < 1.5 * GIB, (id, answer)
    if "error" not in answer:
        assert answer["peak"]["allocated"] > 0 and answer["model"]["parameters"] > 0
        return "planned"
    error = answer["error"]
    text = f"{error['message']} {error['hint']}"
    assert error["type"] == "PlanError" and error["message"] and error["hint"], (id, error)
    if NO_CLASS in text:
        return "no class"
    assert error.get("weights") or "does not accept" in text or "cannot build" in text, (id, error)
    if any(reason in text for reason in STORED):
        return "stored"
    assert any(id.startswith(start) and reason in text for start, reason in STACK.items()), (id, text)
    return "stack"


def test_a_sample_is_planned_or_refused_with_its_reason():
    jobs = [(id, method) for method, named in SAMPLE.items() for id in named.split()]
    assert len(jobs) == 40 and {id for id, _ in jobs} <= set(ids())
    found = Counter(said_of(id, answer) for (id, _), answer in run(jobs).items())
    assert found == {"planned": 32, "stored": 2, "stack": 5, "no class": 1}


@pytest.mark.slow
def test_all_are_planned_or_refused_with_their_reason():
    """Of all that transformers builds as they stand, all but what the stack itself cannot run are planned."""
    start = time.monotonic()
    answers = run([(id, method) for id in ids() for method in METHODS])
    took = time.monotonic() - start
    found = Counter((method, said_of(id, answer)) for (id, method), answer in answers.items())
    slowest = sorted((answer["cpu"], *job) for job, answer in answers.items())[-5:]
    print(found, f"{took:.0f} s", slowest)
    assert sum(count for (_, said), count in found.items() if said == "planned") >= 600
    assert slowest[-1][0] < 6 and took < 20 * 60
