"""The use cases behind every interface: a Job in, a plain JSON-able answer out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from app.advice import Change, changes
from app.catalog.gpus import Gpu, all_gpus, find_gpu
from app.errors import PlanError
from app.job import Job, OwnGpu, read_job
from app.memory.allocator import Settings
from app.memory.breakdown import Reading, read
from app.memory.event import KINDS, Books
from app.memory.fit import judge, passes
from app.memory.overheads import context
from app.plan import (
    DEFAULT_GPU,
    books_of,
    card_of,
    config_of,
    kernels_of,
    key_of,
    refuse_unplanned,
    settings_of,
    stack,
    trace_of,
    with_weights,
)


def estimate(data: Any, *, all_layers: bool = False) -> dict:
    """The answer to one job: a dict of the fields of the wire format. Raises :class:`PlanError`."""
    job = read_job(data).resolved()
    refuse_unplanned(job)
    gpu = card_of(job)
    config, source = config_of(job)
    try:
        traced = trace_of(key_of(job, config, gpu))
    except PlanError as error:
        raise with_weights(error, job, source) from None
    return _answer(job, gpu, source, traced, all_layers)


SOLVED = ("batch_size", "sequence_length", "r")
"""What can be solved for: the number of sequences, the tokens of one, the rank of the adapters."""
CEILING = {"batch_size": 1 << 16, "sequence_length": 1 << 22, "r": 1 << 12}


def solve(data: Any, target: str = "batch_size") -> dict:
    """The largest ``target`` with which the job's step passes the replayed allocator under ``memory_limit_bytes``.

    The model is there already: the limit holds for the step. 0: none does. Doubling, then halving the gap; the answer
    passes and the next one does not, both replayed from steps of their own. Raises :class:`PlanError`.
    """
    if target not in SOLVED:
        raise PlanError(f"cannot solve for {target!r}", f"one of {', '.join(SOLVED)}", "for")
    data = dict(data) if isinstance(data, dict) else data
    limit = data.pop("memory_limit_bytes", None) if isinstance(data, dict) else None
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        raise PlanError(
            f"`memory_limit_bytes` should be a number of bytes (got {limit!r})",
            "24 GiB are 25769803776",
            "memory_limit_bytes",
        )
    job = read_job(data).resolved()
    refuse_unplanned(job)
    if target == "r" and job.lora is None:
        raise PlanError("a job without adapters has no rank to solve for", "use method lora or qlora", "for")
    gpu = card_of(job)
    config, _ = config_of(job)
    settings = replace(settings_of(job), limit=limit)
    tries: dict[int, bool] = {}

    def fits(value: int) -> bool:
        if value not in tries:
            tries[value] = passes(books_of(key_of(_with(job, target, value), config, gpu)), settings, placed=True)[0]
        return tries[value]

    return {target: _largest(fits, CEILING[target]), "memory_limit_bytes": limit, "tries": tries}


def advise(data: Any) -> dict:
    """Every single change that makes the job fit its card, re-planned, the least that a user would mind first; the
    best pair where no single one suffices; and the smallest card that takes the job as it is. Raises
    :class:`PlanError`, also where the job names no card.
    """
    job = read_job(data)
    if job.gpu is None:
        raise PlanError("advice is for a card, and the job names none", "set gpu", "gpu")
    now = _weigh(job)
    found, failed = [], []
    if now["verdict"] == "does_not_fit":
        for change in changes(job.resolved()):
            option = _option(job, (change,))
            if option is not None:
                (found if option["verdict"] != "does_not_fit" else failed).append((change, option))
        found.sort(key=lambda pair: (pair[0].changes_objective, pair[0].rank, -pair[1]["headroom"]))
    pair = None
    if now["verdict"] == "does_not_fit" and not found:
        failed.sort(key=lambda pair: pair[1]["peak"]["reserved"])
        for one, other in itertools.islice(itertools.combinations([change for change, _ in failed], 2), 12):
            pair = None if one.patch.keys() & other.patch.keys() else _option(job, (one, other))
            if pair is not None and pair["verdict"] != "does_not_fit":
                break
            pair = None
    return {
        "now": now,
        "suggestions": [option for _, option in found],
        "pair": pair,
        "smallest_card": _smallest_card(job),
    }


def _option(job: Job, parts: tuple[Change, ...]) -> dict | None:
    """``job`` with the changes, planned; None where the stack refuses it or nothing is saved."""
    patch = {key: value for change in parts for key, value in change.patch.items()}
    try:
        planned = _weigh(read_job({**job.model_dump(exclude_unset=True), **patch}))
    except PlanError:
        return None
    return {
        "title": " and ".join(change.title for change in parts),
        "change": patch,
        "cost": "; ".join(change.cost for change in parts),
        "changes_objective": any(change.changes_objective for change in parts),
        **planned,
    }


def _weigh(job: Job) -> dict:
    """The peaks of a job and its verdict on its own card."""
    job = job.resolved()
    refuse_unplanned(job)
    gpu = card_of(job)
    books = books_of(key_of(job, config_of(job)[0], gpu))
    reading = read(books, settings_of(job))
    verdict = _fit(gpu, gpu, books, reading, settings_of(job))
    peak = {"allocated": reading.peak.peak, "reserved": reading.reserved, "phase": reading.peak.name}
    return {"peak": peak, **{key: verdict[key] for key in ("gpu", "verdict", "headroom", "margin", "breaks")}}


def _smallest_card(job: Job) -> str | None:
    """The catalogue's smallest card with the same kernels that takes the job as it is."""
    job = job.resolved()
    gpu = card_of(job)
    books = books_of(key_of(job, config_of(job)[0], gpu))
    reading = read(books, settings_of(job))
    for card in _cards(gpu)[1:]:
        if kernels_of(card)[0] == kernels_of(gpu)[0]:
            if _fit(card, gpu, books, reading, settings_of(job))["verdict"] == "fits":
                return card.key
    return None


def _with(job: Job, target: str, value: int) -> Job:
    if target == "r":
        return job.model_copy(update={"lora": job.lora.model_copy(update={"r": value})})
    return job.model_copy(update={target: value})


def _largest(fits: Callable[[int], bool], ceiling: int) -> int:
    """The largest value up to ``ceiling`` that fits, where what fits has no larger value below it that does not.

    A value that the model cannot take at all (a length beyond its positions) ends the search from above.
    """

    def possible(value: int) -> bool:
        try:
            return fits(value)
        except PlanError:
            if value == 1:
                raise
            return False

    if not possible(1):
        return 0
    low = 1
    while low < ceiling and possible(min(2 * low, ceiling)):
        low = min(2 * low, ceiling)
    high = min(2 * low, ceiling + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return low


def _answer(job: Job, gpu, source: dict, traced, all_layers: bool) -> dict:
    settings = settings_of(job)
    reading = read(traced.books, settings)
    capability, _ = kernels_of(gpu)
    outside = context(capability)
    fits = [_fit(card, gpu, traced.books, reading, settings) for card in _cards(gpu)]
    layers = traced.layers if all_layers else traced.layer_groups
    load = reading.phases[0]
    return {
        "job": {**job.model_dump(exclude={"config"}, mode="json"), "attention": traced.facts["attention"]},
        "model": {**source, **{key: fact for key, fact in traced.facts.items() if key != "optimizer_state"}},
        "peak": {
            "allocated": reading.peak.peak,
            "reserved": reading.reserved,
            "process": reading.reserved + outside.expected,
            "process_interval": [reading.reserved + outside.low, reading.reserved + outside.high],
            "phase": reading.peak.name,
            "step": reading.peak.step,
            "module": reading.peak_module,
            "op": reading.peak_op,
        },
        "load": {"placed_allocated": reading.placed, "peak_allocated": load.peak, "peak_reserved": load.reserved},
        "optimizer_state": traced.facts["optimizer_state"],
        "phases": [
            {
                "step": phase.step,
                "name": phase.name,
                "allocated_start": phase.start,
                "allocated_end": phase.end,
                "peak_allocated": phase.peak,
                "peak_reserved": phase.reserved,
            }
            for phase in reading.phases
        ],
        "parts": reading.parts,
        "holders": [{"module": module, "kind": kind, "bytes": size} for module, kind, size in reading.holders],
        "timeline": {
            "kinds": list(KINDS),
            "points": [
                {**{k: v for k, v in asdict(point).items() if k != "kinds"}, "bytes": list(point.kinds)}
                for point in reading.timeline
            ],
        },
        "layers": [asdict(layer) for layer in layers],
        "fits": fits,
        "warnings": [*traced.warnings, *_card_warnings(gpu)],
        "stack": stack(),
    }


def _cards(gpu) -> list:
    """The job's own card first, then every card whose kernels are modelled, smallest first."""
    rest = [card for card in all_gpus() if card.compute_capability is not None and card != gpu]
    return [gpu, *rest]


def _fit(card, asked, books: Books, reading: Reading, settings: Settings) -> dict:
    usable = card.memory_bytes if isinstance(card, OwnGpu) else card.total_memory
    capability = None if isinstance(card, OwnGpu) else card.compute_capability
    verdict = judge(books, reading, usable, context(capability), settings)
    same = kernels_of(card)[0] == kernels_of(asked)[0]
    return {
        "gpu": card.name if isinstance(card, OwnGpu) else card.key,
        "name": card.name,
        "memory_bytes": usable,
        **asdict(verdict),
        "margin_source": f"{context(capability).source}; replay error of the measured rows",
        "same_kernels": same,
    }


def _card_warnings(gpu) -> list[str]:
    out = []
    if isinstance(gpu, OwnGpu):
        out.append(f"{gpu.name}: its kernels are unknown and taken to be those of {find_gpu(DEFAULT_GPU).name}")
    elif gpu.compute_capability != (9, 0):
        out.append(
            f"{gpu.name}: its kernels and workspaces are read from PyTorch's sources; "
            "measured were an H100's and an H200's"
        )
    if isinstance(gpu, Gpu) and not gpu.measured:
        out.append(f"{gpu.name}: its usable memory is derived from nvidia-smi's total, nobody's torch reported it")
    return out
