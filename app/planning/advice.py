"""Changes that make a job fit: patches of the job's fields, each planned, with what it costs beside memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import PlanError
from ..job import Job, read_job
from ..registry.optimizers import JOIN, Optimizer, optimizer_of
from .cards import known
from .fingerprint import NotTraced
from .planned_job import FITTING, PlannedJob, plan_job, summary, written
from .solver import smallest_card


@dataclass(frozen=True)
class Change:
    """Patches of the job's fields, from the least to the most that one rule would change: the first that fits is taken.

    ``cost`` is what a user pays beside memory, ``flops`` by how much of the step's products with weights more is
    computed (1: as much again). ``rank`` orders what fits: the least that a user would mind first.
    """

    title: str
    patches: tuple[dict[str, Any], ...]
    cost: str
    changes_objective: bool
    rank: int
    flops: float = 0.0


def _optimizer(job: Job) -> Optimizer:
    """The facts of the optimiser of a job (resolved); of two joined ones, none that could be changed."""
    name = job.optimizer or job.whose.optimizer
    return Optimizer() if JOIN in name else optimizer_of(name)


def _fused(job: Job) -> Change | None:
    fused = _optimizer(job).fused
    if fused is None:
        return None
    return Change("fused AdamW", ({"optimizer": fused},), "one kernel instead of many", False, 0)


def _expandable(job: Job) -> Change | None:
    if job.allocator.expandable_segments:
        return None
    patch = {"allocator": {**job.allocator.model_dump(), "expandable_segments": True}}
    return Change("expandable segments", (patch,), "PYTORCH_ALLOC_CONF=expandable_segments:True", False, 0)


def _sdpa(job: Job) -> Change | None:
    if job.attention != "eager":
        return None
    return Change("sdpa attention", ({"attention": "sdpa"},), "fused kernels: the scores are not kept", False, 0)


def _double_quant(job: Job) -> Change | None:
    given = job.quantization
    if given is None or job.quantizer is None or given.double_quant or not job.quantizer.nests:
        return None
    patch = {"quantization": {**given.model_dump(), "double_quant": True}}
    return Change("double quantisation", (patch,), "its constants are dequantised too, in each pass", False, 1)


def _autocast(job: Job) -> Change | None:
    """float32 activations: the loop's own, or those of norms that ``prepare_model_for_kbit_training`` made float32."""
    wide = job.dtype == "float32" or job.prepare_for_kbit_training
    if job.mixed_precision != "no" or job.method == "inference" or not wide:
        return None
    return Change("bf16 autocast", ({"mixed_precision": "bf16"},), "matrix products in bf16, not float32", False, 1)


def _bf16_weights(job: Job) -> Change | None:
    if job.dtype != "float32":
        return None
    full = job.method == "full"
    cost = "weights and their updates are rounded to bf16" if full else "the frozen weights are rounded to bf16"
    return Change("weights in bf16", ({"dtype": "bfloat16"},), cost, full, 4)


def _checkpointing(job: Job) -> Change | None:
    if job.gradient_checkpointing != "off" or job.method == "inference":
        return None
    # A weight's products: forward 1, the gradient of its input 1, its own gradient 1 if it is trained.
    share = 1 / 3 if job.method == "full" else 1 / 2
    patch = {"gradient_checkpointing": "non_reentrant"}
    return Change("gradient checkpointing", (patch,), "the forward pass is computed again", False, 2, share)


def _accumulate(job: Job) -> Change | None:
    if job.batch_size < 2 or job.method == "inference":
        return None
    total = job.batch_size * job.gradient_accumulation_steps
    sizes = (size for size in range(job.batch_size - 1, 0, -1) if total % size == 0)
    patches = tuple({"batch_size": size, "gradient_accumulation_steps": total // size} for size in sizes)
    return Change("smaller batch, accumulated", patches, "the same gradients in more, smaller passes", False, 2)


def _one_sequence(job: Job) -> Change | None:
    if job.batch_size < 2 or job.method != "inference":
        return None
    return Change("smaller batch", _halves("batch_size", job.batch_size, 1), "fewer sequences at a time", False, 3)


def _chunked_loss(job: Job) -> Change | None:
    if job.whose.chunks_loss or job.method == "inference" or job.task not in (None, "causal-lm"):
        return None
    patch = {"trainer": "trl", "mixed_precision": "bf16"}
    return Change("TRL's chunked loss", (patch,), "logits are computed twice, in tiles; SFTTrainer's step", False, 3)


def _eight_bit(job: Job) -> Change | None:
    eight_bit = _optimizer(job).eight_bit
    if job.method == "inference" or eight_bit is None:
        return None
    return Change("8-bit AdamW", ({"optimizer": eight_bit},), "states rounded to 8 bits, in blocks of 256", False, 3)


def _paged(job: Job) -> Change | None:
    paged = _optimizer(job).paged
    if job.method == "inference" or paged is None:
        return None
    patch = {"optimizer": paged}
    cost = "states of 8 bits that move to the host when the card is full: over PCIe, there and back"
    return Change("paged 8-bit AdamW", (patch,), cost, False, 4)


def _qlora(job: Job) -> Change | None:
    if job.method != "lora":
        return None
    patch = {
        "method": "qlora",
        "quantization": {"type": "nf4", "double_quant": True},
        "prepare_for_kbit_training": None,
    }
    return Change("NF4 weights (QLoRA)", (patch,), "weights rounded to 4 bits, dequantised in each pass", True, 5)


def _served_in_four_bits(job: Job) -> Change | None:
    if job.method != "inference" or job.quantization is not None:
        return None
    patch = {"quantization": {"type": "nf4", "double_quant": True}}
    return Change("NF4 weights", (patch,), "weights rounded to 4 bits, dequantised in each pass", True, 5)


_ADAPTERS = {"r": 16, "alpha": 32, "target_modules": "all-linear"}


def _lora(job: Job) -> Change | None:
    if job.method != "full":
        return None
    patch = {"method": "lora", "lora": _ADAPTERS}
    return Change("LoRA instead of full", (patch,), "adapters of rank 16 are trained, the weights are not", True, 6)


def _quantized(job: Job) -> Change | None:
    if job.method != "full":
        return None
    patch = {"method": "qlora", "lora": _ADAPTERS}
    return Change("QLoRA instead of full", (patch,), "4-bit weights and adapters of rank 16", True, 7)


def _shorter(job: Job) -> Change | None:
    if job.sequence_length is None or job.sequence_length < 2 or job.prompt_length is not None:
        return None
    patches = _halves("sequence_length", job.sequence_length, min(job.sequence_length // 2, 64))
    return Change("shorter sequences", patches, "longer examples are cut", True, 8)


def _halves(field: str, value: int, least: int) -> tuple[dict[str, int], ...]:
    """Patches to three quarters, a half, and so on down to ``least``."""
    values = itertools.chain.from_iterable((3 * value >> n + 2, value >> n + 1) for n in range(value.bit_length()))
    return tuple({field: smaller} for smaller in dict.fromkeys(values) if least <= smaller < value)


_RULES: tuple[Callable[[Job], Change | None], ...] = (
    _fused, _expandable, _sdpa, _double_quant, _autocast, _bf16_weights, _checkpointing, _accumulate, _one_sequence,
    _chunked_loss, _eight_bit, _paged, _qlora, _served_in_four_bits, _lora, _quantized, _shorter,
)  # fmt: skip
ANOTHER_CARD = 9
"""The rank of another card: what is asked for is how the job fits the one that is there."""


def changes(job: Job) -> Iterator[Change]:
    """The single changes that ``job`` (resolved) leaves open; what each saves is for a plan to say."""
    return (change for change in (rule(job) for rule in _RULES) if change is not None)


def advise(data: Any) -> dict:
    """Every single change that makes the job fit its card, re-planned, the least that a user would mind first; the
    best pair where no single one suffices; and the smallest card that takes the job as it is. Raises
    :class:`PlanError`, also where the job names no card.
    """
    job = read_job(data)
    if job.gpu is None:
        raise PlanError("advice is for a card, and the job names none", "set gpu", "gpu")
    now = plan_job(job)
    out: dict[str, Any] = {"now": summary(now), "suggestions": [], "pair": None}
    card = smallest_card(job)["gpu"]
    if out["now"]["verdict"] not in FITTING:
        untraced: list[str] = []
        found, failed = _planned_changes(now, job, untraced)
        out["suggestions"] = [option for _, option in sorted(found, key=_order)]
        if not found:
            out["pair"] = _pair(now, job, failed, untraced)
        if card is not None:
            change = Change("another card", ({"gpu": card},), "its price", False, ANOTHER_CARD)
            _, option = _first_that_fits(now, job, (change,), untraced)
            out["suggestions"] += [option] if option else []
        out |= {"untraced": untraced} if untraced else {}
    return {**out, "smallest_card": card, "merged": merged(now)}


Options = list[tuple[Change, dict]]


def _planned_changes(now: PlannedJob, job: Job, untraced: list[str]) -> tuple[Options, Options]:
    """The single changes with which the job fits, and those with which it still does not, each planned."""
    found: Options = []
    failed: Options = []
    for change in changes(now.job):
        fits, option = _first_that_fits(now, job, (change,), untraced)
        if option is not None:
            (found if fits else failed).append((change, option))
    return found, failed


def merged(planned: PlannedJob) -> dict | None:
    """The summary of generating with the merged model on the same card, or its ``error``; None: the job trains no
    adapter."""
    job = planned.job
    if job.method not in ("lora", "qlora"):
        return None
    kept = {name: getattr(job, name) for name in ("model", "config", "revision", "task", "dtype", "attention", "gpu")}
    run = {"method": "inference", "sequence_length": job.sequence_length, "reserve": job.reserve}
    try:
        return summary(plan_job(read_job({**kept, **run, "allocator": job.allocator})))
    except PlanError as error:
        return {"error": error.as_dict()}


def _order(entry: tuple[Change, dict]) -> tuple:
    change, option = entry
    return change.changes_objective, option["verdict"] != "fits", change.rank, -option["headroom"]


def _pair(now: PlannedJob, job: Job, failed: Options, untraced: list[str]) -> dict | None:
    """The best two changes of those that save most: of the pairs that fit, the least that a user would mind."""
    failed.sort(key=lambda entry: entry[1]["peak"]["reserved"])
    fitting = []
    for (one, _), (other, _) in itertools.islice(itertools.combinations(failed, 2), 15):
        if not one.patches[-1].keys() & other.patches[-1].keys():
            fits, option = _first_that_fits(now, job, (one, other), untraced)
            if fits and option is not None:
                objective, rank = one.changes_objective or other.changes_objective, one.rank + other.rank
                fitting.append(((objective, option["verdict"] != "fits", rank), option))
    return min(fitting, key=lambda entry: entry[0])[1] if fitting else None


def _first_that_fits(
    now: PlannedJob, job: Job, parts: tuple[Change, ...], untraced: list[str]
) -> tuple[bool, dict | None]:
    """The least patch of the changes with which ``job`` fits, planned, else the greatest; None: it is refused, or
    cannot be traced here: then ``untraced`` gets its title."""
    option, title = None, " and ".join(change.title for change in parts)
    for patches in itertools.zip_longest(*(change.patches for change in parts)):
        chosen = [patch or change.patches[-1] for patch, change in zip(patches, parts, strict=True)]
        patch = {key: value for one in chosen for key, value in one.items()}
        try:
            planned = plan_job(read_job({**job.model_dump(exclude_unset=True), **patch}))
            found = summary(planned)
        except NotTraced:
            untraced += [] if title in untraced else [title]
            continue
        except PlanError:
            continue
        option = {
            "title": title,
            "change": patch,
            "cost": "; ".join(change.cost for change in parts),
            "changes_objective": any(change.changes_objective for change in parts),
            "flops_added": round(sum(change.flops for change in parts), 3),
            **_traffic(now, planned),
            **found,
        }
        if found["verdict"] in FITTING:
            return True, option
    return False, option


def _traffic(now: PlannedJob, planned: PlannedJob) -> dict:
    """The additional bytes that a steady step writes, and the least time that takes at the card's bandwidth. It is a
    lower bound, for what is written is read again."""
    more = written(planned) - written(now)
    chip = known(planned.card)
    return {
        "bytes_written_added": more,
        "seconds_at_least": round(more / chip.bandwidth_gbs / 1e9, 6) if chip and more > 0 else 0.0,
    }
