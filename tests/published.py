"""The published configs of ``shared/configs`` beside the repository, and the parameter counts of its ``PARAMS.md``."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

CONFIGS = Path(os.environ.get("VRAMPLAN_SHARED", Path(__file__).parents[2] / "shared")) / "configs"
needs_configs = pytest.mark.skipif(not CONFIGS.exists(), reason="the configs are not beside the repository")


def ids() -> list[str]:
    return sorted(path.stem.replace("__", "/", 1) for path in CONFIGS.glob("*.json"))


def config_of(id: str) -> dict:
    return json.loads((CONFIGS / f"{id.replace('/', '__', 1)}.json").read_text())


def counts() -> dict[str, set[int]]:
    """By id the counts of ``PARAMS.md``: of the class that was built there, and of the one that the config names."""
    out = {}
    for line in (CONFIGS / "PARAMS.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 9 and "/" in cells[0]:
            numbers = re.findall(r"\d{1,3}(?:,\d{3})+", f"{cells[4]} {cells[6]}")
            out[cells[0]] = {int(number.replace(",", "")) for number in numbers}
    return out


REFUSED = {
    "MiniMaxAI/MiniMax-M3": "no model_type 'minimax_m3'",
    "Qwen/Qwen-7B": "no model_type 'qwen'",
    "XiaomiMiMo/MiMo-7B-Base": "no model_type 'mimo'",
    "deepseek-ai/deepseek-moe-16b-base": "no model_type 'deepseek'",
    "internlm/internlm2-7b": "no model_type 'internlm2'",
    "internlm/internlm2_5-7b-chat": "no model_type 'internlm2'",
    "microsoft/Phi-3-small-8k-instruct": "no model_type 'phi3small'",
    "microsoft/Phi-3-vision-128k-instruct": "no model_type 'phi3_v'",
    "moonshotai/Kimi-K3": "no model_type 'kimi_k3'",
    "openbmb/MiniCPM-2B-sft-bf16": "no model_type 'minicpm'",
    "sgl-project/DeepSeek-V4-Pro-FP8": "no model_type 'deepseek_ref'",
    "zai-org/chatglm3-6b": "no model_type 'chatglm'",
    "zai-org/glm-4-9b": "no model_type 'chatglm'",
    "openbmb/MiniCPM3-4B": "transformers cannot build this minicpm3 model: it lacks 'factor'",
    "poolside/Laguna-XS.2-FP8": "transformers does not accept this laguna config",
}
"""What transformers 5.17 cannot build, and what is said of it: no class for it, or one that refuses its config."""
