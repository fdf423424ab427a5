"""The job: one schema for the form, the API, the command line, the documentation and the tests.

Field names and values are the wire format. A default is what a user gets who says nothing to that stack. The names of
optimisers, trainers, quantisers and strategies are those of the tables in :mod:`vramplan.registry`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .errors import PlanError, nearest
from .registry.objectives import OBJECTIVES, Objective, ObjectiveName
from .registry.optimizers import JOIN, OptimizerName
from .registry.quantizers import QUANTIZERS, Quantizer, QuantizerName
from .registry.strategies import STRATEGIES, StrategyName
from .registry.tasks import is_causal
from .registry.trainers import PLAIN, TRAINERS, Trainer, TrainerName, default_trainer

Task = Literal[
    "causal-lm",
    "seq2seq-lm",
    "masked-lm",
    "sequence-classification",
    "token-classification",
    "image-classification",
    "image-text-to-text",
    "speech-seq2seq",
    "zero-shot-image-classification",
]
"""Which Auto class of transformers builds the model."""
Dtype = Literal["bfloat16", "float16", "float32"]
"""A floating-point type, by its name in torch."""
Count = Annotated[int, Field(ge=1, le=10_000_000)]
"""Sequences, images or tokens."""
Side = Annotated[int, Field(ge=1, le=8192)]
"""Pixels."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Quantization(_Strict):
    """How the linear layers are quantised while they are loaded, as ``transformers.BitsAndBytesConfig`` takes it."""

    type: QuantizerName = Field("nf4", description="Data type of the stored weights.")
    double_quant: bool = Field(True, description="Quantise the quantisation constants too (4-bit types).")
    compute_dtype: Dtype = Field("bfloat16", description="Dtype of the matrix products (bnb_4bit_compute_dtype).")
    skip_modules: tuple[Annotated[str, Field(pattern=r"^[\w.]+$", max_length=200)], ...] = Field(
        (),
        description="Modules left as they are (llm_int8_skip_modules); none: the output head, else in its place.",
    )


LORA_ARGUMENTS = frozenset(
    """alora_invocation_tokens alpha_pattern arrow_config autocast_adapter_dtype bias corda_config ensure_weight_tying
    eva_config exclude_modules fan_in_fan_out init_lora_weights kasa_config layer_replication layers_pattern
    layers_to_transform loftq_config lora_bias lora_ga_config monteclora_config qalora_group_size rank_pattern
    target_parameters trainable_token_indices use_bdlora use_qalora velora_config""".split()
)
"""Arguments of ``peft.LoraConfig`` that :class:`Lora` has no field of its own for, and one of ``get_peft_model``."""


class Lora(_Strict):
    """Low-rank adapters, as ``peft.LoraConfig`` takes them: its other arguments too, by its own names."""

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="constants")

    r: Annotated[int, Field(ge=1, le=65536)] = Field(16, description="Rank of the adapters.")
    alpha: Annotated[float, Field(gt=0)] = Field(32, description="Scaling numerator; costs no memory.")
    dropout: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Dropout before each adapter.")
    target_modules: tuple[str, ...] | Literal["all-linear"] | None = Field(
        None, description="Names of the wrapped modules, or all-linear; null: what PEFT knows for this architecture."
    )
    use_dora: bool = Field(False, description="Weight-decomposed adapters (DoRA).")
    use_rslora: bool = Field(False, description="Rank-stabilised scaling; costs no memory.")
    modules_to_save: tuple[str, ...] = Field((), description="Modules trained in full beside the adapters.")

    @model_validator(mode="after")
    def _known_to_peft(self) -> Lora:
        """Refuse what is no argument of ``LoraConfig``."""
        for name in self.model_extra or ():
            if name not in LORA_ARGUMENTS:
                raise PydanticCustomError("unknown_argument", "unknown", {"name": name})
        return self

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """A list of names may be written as one text, with commas."""
        if isinstance(value, str) and value != "all-linear":
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value


class OwnGpu(_Strict):
    """A card that the catalogue does not have, or whose memory the user knows better."""

    name: str = Field("my card", max_length=200)
    memory_bytes: Annotated[int, Field(gt=0, le=1 << 50, description="What PyTorch can use of it.")]
    like: str | None = Field(None, max_length=200, description="The catalogue's card whose kernels it runs.")


class Allocator(_Strict):
    """Settings of PyTorch's caching allocator: the environment's ``PYTORCH_ALLOC_CONF``."""

    expandable_segments: bool = Field(False, description="Grow one range per pool instead of many segments.")
    max_split_size_mb: Annotated[int, Field(ge=21, le=1 << 20)] | None = Field(
        None, description="Never split blocks larger than this (more than 20 MiB, as PyTorch asks)."
    )


class Ddp(_Strict):
    """Arguments of ``DistributedDataParallel``, by its names; null: what accelerate or the trainer sets."""

    find_unused_parameters: bool | None = Field(None, description="Look for parameters without a gradient.")
    gradient_as_bucket_view: bool | None = Field(None, description="Gradients are views into the buckets.")
    bucket_cap_mb: Annotated[float, Field(gt=0, le=1 << 20)] | None = Field(
        None, description="MiB of a bucket; null: 25."
    )
    static_graph: bool | None = Field(None, description="The same parameters are used in every step.")


class Fsdp(_Strict):
    """Arguments of FSDP2's ``fully_shard``, as accelerate's plugin names them."""

    reshard_after_forward: bool = Field(True, description="Free gathered weights after a module's forward pass.")
    cpu_offload: bool = Field(False, description="Shards, gradients and optimiser state lie on the host.")
    param_dtype: Dtype | None = Field(None, description="Dtype in which weights are gathered; null: as they are.")
    reduce_dtype: Dtype | None = Field(None, description="Dtype in which gradients are reduced; null: their own.")
    activation_checkpointing: bool = Field(False, description="The plugin's own checkpointing of wrapped modules.")
    wrap: tuple[str, ...] | None = Field(
        None, description="Classes of the modules that are sharded as one; null: the model's _no_split_modules."
    )


class Job(_Strict):
    """A training step or a generation, as somebody would run it on one card or on many."""

    model: str | None = Field(None, max_length=400, description="Hub id, local folder or path of a config.json.")
    config: dict[str, Any] | None = Field(None, description="The config.json itself; instead of `model`.")
    revision: str | None = Field(None, max_length=200, description="Hub revision; null: main.")
    task: Task | None = Field(None, description="Which Auto class is built; null: from the config's architectures.")
    method: Literal["full", "lora", "qlora", "inference"] = Field("qlora", description="What is trained.")
    dtype: Dtype = Field("bfloat16", description="Dtype the weights are loaded in.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = Field(
        None, description="Autocast; null: no for pytorch, bf16 for the trainers."
    )
    quantization: Quantization | None = Field(None, description="null: none; for qlora NF4 with double quantisation.")
    prepare_for_kbit_training: bool | None = Field(
        None, description="peft.prepare_model_for_kbit_training is called; null: for qlora, unless the trainer is trl."
    )
    lora: Lora | None = Field(None, description="Adapters; null: none, for lora and qlora the defaults.")
    optimizer: OptimizerName | None = Field(None, description="As transformers' optim; null: the trainer's default.")
    gradient_checkpointing: Literal["off", "reentrant", "non_reentrant"] | bool | None = Field(
        None, description="null: on for qlora and trl, else off; true: the library's default (non_reentrant)."
    )
    batch_size: Count = Field(1, description="Sequences (or images) a step on one device.")
    sequence_length: Count | None = Field(1024, description="Tokens of one sequence; null where there are none.")
    target_length: Count | None = Field(None, description="Tokens of the labels of an encoder-decoder; null: the same.")
    new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Tokens that inference generates; null: 64."
    )
    images: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        None, description="Images a sequence of a vision-language model; null: 1 where it fits the sequence, else 0."
    )
    image_size: tuple[Side, Side] | None = Field(
        None, description="Height and width of an image before its processor, in pixels; null: 448 each."
    )
    expert_routing: Literal["balanced", "same"] = Field(
        "balanced", description="Where experts run one by one: each gets as many tokens, or every token the same ones."
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1_000_000)] = Field(1, description="Batches a step.")
    processor: dict[str, Any] | None = Field(
        None,
        description="preprocessor_config.json's; null: the model's own where it is known, else its class's defaults. "
        "max_pixels and min_pixels alone change these of the model's own.",
    )
    attention: Literal["sdpa", "eager", "flex_attention", "flash_attention_2"] | None = Field(
        None, description="attn_implementation; null: sdpa, or eager where the model's class has no sdpa."
    )
    attention_mask: Literal["absent", "full", "padded", "packed"] = Field(
        "full",
        description="What the batch carries; packed: one row of all its tokens, no mask, but positions that start over "
        "in each sequence.",
    )
    trainer: TrainerName | None = Field(
        None, description="Whose step it is; null: TRL's for causal language models, transformers' elsewhere."
    )
    objective: ObjectiveName = Field("sft", description="Which of TRL's trainers; with another trainer: sft.")
    prompt_length: Count | None = Field(None, description="Tokens of a prompt, where the objective has prompts.")
    completion_length: Count | None = Field(None, description="Tokens of a completion, where it has completions.")
    trainer_args: dict[str, Any] = Field(
        {}, description="Arguments of the trainer's own config class (TrainingArguments, DPOConfig, …), by its names."
    )
    adapter: dict[str, Any] | None = Field(
        None, description="Any PEFT method: its peft_type and arguments of its config; instead of lora."
    )
    generation_args: dict[str, Any] = Field({}, description="Arguments of generate() beside new_tokens.")
    gpu: str | OwnGpu | None = Field(None, description="Catalogue name, or a card of your own.")
    reserve: Annotated[int, Field(ge=0, le=1 << 50)] = Field(
        0, description="Bytes of the card that are not this job's: a display, other processes, room to be left."
    )
    gpu_count: Annotated[int, Field(ge=1, le=100_000)] = Field(1, description="Cards in all, on every node.")
    nodes: Annotated[int, Field(ge=1, le=100_000)] = Field(1, description="Machines that the cards are in.")
    strategy: StrategyName = Field("single", description="How the job is spread over the cards.")
    ddp: Ddp | None = Field(None, description="Options of strategy ddp; null: what the trainer sets.")
    fsdp: Fsdp | None = Field(None, description="Options of strategy fsdp2; null: accelerate's defaults.")
    deepspeed: dict[str, Any] | None = Field(
        None, description="Options of zero1, zero2 and zero3, or a DeepSpeed config with transformers' auto values."
    )
    device_map: str | dict[str, Any] | None = Field(
        None, description="As from_pretrained takes it, for strategy device-map; null: auto."
    )
    max_memory: dict[str, int | str] | None = Field(
        None, description='Bytes of each card and of the host that device_map may use: {"0": bytes, "cpu": bytes}.'
    )
    allocator: Allocator = Allocator()

    @model_validator(mode="after")
    def _consistent(self) -> Job:
        """Refuse fields that contradict each other."""
        if (self.model is None) == (self.config is None):
            raise ValueError("give exactly one of `model` and `config`")
        if self.quantization is not None and self.method == "full":
            raise ValueError("quantised weights cannot be trained in full: use method qlora, or leave quantization out")
        if self.lora is not None and self.method == "full":
            raise ValueError("method full trains every weight and takes no lora: use method lora, or leave lora out")
        if self.adapter is not None and self.method == "full":
            raise ValueError("method full trains every weight and takes no adapter: use method lora")
        if self.prepare_for_kbit_training and self.method == "full":
            raise ValueError("method full trains the weights that prepare_for_kbit_training freezes: leave it out")
        if self.adapter is not None and self.lora is not None:
            raise ValueError("give one of `lora` and `adapter`")
        self._check_trainer()
        self._check_cards()
        return self

    def _check_cards(self) -> None:
        """Refuse a number of cards that the strategy does not take, and options of another one."""
        strategy = STRATEGIES[self.strategy]
        for field in CARD_OPTIONS:
            if getattr(self, field) is not None and field not in strategy.options:
                owners = ", ".join(name for name, row in STRATEGIES.items() if field in row.options)
                raise ValueError(f"{field} is of strategy {owners}: set strategy, or leave {field} out")
        if self.strategy == "single" and self.gpu_count > 1:
            raise ValueError("strategy single takes one card: set strategy (ddp, fsdp2, …), or gpu_count to 1")
        if self.gpu_count % self.nodes:
            raise ValueError("gpu_count is the number of cards in all: it must be a multiple of nodes")
        if self.nodes > 1 and strategy.one_process:
            raise ValueError(f"strategy {self.strategy} is one process on one machine: set nodes to 1")

    def _check_trainer(self) -> None:
        trainer, goal = TRAINERS[self.trainer or default_trainer("causal-lm")], self.goal
        if self.objective != "sft" and not trainer.has_objectives:
            raise ValueError(f"objective {self.objective} is one of TRL's: set trainer to trl")
        if goal.refusal is not None:
            raise ValueError(f"objective {self.objective} is not planned yet: {goal.refusal}")
        if self.trainer_args and not trainer.hosted:
            raise ValueError("a plain loop takes no trainer_args: set trainer to transformers or trl")
        if JOIN in (self.optimizer or "") and trainer.hosted:
            raise ValueError("a Trainer has one optimizer: two are for trainer pytorch")
        if self.method == "inference":
            return
        if self.generation_args:
            raise ValueError("generation_args are for method inference: a trainer takes its own in trainer_args")
        lengths = (self.prompt_length, self.completion_length)
        if trainer.has_objectives and goal.pairs and None in lengths:
            raise ValueError(f"objective {self.objective} needs prompt_length and completion_length")
        if lengths != (None, None) and not (trainer.has_objectives and goal.pairs):
            raise ValueError(
                "prompt_length and completion_length are of objectives that have both: set sequence_length"
            )

    @property
    def in_bfloat16(self) -> bool:
        """Whether anything is computed in bfloat16."""
        return self.dtype == "bfloat16" or self.mixed_precision == "bf16"

    @property
    def quantizer(self) -> Quantizer | None:
        """The facts of the layout that it quantises to; None: it does not."""
        return QUANTIZERS[self.quantization.type] if self.quantization is not None else None

    @property
    def goal(self) -> Objective:
        """The facts of its objective."""
        return OBJECTIVES[self.objective]

    @property
    def whose(self) -> Trainer:
        """The facts of the trainer of a job (resolved)."""
        assert self.trainer is not None
        return TRAINERS[self.trainer]

    @property
    def states_rows(self) -> bool:
        """Whether the batch is made by the trainer's own collator, of rows that the job states."""
        return self.whose.has_objectives and (self.objective != "sft" or bool(self.trainer_args))

    @property
    def knows_values(self) -> bool:
        """Whether values are followed from the start: those of its rows, or of the shapes that are evaluated."""
        return self.states_rows or self.trainer_args.get("eval_strategy", "no") != "no"

    @property
    def packed(self) -> bool:
        """Whether it trains on packed sequences: one row, told apart by positions."""
        return self.attention_mask == "packed" and self.method != "inference"

    @property
    def batches_run(self) -> int:
        """How many of a step's accumulated batches a trace runs: two, for a third is like the second."""
        return min(self.gradient_accumulation_steps, 2)

    def resolved(self, config: dict[str, Any] | None = None) -> Job:
        """The same job with every null replaced by what the stack would do. ``config`` is its model's, where the job
        does not hold it itself: who trains a model by default depends on it."""
        chosen = self if self.trainer else self.model_copy(update={"trainer": self._own_trainer(config or self.config)})
        return chosen.model_copy(update={**chosen._resolved_method(), **chosen._resolved_step()})

    def _own_trainer(self, config: dict[str, Any] | None) -> str:
        """The trainer of a job that names none. A config that is not known is taken for a causal language model's."""
        if self.method == "inference":
            return PLAIN
        causal = self.objective != "sft" or config is None or is_causal(config)
        own = "causal-lm" if causal else None
        return default_trainer(own if self.objective != "sft" else self.task or own)

    def _resolved_method(self) -> dict[str, Any]:
        """Defaults of the layout and of the adapters."""
        fill: dict[str, Any] = {}
        is_quantized = self.quantization is not None or self.method == "qlora"
        if is_quantized and self.quantization is None:
            fill["quantization"] = Quantization()
        if self.method in ("lora", "qlora") and self.lora is None and self.adapter is None:
            fill["lora"] = Lora()
        if self.prepare_for_kbit_training is None:
            prepares = self.whose.prepares_for_kbit_training
            fill["prepare_for_kbit_training"] = self.method != "inference" and is_quantized and prepares
        return fill

    def _resolved_step(self) -> dict[str, Any]:
        """Defaults of the step: those of the trainer, or of a generation."""
        trainer, is_training = self.whose, self.method != "inference"
        fill: dict[str, Any] = {"gradient_checkpointing": self._resolved_checkpointing()}
        if self.mixed_precision is None:
            fill["mixed_precision"] = trainer.mixed_precision if is_training else "no"
        if self.optimizer is None:
            fill["optimizer"] = trainer.optimizer
        if not is_training and self.new_tokens is None:
            fill["new_tokens"] = 64
        if is_training and trainer.has_objectives and self.goal.pairs:
            fill["sequence_length"] = (self.prompt_length or 0) + (self.completion_length or 0)
        if is_training and trainer.has_objectives and self.goal.task is not None:
            fill["task"] = self.goal.task
        return fill

    def _resolved_checkpointing(self) -> str:
        """``off``, ``reentrant`` or ``non_reentrant``."""
        if self.method == "inference":
            return "off"
        chosen = self.gradient_checkpointing
        if chosen is None:
            chosen = self.method == "qlora" or self.whose.checkpoints
        if isinstance(chosen, bool):
            return "non_reentrant" if chosen else "off"
        return chosen


CAPS = ("min_pixels", "max_pixels")
"""Settings of an image processor that a job may give alone, on top of the model's own."""
CARD_OPTIONS = ("ddp", "fsdp", "deepspeed", "device_map", "max_memory")
"""Fields with options of strategies."""
ADDED_FIELDS = (
    *("objective", "prompt_length", "completion_length", "trainer_args", "adapter", "generation_args", "processor"),
    *CARD_OPTIONS,
)
"""Fields that came after profiles were stored: a job that leaves them at their defaults has the key that it had."""

TARGETS = ("batch_size", "sequence_length", "r", "accumulation_free_batch", "gpu", "gpu_count", "model")
"""What :func:`vramplan.planning.solver.solve` can seek."""


def point_of(job: Job) -> tuple[int, int]:
    """(batch, length) of a job: sequences, and tokens of one sequence. The length is 0 where there are no tokens."""
    return job.batch_size, job.sequence_length or 0


def read_job(data: Any) -> Job:
    """The job that somebody sent as a JSON object. Raises :class:`PlanError`, which says what to write instead."""
    if isinstance(data, Job):
        return data
    if not isinstance(data, dict):
        raise PlanError(f"a job is a JSON object, not {type(data).__name__}", 'send {"model": "…", "method": "qlora"}')
    try:
        return Job.model_validate(data)
    except ValidationError as error:
        raise _plan_error(error, data) from None


def _plan_error(error: ValidationError, data: dict) -> PlanError:
    """The first thing that is wrong with ``data``, and what to write instead."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    where = ".".join(path)
    if first["type"] == "unknown_argument":
        return _unknown_field([*path, first["ctx"]["name"]])
    if first["type"] == "extra_forbidden":
        return _unknown_field(path)
    message = first["msg"].removeprefix("Value error, ")
    if not where:
        return PlanError(message, "see the job's fields in the documentation")
    if path[0] == "optimizer":
        where, message = path[0], error.errors(include_url=False)[-1]["msg"].removeprefix("Value error, ")
    if path[0] == "gradient_checkpointing":
        where, message = path[0], "should be off, reentrant, non_reentrant, true or false"
    if path[0] == "gpu" and len(path) > 1:
        where, message = "gpu", 'should be a name of the catalogue or {"name": …, "memory_bytes": …}'
    got = first.get("input")
    shown = repr(got) if len(repr(got)) < 60 else type(got).__name__
    meant = nearest(str(got), _allowed(first))
    hint = f"did you mean {meant[0]!r}?" if meant else f"change `{where}`; it was {shown}"
    if where == "method" and got in OBJECTIVES:
        hint = f"set objective to {got}, and method to full, lora or qlora"
    return PlanError(f"`{where}`: {message[0].lower()}{message[1:]} (got {shown})", hint, path[0])


_SYNONYMS = {
    "attn_implementation": "attention",
    "batch": "batch_size",
    "bf16": "mixed_precision",
    "card": "gpu",
    "context_length": "sequence_length",
    "device": "gpu",
    "fp16": "mixed_precision",
    "max_length": "sequence_length",
    "max_new_tokens": "new_tokens",
    "max_seq_length": "sequence_length",
    "model_name_or_path": "model",
    "optim": "optimizer",
    "per_device_train_batch_size": "batch_size",
    "precision": "dtype",
    "rank": "r",
    "torch_dtype": "dtype",
}
"""The job's field behind a name that other programs have for it."""
_NO_MEMORY = "it changes no memory of a step: leave it out"
_OFFLOAD = (
    "states and weights lie on the host with strategy zero2 or zero3 and `deepspeed`, weights alone with strategy "
    "device-map and `device_map`, activations with TRL's activation_offloading in `trainer_args`"
)
_RESUMED = "what a resumed run reads is not planned: leave it out, for the steps of the same job"
_ELSEWHERE = {
    "compile": "a compiled step is not planned: leave it out",
    "cpu_offload": _OFFLOAD,
    "epochs": _NO_MEMORY,
    "learning_rate": _NO_MEMORY,
    "lr": _NO_MEMORY,
    "max_steps": _NO_MEMORY,
    "num_train_epochs": _NO_MEMORY,
    "offload": _OFFLOAD,
    "rank": "set r in `lora`",
    "resume": _RESUMED,
    "resume_from_checkpoint": _RESUMED,
    "torch_compile": "a compiled step is not planned: leave it out",
    "videos": "videos are not planned: ask with `images`",
}
"""The hint for a name that people ask by and that is no field."""


def _unknown_field(path: list[str]) -> PlanError:
    """The error for a field that no job has, at this path."""
    where, known = ".".join(path), _fields_at(path[:-1])
    synonym = _SYNONYMS.get(path[-1])
    meant = [synonym] if synonym in known else nearest(path[-1], known)
    hint = f"did you mean `{meant[0]}`?" if meant else f"the fields are {', '.join(sorted(known))}"
    if len(path) == 1:
        hint = _ELSEWHERE.get(path[0], hint)
    return PlanError(f"unknown field `{where}`", hint, where)


def _allowed(entry: Any) -> list[str]:
    """The values that a field takes, by an entry of pydantic's errors."""
    expected = entry.get("ctx", {}).get("expected") or ""
    return [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]


def _fields_at(path: list[str]) -> list[str]:
    """The fields of a job, or of the object in it at this path."""
    models: dict[str, type[BaseModel]] = {
        "quantization": Quantization,
        "lora": Lora,
        "allocator": Allocator,
        "gpu": OwnGpu,
        "ddp": Ddp,
        "fsdp": Fsdp,
    }
    names = list(models.get(path[0], Job).model_fields if path else Job.model_fields)
    return [*names, *LORA_ARGUMENTS] if path == ["lora"] else names
