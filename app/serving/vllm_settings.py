"""The settings of a ``vllm serve`` command, with vLLM's defaults filled in.

Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/engine/arg_utils.py ``create_engine_config``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..catalog.gpus import Gpu
from ..errors import PlanError
from ..job import OwnGpu
from ..planning.cards import known, usable
from .amounts import GIB
from .command import Command
from .rank_weights import Served

LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""The environment variable that lets a length be longer than the config states."""


@dataclass(frozen=True)
class Settings:
    """The settings of a start that decide its memory, with vLLM's defaults filled in."""

    max_model_len: int
    fitted: bool
    utilization: float
    max_num_batched_tokens: int
    max_num_seqs: int
    ranks: int
    stages: int
    dtype: str
    cache_dtype: str
    block_size: int
    in_flight: int


def refuse_drafts(command: Command) -> None:
    """Raise :class:`PlanError` for speculative decoding that takes a model of its own."""
    method = command.given.get("spec-method") or command.settings("speculative-config").get("method")
    drafted = command.given.get("speculative-config") is not None or method is not None
    if drafted and method not in ("ngram", "suffix"):
        raise PlanError(
            f"speculative decoding by {method or 'a draft model'}: its weights and cache are not modelled",
            "leave it out to plan the rest; ngram costs nothing on the card",
            "command",
        )


ONLINE = {"fp8": {"quant_method": "fp8"}, "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
"""What vLLM can quantise while it loads, as a checkpoint of that layout states it."""


def quantised(config: dict, method: str | None) -> dict:
    """The config with the quantisation that the command asks for, where its checkpoint has none."""
    text = config.get("text_config")
    stored = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if method is None or method == "None" or stored is not None:
        return config
    if method not in ONLINE:
        raise PlanError(
            f"--quantization {method}: this checkpoint is not stored so, and vLLM quantises only fp8 and bitsandbytes "
            "while it loads",
            "name the quantised checkpoint",
            "command",
        )
    return {**config, "quantization_config": ONLINE[method]}


def dtype_of(command: Command, config: dict, card: Gpu | OwnGpu) -> str:
    """The dtype of weights that are not quantised: the config's own, 32 bits as 16."""
    asked = {"half": "float16", "float": "float32"}.get(command.given.get("dtype", "auto"), command.given.get("dtype"))
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    stored = [part.get(name) for part in (config, text) for name in ("dtype", "torch_dtype")]
    own = next((dtype for dtype in stored if dtype), "float32")
    chip = known(card)
    has_bf16 = chip is None or chip.bf16
    if asked in (None, "auto"):
        asked = own if own in ("float16", "bfloat16") else "bfloat16" if has_bf16 else "float16"
    if asked not in ("float16", "bfloat16", "float32"):
        raise PlanError(f"--dtype is {asked!r}", "one of auto, half, bfloat16, float32", "command")
    if asked == "bfloat16" and not has_bf16:
        raise PlanError(
            "Bfloat16 is only supported on GPUs with compute capability of at least 8.0.", "--dtype=half", "command"
        )
    return asked


def batch_of(command: Command, card: Gpu | OwnGpu, longest: int) -> tuple[int, int]:
    """``max_num_batched_tokens`` and ``max_num_seqs``.

    Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/engine/arg_utils.py#L2940 ``get_batch_defaults``.
    """
    chip, memory = known(card), usable(card)
    is_a100 = chip is not None and "a100" in chip.name.lower()
    if memory >= 160 * GIB:
        tokens, seqs = 16384, 1024
    elif memory >= 70 * GIB and not is_a100:
        tokens, seqs = 8192, 1024
    else:
        tokens, seqs = 2048, 256
    scale = 2 if command.given.get("performance-mode") == "throughput" else 1
    length = command.number("max-model-len", longest) if command.given.get("max-model-len") != "auto" else longest
    seqs = command.number("max-num-seqs", None) or seqs * scale
    if (given := command.number("max-num-batched-tokens", None)) is None:
        tokens = min(seqs * (longest if length < 0 else length), tokens * scale)
    else:
        tokens = given
    if seqs < 1 or tokens < 1:
        raise PlanError("a batch has at least one sequence and one token", "raise --max-num-seqs", "command")
    if command.given.get("max-num-seqs") is None:
        seqs = min(seqs, tokens)
    elif tokens < seqs:
        raise PlanError(
            f"max_num_batched_tokens ({tokens}) must be greater than or equal to max_num_seqs ({seqs}).",
            "raise --max-num-batched-tokens",
            "command",
        )
    if tokens > 1 << 20:
        raise PlanError(f"a batch of {tokens} tokens is not planned", "at most 1048576", "command")
    return tokens, seqs


def derived_length(config: dict, positions: int = 2048) -> int:
    """The longest sequence that the config states (else ``positions``), scaled as its positions are.

    Source: https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/config/model.py ``_get_and_verify_max_len``.
    """
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
    stated = [part[name] for part in (text, config) for name in names if isinstance(part.get(name), int)]
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    kept = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "mrope", None)
    scale = 1 if kind in kept or "gemma3" in str(config.get("model_type")) else rope.get("factor") or 1
    if kind == "longrope":
        stated = [value for value in (text.get("original_max_position_embeddings"), *stated) if value]
    return int((stated[0] if stated else positions) * scale)


def settings_of(command: Command, config: dict, model: Served, dtype: str, tokens: int, seqs: int) -> Settings:
    """All settings of a start. Raises :class:`PlanError` for those that vLLM refuses, in its words."""
    ranks, depth = command.number("tensor-parallel-size", 1), command.number("pipeline-parallel-size", 1)
    heads = model.text["num_attention_heads"]
    if not 1 <= ranks <= 1024 or not 1 <= depth <= 1024:
        raise PlanError("a server has 1 to 1024 ranks", "set --tensor-parallel-size", "command")
    if heads % ranks:
        raise PlanError(
            f"Total number of attention heads ({heads}) must be divisible by tensor parallel size ({ranks}).",
            "choose a divisor",
            "command",
        )
    longest = derived_length(config, model.text["max_position_embeddings"] or 2048)
    asked = command.given.get("max-model-len")
    fitted = asked in ("-1", "auto")
    length = longest if fitted else command.number("max-model-len", longest)
    if length < 1:
        raise PlanError(f"--max-model-len is {length}", "it has at least one token", "command")
    if length > longest and command.environment.get(LONG) != "1":
        raise PlanError(
            f"User-specified max_model_len ({length}) is greater than the derived max_model_len "
            f"(max_position_embeddings={longest}).",
            f"at most {longest}, or set {LONG}=1",
            "command",
        )
    share = command.number("gpu-memory-utilization", 0.92, float)
    if not 0 < share <= 1:
        raise PlanError(f"--gpu-memory-utilization is {share:g}", "it lies above 0 and up to 1", "command")
    ahead = depth + (command.given.get("async-scheduling") is not False)
    latent = model.text.get("kv_lora_rank") is not None
    return Settings(
        max_model_len=length,
        fitted=fitted,
        utilization=share,
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
        ranks=ranks,
        stages=depth,
        dtype=dtype,
        cache_dtype=str(command.given.get("kv-cache-dtype", "auto")),
        block_size=command.number("block-size", 64 if latent else 16),
        in_flight=ahead * tokens,
    )
