"""Published configs of 90 architectures: each is planned for every method, or refused for the stack's own reason.

Every job runs in a process of its own that is cold but for the imports (``alone.py``): full, lora and qlora with
all-linear, one sequence of 512 tokens, checkpointing on. Seconds are the processor's: the machine may be shared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from published import config_of, ids, needs_configs

pytestmark = needs_configs
ROOT = Path(__file__).parent.parent
GIB = 1 << 30
LORA = {"target_modules": "all-linear"}
METHODS = {"full": {}, "lora": {"lora": LORA}, "qlora": {"lora": LORA}}
SECONDS, MINUTES = 6.0, 20
"""What one job may take, and all of them on two cores."""
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
    "databricks/dbrx": "self (BFloat16) and source (Float) must have the same scalar type",
    "openbmb/MiniCPM3-4B": "it lacks 'factor'",
    "poolside/Laguna-XS.2-FP8": "does not accept this laguna config",
    "stepfun-ai/Step-3.7-Flash": "Could not find a `sliding_window` argument",
    "Zyphra/Zamba2-7B": "is invalid for input of size",
    "mistralai/Mamba-Codestral": "Module 'out_proj' is incompatible with Mamba-based models",
    "state-spaces/mamba": "Module 'out_proj' is incompatible with Mamba-based models",
    "nvidia/Nemotron-H": "Module 'out_proj' is incompatible with Mamba-based models",
    "nvidia/NVIDIA-Nemotron": "Module 'out_proj' is incompatible with Mamba-based models",
    "meta-llama/Llama-4-Scout": "PEFT's adapter does not fit a Llama4Router",
    "deepseek-ai/DeepSeek-V4": "PEFT's adapter does not fit a DeepseekV4GroupedLinear",
    "RedHatAI/DeepSeek-V4": "PEFT's adapter does not fit a DeepseekV4GroupedLinear",
}
"""By the beginning of an id, what the installed stack itself cannot run, and what is said of it. In ``test_stack.py``
real models of these architectures fail so; DBRX under autocast did on an H200, where softmax returns float32."""
SAMPLE = {
    "full": """albert/albert-base-v1 Qwen/Qwen2.5-VL-7B-Instruct Qwen/Qwen3-30B-A3B-FP8 deepseek-ai/DeepSeek-V3
        google/flan-t5-base google/vit-base-patch16-224-in21k openai/clip-vit-base-patch32 openai/gpt-oss-20b
        openai/whisper-tiny openbmb/MiniCPM3-4B state-spaces/mamba-130m-hf Qwen/Qwen-7B nvidia/GLM-5.1-NVFP4
        databricks/dbrx-base""",
    "lora": """answerdotai/ModernBERT-base deepseek-ai/DeepSeek-Coder-V2-Instruct google/gemma-2-2b
        mistralai/Mixtral-8x7B-v0.1 zai-org/GLM-4.5-Air""",
    "qlora": """BAAI/bge-reranker-v2-m3 CohereLabs/aya-23-8B microsoft/phi-2 llava-hf/llava-1.5-7b-hf Qwen/Qwen3-8B-FP8
        Qwen/Qwen3-Next-80B-A3B-Instruct""",
}
"""Of every kind of architecture and of refusal some."""


def job_of(id: str, method: str) -> dict:
    job = {"config": config_of(id), "method": method, **METHODS[method]}
    return {**job, "batch_size": 1, "sequence_length": 512, "gradient_checkpointing": True}


def run(jobs: list[tuple[str, str]]) -> dict[tuple[str, str], dict]:
    """What ``alone.py`` says of each id and method; the methods of an id in one process, two ids at a time."""
    by_id: dict[str, list[str]] = {}
    for id, method in jobs:
        by_id.setdefault(id, []).append(method)
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "alone.py", str(PATIENCE), str(16 * GIB), "2"],
        input="\n".join(json.dumps([job_of(id, method) for method in methods]) for id, methods in by_id.items()),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(by_id), done.stderr[-2000:]
    return {
        (id, m): answer
        for (id, methods), said in zip(by_id.items(), lines, strict=False)
        for m, answer in zip(methods, said, strict=False)
    }


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
    assert len(jobs) == 25 and {id for id, _ in jobs} <= set(ids())
    found = Counter(said_of(id, answer) for (id, _), answer in run(jobs).items())
    assert found == {"planned": 16, "stored": 2, "stack": 6, "no class": 1}


@pytest.mark.slow
def test_all_are_planned_or_refused_with_their_reason():
    """Of all that transformers builds as they stand, all but what the stack itself cannot run are planned."""
    answers = run([(id, method) for id in ids() for method in METHODS])
    found = Counter((method, said_of(id, answer)) for (id, method), answer in answers.items())
    slowest = sorted((answer["cpu"], *job) for job, answer in answers.items())[-5:]
    took = sum(answer["cpu"] for answer in answers.values())
    print(found, f"{took:.0f} s", slowest, max(answer["rss"] for answer in answers.values()) >> 20)
    assert {method: found[method, "planned"] for method in METHODS} == {"full": 223, "lora": 206, "qlora": 187}
    assert slowest[-1][0] < SECONDS and took < MINUTES * 60 * 2
