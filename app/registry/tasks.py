"""What a model was made for, as its config.json alone tells it.

transformers knows better, and is not always there: ``vramplan.dryrun.build.model_config`` asks it. ``tests`` hold the
two against each other.
"""

from __future__ import annotations

from typing import Any

SUFFIXES = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "masked-lm",
    "ForSpeechSeq2Seq": "speech-seq2seq",
}
"""Tasks by the end of a class's name, where the name decides."""
CAUSAL_TYPES = frozenset(
    """afmoe apertus arcee aria_text axk1 axk2 bamba bert-generation biogpt bitnet bloom blt codegen cohere cohere2
    cohere2_moe cohere_compass_text cpmant ctrl cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge
    dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text
    gemma3n_text gemma4_assistant gemma4_text gemma4_unified_assistant gemma4_unified_text glm glm4 glm4_moe
    glm4_moe_lite glm_moe_dsa gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling_text jais2 jamba jetmoe kimi_linear laguna lfm2 lfm2_moe llama
    llama4_text longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral
    ministral3 mistral mixtral modernbert-decoder moshi mpt musicgen musicgen_melody nanochat nemotron nemotron_h olmo
    olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text recurrent_gemma rwkv seed_oss smollm3 solar_open
    stablelm starcoder2 trocr vaultgemma xglm xlnet xlstm youtu zamba zamba2 zaya""".split()
)
"""The types of transformers 5.17 that are causal language models first: what a config means that names no class."""


def names_in(architectures: Any) -> list[str]:
    """The class names of a config's ``architectures``, whatever else a stranger's config may hold there."""
    return [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []


def named_tasks(architectures: Any) -> list[str]:
    """The tasks that these class names end in, in order."""
    return [task for name in names_in(architectures) for end, task in SUFFIXES.items() if name.endswith(end)]


def is_causal(config: dict[str, Any]) -> bool:
    """Whether a config is that of a causal language model."""
    named = named_tasks(config.get("architectures"))
    return named[0] == "causal-lm" if named else config.get("model_type") in CAUSAL_TYPES
