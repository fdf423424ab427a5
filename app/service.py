"""The use cases behind every interface: a Job in, a plain JSON-able answer out."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from app.advice import Change, changes
from app.catalog.gpus import Gpu, all_gpus, find_gpu
from app.catalog.models import find_model
from app.errors import PlanError
from app.job import Job, OwnGpu, read_job
from app.memory.allocator import MIB, Settings
from app.memory.breakdown import Reading, read
from app.memory.event import KINDS, Books
from app.memory.fit import judge, passes
from app.memory.overheads import context

DEFAULT_GPU = "a100-80gb"
"""The card whose kernels are meant when a job names none."""

_NOT_YET = {
    "strategy": ("single", "several cards are not planned yet", "plan one card's share with strategy single"),
    "gpu_count": (1, "several cards are not planned yet", "set gpu_count to 1"),
    "nodes": (1, "several nodes are not planned yet", "set nodes to 1"),
}


def estimate(data: Any, *, all_layers: bool = False) -> dict:
    """The answer to one job: a dict of the fields of the wire format. Raises :class:`PlanError`."""
    job = read_job(data).resolved()
    _refuse_unplanned(job)
    gpu = _card_of(job)
    config, source = _config_of(job)
    traced = _trace(_key(job, config, gpu))
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
    _refuse_unplanned(job)
    if target == "r" and job.lora is None:
        raise PlanError("a job without adapters has no rank to solve for", "use method lora or qlora", "for")
    gpu = _card_of(job)
    config, _ = _config_of(job)
    settings = replace(_settings(job), limit=limit)
    tries: dict[int, bool] = {}

    def fits(value: int) -> bool:
        if value not in tries:
            tries[value] = passes(_books_of(_key(_with(job, target, value), config, gpu)), settings, placed=True)[0]
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
    _refuse_unplanned(job)
    gpu = _card_of(job)
    books = _books_of(_key(job, _config_of(job)[0], gpu))
    reading = read(books, _settings(job))
    verdict = _fit(gpu, gpu, books, reading, _settings(job))
    peak = {"allocated": reading.peak.peak, "reserved": reading.reserved, "phase": reading.peak.name}
    return {"peak": peak, **{key: verdict[key] for key in ("gpu", "verdict", "headroom", "margin", "breaks")}}


def _smallest_card(job: Job) -> str | None:
    """The catalogue's smallest card with the same kernels that takes the job as it is."""
    job = job.resolved()
    gpu = _card_of(job)
    books = _books_of(_key(job, _config_of(job)[0], gpu))
    reading = read(books, _settings(job))
    for card in _cards(gpu)[1:]:
        if _kernels_of(card)[0] == _kernels_of(gpu)[0]:
            if _fit(card, gpu, books, reading, _settings(job))["verdict"] == "fits":
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


def _refuse_unplanned(job: Job) -> None:
    for field, (only, message, hint) in _NOT_YET.items():
        if getattr(job, field) != only:
            raise PlanError(f"`{field}` is {getattr(job, field)!r}: {message}", hint, field)
    if job.attention == "flash_attention_2":
        raise PlanError(
            "flash_attention_2 is a package of its own that is not installed here", "use attention sdpa", "attention"
        )


def _card_of(job: Job) -> Gpu | OwnGpu:
    if isinstance(job.gpu, OwnGpu):
        return job.gpu
    return find_gpu(job.gpu or DEFAULT_GPU)


def _kernels_of(gpu: Gpu | OwnGpu) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors that are traced for a card; an own card has the default card's."""
    known = gpu if isinstance(gpu, Gpu) else find_gpu(DEFAULT_GPU)
    if known.compute_capability is None:
        raise PlanError(f"{known.name} runs ROCm, whose kernels are not modelled", "choose an NVIDIA card", "gpu")
    return known.compute_capability, known.sm_count or find_gpu(DEFAULT_GPU).sm_count


def _config_of(job: Job) -> tuple[dict, dict]:
    """config.json's object, and where it came from."""
    if job.config is not None:
        return job.config, {"kind": "inline", "id": None}
    name = job.model
    known = find_model(name)
    if known is not None:
        return dict(known.config), {"kind": "catalogue", "id": known.id}
    for path in (name, os.path.join(name, "config.json")):
        if os.path.isfile(path):
            return _read_file(path), {"kind": "file", "id": path}
    from app.hub import fetch_config

    return fetch_config(name, job.revision)


def _read_file(path: str) -> dict:
    size = os.path.getsize(path)
    if size > 4 * MIB:
        raise PlanError(f"{path} has {size} bytes: no config.json is that large", "name the model's own", "model")
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} cannot be read as JSON: {error}", "name a config.json", "model") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path} holds no JSON object", "name a config.json", "model")
    return data


def _key(job: Job, config: dict, gpu) -> str:
    """Everything that shapes a trace, as one string: the job without what only reads it, the config, the kernels."""
    shape = job.model_dump(exclude={"model", "config", "revision", "gpu", "allocator"})
    return json.dumps([shape, config, _kernels_of(gpu)], sort_keys=True, default=str)


@lru_cache(maxsize=64)
def _trace(key: str):
    """The dry run for a key; the last few are kept."""
    from app.dryrun.run import trace

    shape, config, (capability, multiprocessors) = json.loads(key)
    job = Job.model_validate({**shape, "config": config})
    return trace(job, config, tuple(capability), multiprocessors)


@lru_cache(maxsize=128)
def _books_of(key: str) -> Books:
    """The books alone for a key, without the tables."""
    from app.dryrun.run import books_of

    shape, config, (capability, multiprocessors) = json.loads(key)
    job = Job.model_validate({**shape, "config": config})
    return books_of(job, config, tuple(capability), multiprocessors)


def _answer(job: Job, gpu, source: dict, traced, all_layers: bool) -> dict:
    settings = _settings(job)
    reading = read(traced.books, settings)
    capability, _ = _kernels_of(gpu)
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


def _settings(job: Job) -> Settings:
    split = job.allocator.max_split_size_mb
    return Settings(job.allocator.expandable_segments, None if split is None else split * MIB)


def _cards(gpu) -> list:
    """The job's own card first, then every card whose kernels are modelled, smallest first."""
    rest = [card for card in all_gpus() if card.compute_capability is not None and card != gpu]
    return [gpu, *rest]


def _fit(card, asked, books: Books, reading: Reading, settings: Settings) -> dict:
    usable = card.memory_bytes if isinstance(card, OwnGpu) else card.total_memory
    capability = None if isinstance(card, OwnGpu) else card.compute_capability
    verdict = judge(books, reading, usable, context(capability), settings)
    same = _kernels_of(card)[0] == _kernels_of(asked)[0]
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


@lru_cache(maxsize=1)
def stack() -> dict[str, str]:
    """The versions that a plan is traced with."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
    return {"vramplan": version("vramplan"), **{name: version(name) for name in names}}
