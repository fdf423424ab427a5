"""Models that people fine-tune, as the few facts of their architecture.

A row states what makes one model's architecture differ from the defaults of its
`transformers` config class: sizes, head counts, vocabulary, windows, ties, dropout.
`AutoConfig.for_model(model_type, **rest)` of these facts and the published config.json
give the same parameters, name by name and shape by shape. What no tensor depends on
(most token ids, RoPE bases, norm epsilons) is left out.

Imports nothing but the standard library: looking a model up costs no `import torch`.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Model:
    """One Hub repository: its id, its architecture and what else it is called.

    `facts` holds `model_type`, `architectures` and what differs from the defaults, to be read only.
    `parameters` counts the class `architectures[0]` names, tied weights once, as
    `transformers` builds it (no multi-token-prediction layers, no buffers).
    """

    id: str
    facts: dict[str, Any]
    parameters: int
    aliases: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        """A copy of the facts, for `transformers` writes into the dicts that it is given."""
        return copy.deepcopy(self.facts)

    @property
    def processor(self) -> dict[str, Any] | None:
        """The sizes of an image in the published preprocessor_config.json; None: those of its class and of the
        config."""
        return copy.deepcopy(PROCESSORS.get(self.facts["model_type"]))

    @property
    def source(self) -> str:
        """The published file that the facts are to be checked against."""
        return f"{self.id}/config.json"


_TWO_QWENS = {"min_pixels": 3136, "max_pixels": 12845056}
_LATER_QWENS = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
PROCESSORS = {
    "qwen2_vl": _TWO_QWENS,
    "qwen2_5_vl": _TWO_QWENS,
    "qwen3_vl": _LATER_QWENS,
    "qwen3_5": _LATER_QWENS,
    "qwen3_5_moe": _LATER_QWENS,
}
"""The sizes of an image in the published preprocessor_config.json, by model type, where its class has others."""

Row = Callable[..., list[Model]]

# The columns of the tables below. A column may set several fields.
DECODER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "vocab_size", "max_position_embeddings")  # fmt: skip
ENCODER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "vocab_size", "max_position_embeddings")  # fmt: skip
VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
GPT2 = ("n_embd", "n_layer", "n_head")
BLOOM = ("hidden_size", "n_layer", "n_head", "vocab_size")
FALCON = ("hidden_size", "num_hidden_layers", "num_attention_heads")
OPT = ("hidden_size word_embed_proj_dim", "ffn_dim", "num_hidden_layers", "num_attention_heads")
T5 = ("d_model", "d_ff", "num_layers num_decoder_layers", "num_heads", "d_kv")
WHISPER = ("d_model", "encoder_ffn_dim decoder_ffn_dim", "encoder_attention_heads decoder_attention_heads",
           "encoder_layers num_hidden_layers", "decoder_layers")  # fmt: skip
MAMBA = ("hidden_size", "num_hidden_layers", "vocab_size")


def _columns(columns: tuple[str, ...], values: tuple[int, ...]) -> dict[str, int]:
    """Spread a row's numbers over the config fields of its columns."""
    return {field: value for names, value in zip(columns, values, strict=True) for field in names.split()}


def _family(model_type: str, architecture: str, columns: tuple[str, ...] = DECODER, **common: Any) -> Row:
    """Return the function that writes one row of a family.

    `ids` are repositories that share every fact; `aliases` belong to the first of them, and each
    id is also known without its owner.
    """

    def row(ids: str, parameters: int, values: tuple[int, ...] = (), aliases: str = "", **own: Any) -> list[Model]:
        sizes = _columns(columns, values) if values else {}
        facts = {"model_type": model_type, "architectures": [architecture], **sizes, **common, **own}
        return [
            Model(id, facts, parameters, (_short(id), *(aliases.split() if i == 0 else ())))
            for i, id in enumerate(ids.split())
        ]

    return row


def _short(id: str) -> str:
    return id.split("/")[-1].lower()


def _text(*values: int, **facts: Any) -> dict[str, Any]:
    """The text half of a vision-language model."""
    return {**_columns(DECODER, values), **facts}


llama = _family("llama", "LlamaForCausalLM")
mistral = _family("mistral", "MistralForCausalLM")
mixtral = _family("mixtral", "MixtralForCausalLM", sliding_window=None)
qwen2 = _family("qwen2", "Qwen2ForCausalLM")
qwen2_moe = _family("qwen2_moe", "Qwen2MoeForCausalLM")
qwen3 = _family("qwen3", "Qwen3ForCausalLM", head_dim=128)
qwen3_moe = _family("qwen3_moe", "Qwen3MoeForCausalLM", head_dim=128, num_experts=128,
                    norm_topk_prob=True)  # fmt: skip
qwen3_5 = _family("qwen3_5", "Qwen3_5ForConditionalGeneration", ())
qwen3_5_moe = _family("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", ())
qwen2_vl = _family("qwen2_vl", "Qwen2VLForConditionalGeneration", ())
qwen2_5_vl = _family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", ())
qwen3_vl = _family("qwen3_vl", "Qwen3VLForConditionalGeneration", ())
mllama = _family("mllama", "MllamaForConditionalGeneration", ())
llava = _family("llava", "LlavaForConditionalGeneration", ())
gemma = _family("gemma", "GemmaForCausalLM", head_dim=256)
gemma2 = _family("gemma2", "Gemma2ForCausalLM")
gemma3_text = _family("gemma3_text", "Gemma3ForCausalLM", head_dim=256, sliding_window=512)
gemma3 = _family("gemma3", "Gemma3ForConditionalGeneration", ())
phi = _family("phi", "PhiForCausalLM")
phi3 = _family("phi3", "Phi3ForCausalLM")
deepseek_v2 = _family("deepseek_v2", "DeepseekV2ForCausalLM")
deepseek_v3 = _family("deepseek_v3", "DeepseekV3ForCausalLM")
smollm3 = _family("smollm3", "SmolLM3ForCausalLM")
gpt_oss = _family("gpt_oss", "GptOssForCausalLM", head_dim=64, sliding_window=128)
olmo2 = _family("olmo2", "Olmo2ForCausalLM")
olmo3 = _family("olmo3", "Olmo3ForCausalLM", sliding_window=4096)
granite = _family("granite", "GraniteForCausalLM")
cohere = _family("cohere", "CohereForCausalLM")
stablelm = _family("stablelm", "StableLmForCausalLM", partial_rotary_factor=0.25)
starcoder2 = _family("starcoder2", "Starcoder2ForCausalLM", sliding_window=4096,
                     attention_dropout=0.1, residual_dropout=0.1, embedding_dropout=0.1,
                     bos_token_id=0, eos_token_id=0)  # fmt: skip
glm4_moe = _family("glm4_moe", "Glm4MoeForCausalLM")
gpt2 = _family("gpt2", "GPT2LMHeadModel", GPT2)
gpt_neox = _family("gpt_neox", "GPTNeoXForCausalLM", ENCODER)
gptj = _family("gptj", "GPTJForCausalLM", GPT2)
opt = _family("opt", "OPTForCausalLM", OPT)
bloom = _family("bloom", "BloomForCausalLM", BLOOM)
falcon = _family("falcon", "FalconForCausalLM", FALCON)
mamba = _family("mamba", "MambaForCausalLM", MAMBA)
mamba2 = _family("mamba2", "Mamba2ForCausalLM", MAMBA)
bert = _family("bert", "BertForMaskedLM", ENCODER)
distilbert = _family("distilbert", "DistilBertForMaskedLM",
                     ("dim", "hidden_dim", "n_layers", "n_heads", "vocab_size", "max_position_embeddings"))  # fmt: skip
roberta = _family("roberta", "RobertaForMaskedLM", ENCODER, type_vocab_size=1)
xlm_roberta = _family("xlm-roberta", "XLMRobertaForMaskedLM", ENCODER, type_vocab_size=1)
modernbert = _family("modernbert", "ModernBertForMaskedLM", ENCODER, classifier_pooling="mean")
# The published files name no architecture; AutoModel is what loads them.
deberta_v3 = _family("deberta-v2", "DebertaV2Model", ENCODER, position_buckets=256, relative_attention=True,
                     share_att_key=True, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
                     position_biased_input=False)  # fmt: skip
t5 = _family("t5", "T5ForConditionalGeneration", T5, decoder_start_token_id=0)
flan_t5 = _family("t5", "T5ForConditionalGeneration", T5, decoder_start_token_id=0,
                  feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # fmt: skip
vit = _family("vit", "ViTModel", VISION)
whisper = _family("whisper", "WhisperForConditionalGeneration", WHISPER)

# Qwen2 and later publish a window and turn it off (`use_sliding_window`): both are left out.
TIED = {"tie_word_embeddings": True}
NO_WINDOW = {"sliding_window": None}
# Which of the two lists serves is decided in each forward pass; what the factors are sizes nothing.
LONGROPE = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 32.0,
                                "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}}  # fmt: skip
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
          "image_size": 896, "patch_size": 14, "vision_use_head": False}  # fmt: skip

# fmt: off
_FAMILIES: tuple[list[Model], ...] = (
    # Llama: hidden, intermediate, layers, heads, key-value heads, vocabulary, positions
    llama("huggyllama/llama-7b", 6_738_415_616, (4096, 11008, 32, 32, 32, 32000, 2048)),
    llama("huggyllama/llama-13b", 13_015_864_320, (5120, 13824, 40, 40, 40, 32000, 2048)),
    llama("huggyllama/llama-30b", 32_528_943_616, (6656, 17920, 60, 52, 52, 32000, 2048)),
    llama("huggyllama/llama-65b", 65_285_660_672, (8192, 22016, 80, 64, 64, 32000, 2048)),
    llama("meta-llama/Llama-2-7b-hf meta-llama/Llama-2-7b-chat-hf", 6_738_415_616,
          (4096, 11008, 32, 32, 32, 32000, 4096), "llama-2-7b llama2-7b"),
    llama("meta-llama/Llama-2-13b-hf meta-llama/Llama-2-13b-chat-hf", 13_015_864_320,
          (5120, 13824, 40, 40, 40, 32000, 4096), "llama-2-13b llama2-13b"),
    llama("meta-llama/Llama-2-70b-hf meta-llama/Llama-2-70b-chat-hf", 68_976_648_192,
          (8192, 28672, 80, 64, 8, 32000, 4096), "llama-2-70b llama2-70b"),
    llama("codellama/CodeLlama-7b-hf codellama/CodeLlama-7b-Instruct-hf", 6_738_546_688,
          (4096, 11008, 32, 32, 32, 32016, 16384), "codellama-7b"),
    llama("codellama/CodeLlama-13b-hf codellama/CodeLlama-13b-Instruct-hf", 13_016_028_160,
          (5120, 13824, 40, 40, 40, 32016, 16384), "codellama-13b"),
    llama("codellama/CodeLlama-34b-hf", 33_743_970_304, (8192, 22016, 48, 64, 8, 32000, 16384), "codellama-34b"),
    llama("meta-llama/Meta-Llama-3-8B meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248,
          (4096, 14336, 32, 32, 8, 128256, 8192), "llama-3-8b llama3-8b"),
    llama("meta-llama/Meta-Llama-3-70B meta-llama/Meta-Llama-3-70B-Instruct", 70_553_706_496,
          (8192, 28672, 80, 64, 8, 128256, 8192), "llama-3-70b llama3-70b"),
    llama("meta-llama/Llama-3.1-8B meta-llama/Llama-3.1-8B-Instruct deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
          8_030_261_248, (4096, 14336, 32, 32, 8, 128256, 131072), "meta-llama-3.1-8b llama3.1-8b 8b"),
    llama("meta-llama/Llama-3.1-70B meta-llama/Llama-3.1-70B-Instruct meta-llama/Llama-3.3-70B-Instruct "
          "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
          70_553_706_496, (8192, 28672, 80, 64, 8, 128256, 131072), "meta-llama-3.1-70b llama3.1-70b 70b"),
    llama("meta-llama/Llama-3.1-405B meta-llama/Llama-3.1-405B-Instruct", 405_853_388_800,
          (16384, 53248, 126, 128, 8, 128256, 131072), "meta-llama-3.1-405b llama3.1-405b 405b"),
    llama("meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400,
          (2048, 8192, 16, 32, 8, 128256, 131072), "llama3.2-1b 1b", head_dim=64, **TIED),
    llama("meta-llama/Llama-3.2-3B meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824,
          (3072, 8192, 28, 24, 8, 128256, 131072), "llama3.2-3b 3b", **TIED),
    mllama("meta-llama/Llama-3.2-11B-Vision meta-llama/Llama-3.2-11B-Vision-Instruct", 10_670_220_835,
           aliases="llama3.2-11b-vision 11b", vision_config={"image_size": 560}),
    llama("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384, (2048, 5632, 22, 32, 4, 32000, 2048),
          "tinyllama tinyllama-1.1b"),
    llama("01-ai/Yi-6B 01-ai/Yi-6B-Chat", 6_061_035_520, (4096, 11008, 32, 32, 4, 64000, 4096)),
    llama("01-ai/Yi-1.5-9B 01-ai/Yi-1.5-9B-Chat", 8_829_407_232, (4096, 11008, 48, 32, 4, 64000, 4096), "yi-9b"),
    llama("01-ai/Yi-34B", 34_388_917_248, (7168, 20480, 60, 56, 8, 64000, 4096), use_cache=False),
    llama("HuggingFaceTB/SmolLM-135M", 134_515_008, (576, 1536, 30, 9, 3, 49152, 2048), **TIED),
    llama("HuggingFaceTB/SmolLM-360M", 361_821_120, (960, 2560, 32, 15, 5, 49152, 2048), **TIED),
    llama("HuggingFaceTB/SmolLM-1.7B", 1_711_376_384, (2048, 8192, 24, 32, 32, 49152, 2048), **TIED),
    llama("HuggingFaceTB/SmolLM2-135M HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008,
          (576, 1536, 30, 9, 3, 49152, 8192), **TIED),
    llama("HuggingFaceTB/SmolLM2-360M HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120,
          (960, 2560, 32, 15, 5, 49152, 8192), **TIED),
    llama("HuggingFaceTB/SmolLM2-1.7B HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384,
          (2048, 8192, 24, 32, 32, 49152, 8192), **TIED),
    smollm3("HuggingFaceTB/SmolLM3-3B", 3_075_098_624, (2048, 11008, 36, 16, 4, 128256, 65536), "smollm3"),
    llava("llava-hf/llava-1.5-7b-hf", 7_063_427_072, aliases="llava-1.5-7b llava",
          text_config={"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}),

    # Mistral
    mistral("mistralai/Mistral-7B-v0.1 mistralai/Mistral-7B-Instruct-v0.1 HuggingFaceH4/zephyr-7b-beta",
            7_241_732_096, (4096, 14336, 32, 32, 8, 32000, 32768), sliding_window=4096),
    mistral("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096, (4096, 14336, 32, 32, 8, 32000, 32768), **NO_WINDOW),
    mistral("mistralai/Mistral-7B-v0.3 mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552,
            (4096, 14336, 32, 32, 8, 32768, 32768), "mistral-7b", **NO_WINDOW),
    mistral("mistralai/Ministral-8B-Instruct-2410", 8_019_808_256, (4096, 12288, 36, 32, 8, 131072, 32768),
            "ministral-8b", head_dim=128, sliding_window=32768),
    mistral("mistralai/Mistral-Nemo-Base-2407 mistralai/Mistral-Nemo-Instruct-2407", 12_247_782_400,
            (5120, 14336, 40, 32, 8, 131072, 131072), "mistral-nemo nemo-12b", head_dim=128, **NO_WINDOW),
    mistral("mistralai/Mistral-Small-24B-Base-2501 mistralai/Mistral-Small-24B-Instruct-2501", 23_572_403_200,
            (5120, 32768, 40, 32, 8, 131072, 32768), "mistral-small mistral-small-24b 24b",
            head_dim=128, **NO_WINDOW),
    mistral("mistralai/Mistral-Large-Instruct-2407", 122_610_069_504, (12288, 28672, 88, 96, 8, 32768, 131072),
            "mistral-large", **NO_WINDOW),
    mixtral("mistralai/Mixtral-8x7B-v0.1 mistralai/Mixtral-8x7B-Instruct-v0.1", 46_702_792_704,
            (4096, 14336, 32, 32, 8, 32000, 32768), "mixtral-8x7b mixtral 8x7b"),
    mixtral("mistralai/Mixtral-8x22B-v0.1", 140_620_634_112, (6144, 16384, 56, 48, 8, 32000, 65536),
            "mixtral-8x22b 8x22b"),

    # Qwen
    qwen2_moe("Qwen/Qwen1.5-MoE-A2.7B", 14_315_784_192, (2048, 5632, 24, 16, 16, 151936, 32768)),
    qwen2("Qwen/Qwen2-0.5B", 494_032_768, (896, 4864, 24, 14, 2, 151936, 131072), **TIED),
    qwen2("Qwen/Qwen2-1.5B", 1_543_714_304, (1536, 8960, 28, 12, 2, 151936, 131072), **TIED),
    qwen2("Qwen/Qwen2-7B", 7_615_616_512, (3584, 18944, 28, 28, 4, 152064, 131072)),
    qwen2("Qwen/Qwen2-72B", 72_706_203_648, (8192, 29568, 80, 64, 8, 152064, 131072)),
    qwen2("Qwen/Qwen2-0.5B-Instruct", 494_032_768, (896, 4864, 24, 14, 2, 151936, 32768), **TIED),
    qwen2("Qwen/Qwen2-1.5B-Instruct", 1_543_714_304, (1536, 8960, 28, 12, 2, 151936, 32768), **TIED),
    qwen2("Qwen/Qwen2-7B-Instruct", 7_615_616_512, (3584, 18944, 28, 28, 4, 152064, 32768)),
    qwen2("Qwen/Qwen2-72B-Instruct", 72_706_203_648, (8192, 29568, 80, 64, 8, 152064, 32768)),
    qwen2("Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-0.5B-Instruct", 494_032_768,
          (896, 4864, 24, 14, 2, 151936, 32768), "0.5b", **TIED),
    qwen2("Qwen/Qwen2.5-1.5B", 1_543_714_304, (1536, 8960, 28, 12, 2, 151936, 131072), "1.5b", **TIED),
    qwen2("Qwen/Qwen2.5-3B Qwen/Qwen2.5-3B-Instruct", 3_085_938_688,
          (2048, 11008, 36, 16, 2, 151936, 32768), **TIED),
    qwen2("Qwen/Qwen2.5-7B", 7_615_616_512, (3584, 18944, 28, 28, 4, 152064, 131072)),
    qwen2("Qwen/Qwen2.5-14B", 14_770_033_664, (5120, 13824, 48, 40, 8, 152064, 131072)),
    qwen2("Qwen/Qwen2.5-32B", 32_763_876_352, (5120, 27648, 64, 40, 8, 152064, 131072)),
    qwen2("Qwen/Qwen2.5-72B", 72_706_203_648, (8192, 29568, 80, 64, 8, 152064, 131072), "72b"),
    qwen2("Qwen/Qwen2.5-1.5B-Instruct Qwen/Qwen2.5-Coder-1.5B Qwen/Qwen2.5-Coder-1.5B-Instruct", 1_543_714_304,
          (1536, 8960, 28, 12, 2, 151936, 32768), **TIED),
    qwen2("Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-Coder-7B Qwen/Qwen2.5-Coder-7B-Instruct", 7_615_616_512,
          (3584, 18944, 28, 28, 4, 152064, 32768)),
    qwen2("Qwen/Qwen2.5-14B-Instruct Qwen/Qwen2.5-Coder-14B Qwen/Qwen2.5-Coder-14B-Instruct", 14_770_033_664,
          (5120, 13824, 48, 40, 8, 152064, 32768)),
    qwen2("Qwen/Qwen2.5-32B-Instruct Qwen/Qwen2.5-Coder-32B Qwen/Qwen2.5-Coder-32B-Instruct", 32_763_876_352,
          (5120, 27648, 64, 40, 8, 152064, 32768)),
    qwen2("Qwen/Qwen2.5-72B-Instruct", 72_706_203_648, (8192, 29568, 80, 64, 8, 152064, 32768)),
    qwen2("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000, (1536, 8960, 28, 12, 2, 151936, 131072)),
    qwen2("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512, (3584, 18944, 28, 28, 4, 152064, 131072)),
    qwen2("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", 14_770_033_664, (5120, 13824, 48, 40, 8, 152064, 131072)),
    qwen2("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", 32_763_876_352, (5120, 27648, 64, 40, 8, 152064, 131072)),
    qwen3("Qwen/Qwen3-0.6B", 596_049_920, (1024, 3072, 28, 16, 8, 151936, 40960), "0.6b", **TIED),
    qwen3("Qwen/Qwen3-1.7B", 1_720_574_976, (2048, 6144, 28, 16, 8, 151936, 40960), "1.7b", **TIED),
    qwen3("Qwen/Qwen3-4B", 4_022_468_096, (2560, 9728, 36, 32, 8, 151936, 40960), "4b", **TIED),
    qwen3("Qwen/Qwen3-4B-Instruct-2507 Qwen/Qwen3-4B-Thinking-2507", 4_022_468_096,
          (2560, 9728, 36, 32, 8, 151936, 262144), **TIED),
    qwen3("Qwen/Qwen3-8B", 8_190_735_360, (4096, 12288, 36, 32, 8, 151936, 40960)),
    qwen3("Qwen/Qwen3-14B", 14_768_307_200, (5120, 17408, 40, 40, 8, 151936, 40960), "14b"),
    qwen3("Qwen/Qwen3-32B", 32_762_123_264, (5120, 25600, 64, 64, 8, 151936, 40960), "32b"),
    qwen3("Qwen/Qwen3-Embedding-8B", 8_188_515_328, (4096, 12288, 36, 32, 8, 151665, 40960)),
    qwen3("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", 8_190_735_360, (4096, 12288, 36, 32, 8, 151936, 131072)),
    qwen3_moe("Qwen/Qwen3-30B-A3B", 30_532_122_624, (2048, 6144, 48, 32, 4, 151936, 40960), "30b-a3b",
              moe_intermediate_size=768),
    qwen3_moe("Qwen/Qwen3-30B-A3B-Instruct-2507 Qwen/Qwen3-30B-A3B-Thinking-2507", 30_532_122_624,
              (2048, 6144, 48, 32, 4, 151936, 262144), moe_intermediate_size=768),
    qwen3_moe("Qwen/Qwen3-235B-A22B", 235_093_634_560, (4096, 12288, 94, 64, 4, 151936, 40960), "235b-a22b",
              moe_intermediate_size=1536),
    qwen3_5("Qwen/Qwen3.6-27B", 27_356_728_560, aliases="qwen3.6",
            text_config=_text(5120, 17408, 64, 24, 4, 248320, 262144, linear_num_value_heads=48),
            vision_config={"out_hidden_size": 5120}),
    qwen3_5_moe("Qwen/Qwen3.5-35B-A3B", 35_107_181_936, aliases="35b-a3b",
                text_config={"max_position_embeddings": 262144}, vision_config={"out_hidden_size": 2048}),
    qwen3_5_moe("Qwen/Qwen3.5-122B-A10B", 122_562_817_776, aliases="122b-a10b",
                text_config={"hidden_size": 3072, "num_hidden_layers": 48, "num_attention_heads": 32,
                             "linear_num_value_heads": 64, "moe_intermediate_size": 1024,
                             "shared_expert_intermediate_size": 1024, "max_position_embeddings": 262144},
                vision_config={"out_hidden_size": 3072}),
    qwen2_vl("Qwen/Qwen2-VL-2B-Instruct", 2_208_985_600, aliases="qwen2-vl-2b", **TIED,
             text_config=_text(1536, 8960, 28, 12, 2, 151936, 32768), vision_config={"hidden_size": 1536}),
    qwen2_vl("Qwen/Qwen2-VL-7B-Instruct", 8_291_375_616, aliases="qwen2-vl-7b",
             text_config=_text(3584, 18944, 28, 28, 4, 152064, 32768)),
    qwen2_5_vl("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656, aliases="qwen2.5-vl-7b",
               text_config=_text(3584, 18944, 28, 28, 4, 152064, 128000), vision_config={"hidden_size": 1280}),
    qwen3_vl("Qwen/Qwen3-VL-2B-Instruct", 2_127_532_032, aliases="qwen3-vl-2b", **TIED,
             text_config=_text(2048, 6144, 28, 16, 8, 151936, 262144),
             vision_config={"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048,
                            "deepstack_visual_indexes": [5, 11, 17]}),
    qwen3_vl("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696, aliases="qwen3-vl-8b",
             text_config=_text(4096, 12288, 36, 32, 8, 151936, 262144), vision_config={"out_hidden_size": 4096}),
    qwen3_vl("Qwen/Qwen3-VL-32B-Instruct Qwen/Qwen3-VL-32B-Thinking", 33_357_390_064, aliases="qwen3-vl-32b",
             text_config=_text(5120, 25600, 64, 64, 8, 151936, 262144), vision_config={"out_hidden_size": 5120}),

    # Gemma
    gemma("google/gemma-2b google/gemma-2b-it", 2_506_172_416, (2048, 16384, 18, 8, 1, 256000, 8192)),
    gemma("google/gemma-7b google/gemma-7b-it", 8_537_680_896, (3072, 24576, 28, 16, 16, 256000, 8192),
          hidden_act="gelu"),
    gemma2("google/gemma-2-2b google/gemma-2-2b-it", 2_614_341_888, (2304, 9216, 26, 8, 4, 256000, 8192),
           "gemma2-2b 2b", head_dim=256),
    gemma2("google/gemma-2-9b google/gemma-2-9b-it", 9_241_705_984, (3584, 14336, 42, 16, 8, 256000, 8192),
           "gemma2-9b 9b", head_dim=256),
    gemma2("google/gemma-2-27b google/gemma-2-27b-it", 27_227_128_320, (4608, 36864, 46, 32, 16, 256000, 8192),
           "gemma2-27b", head_dim=128, query_pre_attn_scalar=144),
    gemma3_text("google/gemma-3-270m google/gemma-3-270m-it", 268_098_176, (640, 2048, 18, 4, 1, 262144, 32768),
                "gemma3-270m"),
    gemma3_text("google/gemma-3-1b-pt google/gemma-3-1b-it", 999_885_952, (1152, 6912, 26, 4, 1, 262144, 32768),
                "gemma-3-1b gemma3-1b"),
    gemma3("google/gemma-3-4b-pt google/gemma-3-4b-it", 4_300_079_472, aliases="gemma-3-4b gemma3-4b",
           text_config=_text(2560, 10240, 34, 8, 4, 262208, 131072, sliding_window=1024), vision_config=SIGLIP),
    gemma3("google/gemma-3-12b-pt google/gemma-3-12b-it", 12_187_325_040, aliases="gemma-3-12b gemma3-12b 12b",
           text_config=_text(3840, 15360, 48, 16, 8, 262208, 131072, sliding_window=1024), vision_config=SIGLIP),
    gemma3("google/gemma-3-27b-pt google/gemma-3-27b-it", 27_432_406_640, aliases="gemma-3-27b gemma3-27b 27b",
           text_config=_text(5376, 21504, 62, 32, 16, 262208, 131072, sliding_window=1024, head_dim=128,
                             query_pre_attn_scalar=168), vision_config=SIGLIP),

    # Phi
    phi("microsoft/phi-1_5", 1_418_270_720, (2048, 8192, 24, 32, 32, 51200, 2048), partial_rotary_factor=0.5),
    phi("microsoft/phi-2", 2_779_683_840, (2560, 10240, 32, 32, 32, 51200, 2048), partial_rotary_factor=0.4,
        resid_pdrop=0.1),
    phi3("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, (3072, 8192, 32, 32, 32, 32064, 4096), "phi-3-mini",
         sliding_window=2047),
    phi3("microsoft/Phi-3-mini-128k-instruct microsoft/Phi-3.5-mini-instruct", 3_821_079_552,
         (3072, 8192, 32, 32, 32, 32064, 131072), sliding_window=262144, **LONGROPE),
    phi3("microsoft/Phi-3-medium-4k-instruct", 13_960_238_080, (5120, 17920, 40, 40, 10, 32064, 4096),
         "phi-3-medium", sliding_window=2047),
    phi3("microsoft/Phi-4-mini-instruct", 3_836_021_760, (3072, 8192, 32, 24, 8, 200064, 131072), "phi-4-mini",
         partial_rotary_factor=0.75, sliding_window=262144, **TIED, **LONGROPE),
    phi3("microsoft/phi-4", 14_659_507_200, (5120, 17920, 40, 40, 10, 100352, 16384), **NO_WINDOW),

    # DeepSeek
    deepseek_v2("deepseek-ai/DeepSeek-V2-Lite deepseek-ai/DeepSeek-V2-Lite-Chat", 15_706_484_224,
                (2048, 10944, 27, 16, 16, 102400, 163840), q_lora_rank=None, moe_intermediate_size=1408,
                first_k_dense_replace=1, num_experts_per_tok=6, n_group=1, topk_group=1),
    deepseek_v3("deepseek-ai/DeepSeek-V3 deepseek-ai/DeepSeek-R1 deepseek-ai/DeepSeek-V3.1", 671_026_404_352,
                (7168, 18432, 61, 128, 128, 129280, 163840), "671b"),

    # OpenAI's open models
    gpt_oss("openai/gpt-oss-20b", 20_914_757_184, (2880, 2880, 24, 64, 8, 201088, 131072), "20b",
            num_local_experts=32, layer_types=["sliding_attention", "full_attention"] * 12),
    gpt_oss("openai/gpt-oss-120b", 116_829_156_672, (2880, 2880, 36, 64, 8, 201088, 131072), "120b",
            num_local_experts=128, layer_types=["sliding_attention", "full_attention"] * 18),

    # OLMo, Granite, Command, StableLM, StarCoder, GLM
    olmo2("allenai/OLMo-2-0425-1B", 1_484_916_736, (2048, 8192, 16, 16, 16, 100352, 4096), "olmo2-1b"),
    olmo2("allenai/OLMo-2-1124-7B", 7_298_617_344, (4096, 11008, 32, 32, 32, 100352, 4096), "olmo2-7b"),
    olmo2("allenai/OLMo-2-1124-13B", 13_716_198_400, (5120, 13824, 40, 40, 40, 100352, 4096), "olmo2-13b"),
    olmo2("allenai/OLMo-2-0325-32B", 32_234_279_936, (5120, 27648, 64, 40, 8, 100352, 4096), "olmo2-32b"),
    olmo3("allenai/Olmo-3-1025-7B", 7_298_011_136, (4096, 11008, 32, 32, 32, 100278, 8192), "olmo3-7b"),
    olmo3("allenai/Olmo-3.1-32B-Instruct", 32_233_522_176, (5120, 27648, 64, 40, 8, 100278, 65536), "olmo3-32b",
          use_cache=False),
    granite("ibm-granite/granite-3.3-8b-instruct", 8_170_864_640, (4096, 12800, 40, 32, 8, 49159, 131072),
            "granite-3.3-8b", attention_multiplier=1 / 128, embedding_multiplier=12.0, logits_scaling=16.0,
            residual_multiplier=0.22, **TIED),
    cohere("CohereLabs/aya-23-8B", 8_028_033_024, (4096, 14336, 32, 32, 8, 256000, 8192)),
    cohere("CohereLabs/c4ai-command-r-v01", 34_980_831_232, (8192, 22528, 40, 64, 64, 256000, 131072), "command-r"),
    cohere("CohereLabs/c4ai-command-r-plus", 103_810_674_688, (12288, 33792, 64, 96, 8, 256000, 131072),
           "command-r-plus", use_qk_norm=True),
    stablelm("stabilityai/stablelm-2-zephyr-1_6b", 1_644_515_328, (2048, 5632, 24, 32, 32, 100352, 4096),
             use_qkv_bias=True),
    stablelm("stabilityai/stablelm-3b-4e1t", 2_795_443_200, (2560, 6912, 32, 32, 32, 50304, 4096)),
    starcoder2("bigcode/starcoder2-3b", 3_030_371_328, (3072, 12288, 30, 24, 2, 49152, 16384)),
    starcoder2("bigcode/starcoder2-7b", 7_173_923_840, (4608, 18432, 32, 36, 4, 49152, 16384)),
    starcoder2("bigcode/starcoder2-15b", 15_957_889_024, (6144, 24576, 40, 48, 4, 49152, 16384),
               tie_word_embeddings=False),
    glm4_moe("zai-org/GLM-4.5-Air", 106_852_245_504, (4096, 10944, 46, 96, 8, 151552, 131072), "glm-4.5-air",
             attention_bias=True, head_dim=128, partial_rotary_factor=0.5),

    # GPT-2 and GPT-J: width, layers, heads
    gpt2("openai-community/gpt2", 124_439_808, (768, 12, 12), "gpt2-small"),
    gpt2("openai-community/gpt2-medium", 354_823_168, (1024, 24, 16)),
    gpt2("openai-community/gpt2-large", 774_030_080, (1280, 36, 20)),
    gpt2("openai-community/gpt2-xl", 1_557_611_200, (1600, 48, 25)),
    gpt2("distilbert/distilgpt2", 81_912_576, (768, 6, 12)),
    gptj("EleutherAI/gpt-j-6b", 6_050_882_784, (4096, 28, 16), "gpt-j"),

    # GPT-NeoX: hidden, intermediate, layers, heads, vocabulary, positions
    gpt_neox("EleutherAI/pythia-70m", 70_426_624, (512, 2048, 6, 8, 50304, 2048)),
    gpt_neox("EleutherAI/pythia-160m", 162_322_944, (768, 3072, 12, 12, 50304, 2048)),
    gpt_neox("EleutherAI/pythia-410m", 405_334_016, (1024, 4096, 24, 16, 50304, 2048)),
    gpt_neox("EleutherAI/pythia-1b", 1_011_781_632, (2048, 8192, 16, 8, 50304, 2048)),
    gpt_neox("EleutherAI/pythia-1.4b", 1_414_647_808, (2048, 8192, 24, 16, 50304, 2048)),
    gpt_neox("EleutherAI/pythia-2.8b", 2_775_208_960, (2560, 10240, 32, 32, 50304, 2048)),
    gpt_neox("EleutherAI/pythia-6.9b", 6_857_302_016, (4096, 16384, 32, 32, 50432, 2048)),
    gpt_neox("EleutherAI/pythia-12b", 11_846_072_320, (5120, 20480, 36, 40, 50688, 2048)),
    gpt_neox("EleutherAI/gpt-neox-20b", 20_554_567_680, (6144, 24576, 44, 64, 50432, 2048), "gpt-neox",
             hidden_act="gelu_fast"),

    # OPT: hidden, feed-forward, layers, heads
    opt("facebook/opt-125m", 125_239_296, (768, 3072, 12, 12)),
    opt("facebook/opt-350m", 331_196_416, (1024, 4096, 24, 16), word_embed_proj_dim=512,
        do_layer_norm_before=False),
    opt("facebook/opt-1.3b", 1_315_758_080, (2048, 8192, 24, 32)),
    opt("facebook/opt-2.7b", 2_651_596_800, (2560, 10240, 32, 32)),
    opt("facebook/opt-6.7b", 6_658_473_984, (4096, 16384, 32, 32)),
    opt("facebook/opt-13b", 12_853_473_280, (5120, 20480, 40, 40)),
    opt("facebook/opt-30b", 29_974_540_288, (7168, 28672, 48, 56)),
    opt("facebook/opt-66b", 65_719_701_504, (9216, 36864, 64, 72)),

    # BLOOM: hidden, layers, heads, vocabulary. Falcon: hidden, layers, heads
    bloom("bigscience/bloom-560m", 559_214_592, (1024, 24, 16, 250880)),
    bloom("bigscience/bloom-1b1", 1_065_314_304, (1536, 24, 16, 250880)),
    bloom("bigscience/bloom-3b", 3_002_557_440, (2560, 30, 32, 250880)),
    bloom("bigscience/bloom", 176_247_271_424, (14336, 70, 112, 250880)),
    falcon("tiiuae/falcon-7b tiiuae/falcon-7b-instruct", 6_921_720_704, (4544, 32, 71)),
    falcon("tiiuae/falcon-40b tiiuae/falcon-40b-instruct", 41_303_293_952, (8192, 60, 128),
           new_decoder_architecture=True, num_kv_heads=8),

    # Mamba: hidden, layers, vocabulary
    mamba("state-spaces/mamba-130m-hf", 129_135_360, (768, 24, 50280), "mamba-130m"),
    mamba("state-spaces/mamba-370m-hf", 371_516_416, (1024, 48, 50280), "mamba-370m"),
    mamba("state-spaces/mamba-790m-hf", 793_204_224, (1536, 48, 50280), "mamba-790m"),
    mamba("state-spaces/mamba-1.4b-hf", 1_372_178_432, (2048, 48, 50280), "mamba-1.4b"),
    mamba("state-spaces/mamba-2.8b-hf", 2_768_345_600, (2560, 64, 50280), "mamba-2.8b"),
    mamba2("state-spaces/mamba2-2.7b-hf", 2_702_599_680, (2560, 64, 50288), "mamba2-2.7b", num_heads=80, n_groups=1,
           **TIED),
    mamba2("mistralai/Mamba-Codestral-7B-v0.1", 7_285_403_648, (4096, 64, 32768), "mamba-codestral", num_heads=128,
           n_groups=8),

    # Encoders: hidden, intermediate, layers, heads, vocabulary, positions
    bert("google-bert/bert-base-uncased", 109_514_298, (768, 3072, 12, 12, 30522, 512), "bert-base bert"),
    bert("google-bert/bert-large-uncased", 335_174_458, (1024, 4096, 24, 16, 30522, 512), "bert-large"),
    bert("google-bert/bert-base-cased", 108_340_804, (768, 3072, 12, 12, 28996, 512)),
    bert("google-bert/bert-base-multilingual-cased", 177_974_523, (768, 3072, 12, 12, 119547, 512)),
    bert("BAAI/bge-large-en", 335_141_888, (1024, 4096, 24, 16, 30522, 512), architectures=["BertModel"]),
    distilbert("distilbert/distilbert-base-uncased", 66_985_530, (768, 3072, 6, 12, 30522, 512), "distilbert"),
    roberta("FacebookAI/roberta-base", 124_697_433, (768, 3072, 12, 12, 50265, 514), "roberta"),
    roberta("FacebookAI/roberta-large sentence-transformers/all-roberta-large-v1", 355_412_057,
            (1024, 4096, 24, 16, 50265, 514)),
    xlm_roberta("FacebookAI/xlm-roberta-base", 278_295_186, (768, 3072, 12, 12, 250002, 514)),
    xlm_roberta("FacebookAI/xlm-roberta-large", 560_142_482, (1024, 4096, 24, 16, 250002, 514)),
    xlm_roberta("intfloat/multilingual-e5-large", 559_890_432, (1024, 4096, 24, 16, 250002, 514),
                architectures=["XLMRobertaModel"]),
    xlm_roberta("BAAI/bge-reranker-v2-m3", 567_755_777, (1024, 4096, 24, 16, 250002, 8194),
                architectures=["XLMRobertaForSequenceClassification"], num_labels=1),
    modernbert("answerdotai/ModernBERT-base", 149_655_232, (768, 1152, 22, 12, 50368, 8192), "modernbert"),
    modernbert("answerdotai/ModernBERT-large", 395_881_664, (1024, 2624, 28, 16, 50368, 8192)),
    deberta_v3("microsoft/deberta-v3-xsmall", 70_682_112, (384, 1536, 12, 6, 128100, 512)),
    deberta_v3("microsoft/deberta-v3-small", 141_304_320, (768, 3072, 6, 12, 128100, 512)),
    deberta_v3("microsoft/deberta-v3-base", 183_831_552, (768, 3072, 12, 12, 128100, 512), "deberta deberta-v3"),
    deberta_v3("microsoft/deberta-v3-large", 434_012_160, (1024, 4096, 24, 16, 128100, 512)),

    # T5: width, feed-forward, layers, heads, width of a head
    t5("google-t5/t5-small", 60_506_624, (512, 2048, 6, 8, 64)),
    t5("google-t5/t5-base", 222_903_552, (768, 3072, 12, 12, 64), "t5"),
    t5("google-t5/t5-large", 737_668_096, (1024, 4096, 24, 16, 64)),
    t5("google-t5/t5-3b", 2_851_598_336, (1024, 16384, 24, 32, 128)),
    t5("google-t5/t5-11b", 11_307_321_344, (1024, 65536, 24, 128, 128)),
    flan_t5("google/flan-t5-small", 60_511_616, (512, 1024, 8, 6, 64)),
    flan_t5("google/flan-t5-base", 222_903_552, (768, 2048, 12, 12, 64), "flan-t5"),
    flan_t5("google/flan-t5-large", 750_251_008, (1024, 2816, 24, 16, 64)),
    flan_t5("google/flan-t5-xl", 2_783_959_040, (2048, 5120, 24, 32, 64)),
    flan_t5("google/flan-t5-xxl", 11_003_736_064, (4096, 10240, 24, 64, 64)),

    # ViT: hidden, intermediate, layers, heads, patch
    vit("google/vit-base-patch16-224-in21k", 86_389_248, (768, 3072, 12, 12, 16), "vit-base vit"),
    vit("google/vit-base-patch16-224", 86_567_656, (768, 3072, 12, 12, 16),
        architectures=["ViTForImageClassification"], num_labels=1000),
    vit("google/vit-large-patch16-224-in21k", 304_351_232, (1024, 4096, 24, 16, 16), "vit-large"),
    vit("google/vit-large-patch32-224-in21k", 306_560_000, (1024, 4096, 24, 16, 32)),
    vit("google/vit-huge-patch14-224-in21k", 632_404_480, (1280, 5120, 32, 16, 14), "vit-huge"),

    # Whisper: width, feed-forward, heads, encoder layers, decoder layers
    whisper("openai/whisper-tiny", 37_760_640, (384, 1536, 6, 4, 4)),
    whisper("openai/whisper-base", 72_593_920, (512, 2048, 8, 6, 6)),
    whisper("openai/whisper-small", 241_734_912, (768, 3072, 12, 12, 12), "whisper"),
    whisper("openai/whisper-medium", 763_857_920, (1024, 4096, 16, 24, 24)),
    whisper("openai/whisper-large-v2", 1_543_304_960, (1280, 5120, 20, 32, 32)),
    whisper("openai/whisper-large-v3", 1_543_490_560, (1280, 5120, 20, 32, 32), "whisper-large",
            num_mel_bins=128, vocab_size=51866),
    whisper("openai/whisper-large-v3-turbo", 808_878_080, (1280, 5120, 20, 32, 4), "whisper-turbo",
            num_mel_bins=128, vocab_size=51866),
)
# fmt: on

MODELS: tuple[Model, ...] = tuple(model for family in _FAMILIES for model in family)
_BY_NAME: dict[str, Model] = {name.lower(): model for model in MODELS for name in (model.id, *model.aliases)}


def find_model(name: str) -> Model | None:
    """Return the model of that Hub id or alias, whatever its case; None where the catalogue has none."""
    return _BY_NAME.get(name.strip().lower())


def search_models(q: str, limit: int = 20) -> list[Model]:
    """Return models whose names hold every word of `q`: those with more of them as whole words, then the shortest."""
    words = _words(q)
    found = []
    for model in MODELS:
        names = " ".join((model.id, *model.aliases)).lower()
        if all(word in names for word in words):
            found.append((-len(set(words) & set(_words(names))), len(model.id), model))
    return [model for *_, model in sorted(found, key=lambda hit: hit[:2])[:limit]]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9.]+", text.lower())
