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

    module: str
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
    """The step in order of its allocations."""

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


class Fit(_Open):
    """The verdict on one card."""

    gpu: str
    name: str
    memory_bytes: int
    verdict: Literal["fits", "tight", "does_not_fit"]
    limit: int = Field(description="What the allocator may reserve there.")
    headroom: int = Field(description="What is left; negative: what is missing.")
    margin: int = Field(description="Half the interval that the headroom lies in.")
    margin_source: str
    breaks: str | None = Field(description="The phase that runs out of memory.")
    same_kernels: bool = Field(description="The card runs the kernels that were planned.")


class Answer(_Open):
    """The plan of one job."""

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
    warnings: list[str]
    stack: dict[str, str] = Field(description="The versions that the plan was traced with.")


class Solved(_Open):
    """The largest of what was asked for (`batch_size`, `sequence_length` or `r`) whose step fits; 0: none does."""

    batch_size: int | None = None
    sequence_length: int | None = None
    r: int | None = None
    memory_limit_bytes: int
    tries: dict[int, bool] = Field(description="The values that were tried, and whether they fit.")


class Weighed(_Open):
    """A job's verdict on its card, and its peaks."""

    gpu: str
    verdict: Literal["fits", "tight", "does_not_fit"]
    headroom: int
    margin: int
    breaks: str | None
    peak: dict[str, int | str]


class Suggestion(Weighed):
    """A change of the job, planned: `change` are the fields to set."""

    title: str
    change: dict[str, Any]
    cost: str = Field(description="What it costs beside memory.")
    changes_objective: bool = Field(description="The training is another one then.")


class Advice(_Open):
    """Single changes that make the job fit, the least that one minds first; a pair where no single one does."""

    now: Weighed
    suggestions: list[Suggestion]
    pair: Suggestion | None
    smallest_card: str | None = Field(description="The smallest with the same kernels that takes the job as it is.")


class Weights(_Open):
    """What a model that cannot be planned weighs."""

    parameters: int
    bytes: int | None = Field(None, description="As loaded or as stored; left out where it cannot be known.")
    counted_from: str = Field(alias="from")


class Problem(BaseModel):
    """What was asked and what was found, and what to do next."""

    message: str
    hint: str
    field: str | None = Field(None, description="The field of the job that is at fault.")
    weights: Weights | None = None


class Failure(BaseModel):
    """A job that could not be planned."""

    error: Problem


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


class ModelRow(BaseModel):
    """A model of the catalogue, or one that the Hub's search finds, of which only the name is known."""

    id: str
    source: Literal["catalogue", "hub"]
    parameters: int | None = None
    model_type: str | None = None
    aliases: list[str] = []


class Health(BaseModel):
    """The service is up; `waiting` jobs stand in line."""

    status: Literal["ok"] = "ok"
    version: str
    waiting: int
