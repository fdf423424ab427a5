"""The answer's fields, typed: what the use cases return, as the HTTP API documents it. Bytes are ``int``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Open(BaseModel):
    """Fields that a newer answer has are passed on."""

    model_config = ConfigDict(extra="allow")


class ModelFacts(_Open):
    """What is planned: where the config came from and what it builds."""

    kind: str = Field(description="catalogue, file, inline or hub")
    id: str | None = Field(None, description="The model's name; null for a config that was sent.")
    task: str
    model_class: str = Field(alias="class")
    model_type: str
    parameters: int
    trainable_parameters: int
    supports_checkpointing: bool
    attention: str = Field(description="The attention implementation that the class runs.")


class Peak(_Open):
    """The highest moment of the step: how much, when and where."""

    allocated: int = Field(description="torch.cuda.max_memory_allocated()")
    reserved: int = Field(description="torch.cuda.max_memory_reserved()")
    process: int = Field(description="What nvidia-smi shows for the process.")
    process_interval: tuple[int, int] = Field(description="What `process` lies between.")
    phase: str
    step: int = Field(description="1: the first step, 2: a steady one.")
    module: str = Field(description="Path of the module; empty: the model itself or the loop.")
    op: str


class Load(_Open):
    """What the model holds before the first step, and the peak while it loads."""

    placed_allocated: int
    peak_allocated: int
    peak_reserved: int


class PhaseRow(_Open):
    """One phase of one step."""

    step: int = Field(description="0: loading, 1: the first step, 2: a steady one.")
    name: str
    allocated_start: int
    allocated_end: int
    peak_allocated: int
    peak_reserved: int


class Holder(_Open):
    """A module, and what of one kind it holds at the peak."""

    module: str = Field(description="Modules that repeat are one: model.layers.*.mlp")
    kind: str
    bytes: int


class Moment(_Open):
    """One moment of the step; `bytes` are alive by kind, in the order of `timeline.kinds`."""

    event: int
    phase: str
    step: int
    allocated: int
    reserved: int
    module: str
    bytes: list[int]


class Timeline(_Open):
    """The load (step 0) and the steps, in order of their allocations."""

    kinds: list[str]
    points: list[Moment]


class Layer(_Open):
    """A module with weights, or `count` alike. Bytes of one of them."""

    path: str
    type: str
    count: int
    parameters: int
    base: int = Field(description="Weights in the dtype they are loaded in.")
    nf4: int
    nf4_double_quant: int
    adapters: int
    gradients: int
    optimizer_state: int
    activations: int = Field(description="Kept for the backward pass without checkpointing.")
    activations_checkpointed: int


Word = Literal["fits", "tight", "does_not_fit"]
BREAKS = "The phase that runs out of memory."
BREAKS_ON = "The kind that holds most there."
CANNOT = "What follows the training and has no room there: merge (the adapter, in 16 bit), save."
INTERVAL = "What the headroom lies between, bytes."


class Fit(_Open):
    """The verdict on one card."""

    gpu: str
    name: str
    memory_bytes: int
    verdict: Word
    limit: int = Field(description="What the allocator may reserve there.")
    needed: int = Field(description="What the allocator reserves, left alone.")
    headroom: int = Field(
        description="What is left of the limit (negative: missing); where the allocator must give back its cache, less "
        "the allocated peak."
    )
    interval: tuple[int, int] = Field(description=INTERVAL)
    margin: int = Field(description="How much of the headroom may be missing; a verdict inside it is tight.")
    margin_source: str
    breaks: str | None = Field(description=BREAKS)
    breaks_on: str | None = Field(description=BREAKS_ON)
    cannot: list[str] = Field(description=CANNOT)
    same_kernels: bool = Field(description="The card runs the kernels that were planned.")


class After(_Open):
    """What follows the training: bytes allocated at its highest moment."""

    merge: int | None = Field(
        description="Merging the adapter into its base in the load dtype, in a process of its own."
    )
    save: int = Field(description="Writing what was trained, beside what the training holds.")


class Rank(_Open):
    """What the ranks of one class take, on many cards. They allocate alike."""

    rank_class: str = Field(alias="class", description="Which they are, and why they are not as others.")
    ranks: tuple[int, int] = Field(description="The first and the last of them.")
    peak: Peak
    load: Load
    optimizer_state: int
    phases: list[PhaseRow]
    parts: dict[str, int]
    holders: list[Holder]


class OtherTrainer(_Open):
    """The same job with another trainer: what it takes, and what that trainer does otherwise."""

    trainer: str
    peak: dict[str, int] = Field(description="allocated and reserved")
    verdict: Word
    headroom: int
    why: list[str]


class Answer(_Open):
    """The plan of one job; on many cards that of the worst rank."""

    job: dict[str, Any] = Field(description="The job with every default filled in.")
    model: ModelFacts
    peak: Peak
    load: Load
    optimizer_state: int
    phases: list[PhaseRow]
    parts: dict[str, int] = Field(description="What is alive at the peak by kind; sums to peak.allocated.")
    holders: list[Holder]
    timeline: Timeline
    layers: list[Layer]
    fits: list[Fit] = Field(description="The job's own card first, then the catalogue, smallest first.")
    after: After | None = Field(description="null: nothing is trained.")
    other_trainers: list[OtherTrainer] | None = Field(
        None, description="The same job with the other trainers, where that is asked for."
    )
    warnings: list[str]
    stack: dict[str, str] = Field(description="The versions that the plan was traced with.")
    ranks: list[Rank] | None = Field(None, description="Every class of ranks; left out for strategy single.")
    host: dict[str, int] | None = Field(
        None, description="Bytes of a node's own memory: load, pinned and pageable; left out for strategy single."
    )


class Solved(_Open):
    """What was asked for; 0 or null: nothing fits."""

    batch_size: int | None = None
    sequence_length: int | None = None
    r: int | None = None
    accumulation_free_batch: int | None = None
    gradient_accumulation_steps: int | None = Field(None, description="With that batch, for the same gradients.")
    sure: int | None = Field(None, description="The largest whose verdict on the card is fits, not tight.")
    memory_limit_bytes: int | None = Field(None, description="What the allocator may hold.")
    tries: dict[int, bool] | list[dict] | None = Field(
        None, description="What was tried, and whether it fits: the replay on both sides of the edge, and beyond."
    )
    refused: list[int] | int | None = Field(None, description="What the model cannot take at all.")
    gpu: str | None = None
    gpu_count: int | None = Field(None, description="The fewest cards, each with one rank.")
    cards: list[dict] | None = Field(None, description="The card found and the next smaller; or all priced ones.")
    model: str | None = None
    parameters: int | None = None


class CacheGroup(_Open):
    """Layers of a server's KV cache that share a table of blocks."""

    kind: str = Field(description="full, sliding, chunked or latent")
    layers: int
    block_size: int = Field(description="Tokens of a block.")
    bytes_per_token: int = Field(description="Of one layer, on one rank.")
    reach: int | None = Field(None, description="Tokens of the window or chunk.")


class ServerCache(_Open):
    """What is left to a server's KV cache, on the rank that has least."""

    available: int
    available_interval: tuple[int, int]
    blocks: int
    tokens: int = Field(description="GPU KV cache size, as the engine logs it.")
    tokens_interval: tuple[int, int]
    bytes_per_block: int
    groups: list[CacheGroup]


class Serving(_Open):
    """What a server's command takes of a card, and whether it starts. Of several ranks, the one with least left."""

    engine: dict[str, str] = Field(description="`name` and `version` of the engine whose rules are followed.")
    model: dict[str, Any]
    model_class: str
    parameters: int
    gpu: str
    ranks: int = Field(description="Cards that the command needs.")
    verdict: str = Field(description="starts, tight (within the intervals) or refuses")
    message: str | None = Field(description="The engine's own words where it refuses.")
    requested: int = Field(description="What the engine may take of the card.")
    total: int = Field(description="What PyTorch sees of the card.")
    parts: dict[str, int] = Field(description="What is taken before the cache, by kind.")
    intervals: dict[str, tuple[int, int]] = Field(description="What each part lies between.")
    stages: list[dict[str, int]] = Field(description="The parts of each pipeline stage.")
    kv_cache: ServerCache
    concurrency: float = Field(description="Requests of max_model_len tokens that the cache holds.")
    longest: int = Field(description="The longest max_model_len that starts, up to the one asked for.")
    utilization_needed: float | None = Field(description="The least --gpu-memory-utilization that starts; null: none.")
    settings: dict[str, Any] = Field(description="The settings with every default filled in.")
    ignored: list[str] = Field(description="Flags of the command that cost nothing on the card.")
    warnings: list[str]


class Weights(_Open):
    """What a model that cannot be planned weighs."""

    parameters: int
    bytes: int | None = Field(None, description="As loaded or as stored; left out where it cannot be known.")
    counted_from: str = Field(alias="from")


class Beside(_Open):
    """A figure, planned and measured; `percent` is the plan's error."""

    figure: str = Field(description="placed, allocated, reserved, process; peak and end of a phase")
    planned: int
    measured: int | None = Field(description="null: the driver does not tell it.")
    difference: int | None = None
    percent: float | None = None


class ProbedPhase(_Open):
    """The load, or one phase of the first or of a steady step: allocated at its peak and its end, the most reserved,
    and the process as nvidia-smi shows it."""

    step: int
    name: str
    peak: Beside
    end: Beside
    reserved: Beside
    process: Beside


class Difference(_Open):
    """Bytes that plan and card disagree about at the measured peak."""

    module: str
    kind: str
    phase: str
    op: str = Field(description="The plan's operator, or the function that asked on the card.")
    planned: int
    measured: int


class Matched(_Open):
    """How far the card's allocations are events of the plan."""

    share: float = Field(description="Of the bytes alive at the measured peak.")
    alive_at_peak: int
    matched_at_peak: int
    differences: list[Difference]
    events: int = Field(description="Allocations of the first two steps that both have.")
    planned_only: int
    measured_only: int


class Probe(_Open):
    """A job run on a real card, beside its plan."""

    outcome: Literal["ok", "out_of_memory"]
    broke_in: dict[str, Any] | None = Field(description="The step and phase that ran out of memory.")
    layers: int | None = Field(description="How many layers were built; null: all.")
    job: dict[str, Any]
    card: dict[str, Any]
    stack: dict[str, str]
    figures: list[Beside]
    phases: list[ProbedPhase]
    match: Matched
    extrapolated: dict[str, Any] | None = Field(None, description="What follows for all layers; not measured.")
    date: str


class Problem(BaseModel):
    """What was asked and what was found, and what to do next."""

    message: str
    hint: str
    field: str | None = Field(None, description="The field of the job that is at fault.")
    weights: Weights | None = None


class Failure(BaseModel):
    """A job that could not be planned."""

    error: Problem


class VerdictSummary(_Open):
    """A job's verdict on its card, and its peaks."""

    gpu: str
    verdict: Word
    headroom: int
    interval: tuple[int, int] = Field(description=INTERVAL)
    margin: int
    breaks: str | None = Field(description=BREAKS)
    breaks_on: str | None = Field(description=BREAKS_ON)
    cannot: list[str] = Field(description=CANNOT)
    peak: dict[str, int | str]


class Suggestion(VerdictSummary):
    """A change of the job, planned: `change` are the fields to set."""

    title: str
    change: dict[str, Any]
    cost: str = Field(description="What it costs beside memory.")
    flops_added: float = Field(description="Products with weights computed again, as a share of the step's.")
    bytes_written_added: int = Field(description="What a steady step writes anew, more (negative: less).")
    seconds_at_least: float = Field(description="Those bytes at the card's bandwidth; 0: unknown, or less.")
    changes_objective: bool = Field(description="The training is another one then.")


class Advice(_Open):
    """Single changes that make the job fit, the least that one minds first; a pair where no single one does."""

    now: VerdictSummary
    suggestions: list[Suggestion]
    pair: Suggestion | None
    untraced: list[str] = Field([], description="Changes that cannot be planned without the packages of [trace].")
    smallest_card: str | None = Field(description="The smallest of the catalogue that takes the job as it is.")
    merged: VerdictSummary | Failure | None = Field(
        description="Generating 64 tokens with the model that the adapter is merged into, in 16 bit, on the same card."
    )


class Compared(_Open):
    """One job of a comparison: what was varied, its peaks and its verdict; or its error."""

    varied: dict[str, Any]
    model: str | None = None
    method: str | None = None
    gpu: str | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None
    batch_size: int | None = None
    sequence_length: int | None = None
    verdict: Word | None = None
    headroom: int | None = None
    margin: int | None = None
    peak: dict[str, int | str] | None = None
    error: dict[str, str] | None = None


class Comparison(BaseModel):
    """Jobs side by side; `over` are the fields that were varied."""

    over: list[str]
    rows: list[Compared]


class Line(_Open):
    """One result of a batch: an answer, or `error`; with the `id` that came with its job."""

    id: Any = None
    error: Problem | None = None


class GpuRow(BaseModel):
    """A card of the catalogue."""

    key: str
    name: str
    aliases: list[str]
    marketed_gb: int
    total_memory: int = Field(description="torch.cuda.get_device_properties().total_memory, bytes")
    measured: bool = Field(description="false: derived from nvidia-smi's total.")
    smi_memory: int | None
    arch: str
    compute_capability: tuple[int, int] | None
    sm_count: int | None
    bandwidth_gbs: float
    bf16: bool
    source: str
    parts: list[str] = Field(description="What may follow its key after a colon: MIG profiles, ecc.")


class ModelRow(BaseModel):
    """A model of the catalogue, or one that the Hub's search finds, of which only the name is known."""

    id: str
    source: Literal["catalogue", "hub"]
    parameters: int | None = None
    model_type: str | None = None
    aliases: list[str] = []


class Health(BaseModel):
    """Whether the service is up; `waiting` jobs are in the queue."""

    status: Literal["ok"] = "ok"
    version: str
    waiting: int
    can_trace: bool = Field(description="false: torch is not installed, and only jobs traced before are planned.")


class Progress(BaseModel):
    """What is being done for a request: it waits in the queue, runs, or is done (or unknown)."""

    state: Literal["waiting", "running", "done"]
    line: int = Field(description="Jobs in the queue.")
    doing: str
    seconds: float = Field(description="Since the request came.")
