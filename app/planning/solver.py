"""Searches: the largest batch, length or rank that fits; the smallest card; the largest model.

What is searched may not be monotone: a kernel that takes over at some length, an alignment, can make a larger value
need less. So values beyond the edge are tried too, and the answer says which were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..catalog.gpus import Gpu
from ..catalog.models import MODELS
from ..errors import PlanError, near
from ..job import TARGETS, Job, OwnGpu, read_job
from ..memory.fit import Verdict, fits_under_limit
from .cards import budget_on, check_prices, every_card
from .fingerprint import NotTraced
from .planned_job import FITTING, PlannedJob, plan_job, step_fits_under, summary, verdict_on
from .profile_cache import load_of
from .resolve import allocator_config_of, card_of, config_of, resolved

LARGEST = {"batch_size": 1 << 16, "sequence_length": 1 << 22, "r": 1 << 12, "accumulation_free_batch": 1 << 16}
"""What the largest is sought of, with where the search ends."""
BEYOND = (1.25, 1.5, 2)
"""Where beyond the edge it is tried whether memory falls again, as multiples of the edge; and at the next multiples
of :data:`ALIGNED`."""
ALIGNED = (8, 64)
NEXT = 4
"""How many values just above, or below, an edge are tried one by one."""


def solve(data: Any, target: str = "batch_size") -> dict:
    """The largest ``batch_size``, ``sequence_length``, ``r`` or ``accumulation_free_batch`` of a job that fits; the
    smallest ``gpu`` for it, or the fewest cards (``gpu_count``); or the largest ``model`` of the catalogue.

    ``data`` is a job and, beside its fields, ``memory_limit_bytes`` (the allocator's, the model being there already)
    where the job's card is not meant, ``multiple_of`` for what is to be a multiple of something, and ``prices`` by
    card. Raises :class:`PlanError`.
    """
    if target not in TARGETS:
        raise PlanError(f"cannot solve for {target!r}", near(target, TARGETS), "for")
    if not isinstance(data, dict):
        data = read_job(data).model_dump(exclude_unset=True)
    data = dict(data)
    limit = _whole(data.pop("memory_limit_bytes", None), "memory_limit_bytes", 0, "24 GiB are 25769803776")
    step = _whole(data.pop("multiple_of", None), "multiple_of", 1, "lengths are often multiples of 64")
    prices = data.pop("prices", None)
    if target == "gpu":
        return smallest_card(read_job(data), None if prices is None else check_prices(prices, "`prices`"))
    if target == "model":
        return largest_model(data)
    job = resolved(read_job(data))
    if target == "gpu_count":
        return _fewest_cards(job, limit)
    if target == "r" and job.lora is None:
        raise PlanError("a job without adapters has no rank to solve for", "use method lora or qlora", "for")
    if target == "sequence_length" and job.sequence_length is None:
        raise PlanError("this job has no length to solve for", "set sequence_length, or solve for batch_size", "for")
    if target == "sequence_length" and job.prompt_length is not None:
        raise PlanError(
            f"objective {job.objective} has two lengths: which of them is to grow, nobody says",
            "set prompt_length and completion_length, and solve for batch_size",
            "for",
        )
    return _largest_of(job, target, limit, step or _group(job, target))


def _group(job: Job, target: str) -> int:
    """How many sequences go together: a batch that generates is whole groups of completions."""
    if target not in ("batch_size", "accumulation_free_batch") or job.trainer != "trl" or not job.goal.generates:
        return 1
    return int(job.trainer_args.get("num_generations", job.goal.generations))


class _Tries:
    """The values of one field that a search tries, each planned when it is first asked for."""

    def __init__(self, job: Job, target: str, limit: int | None, step: int):
        self.job, self.target, self.limit, self.step = job, target, limit, step
        self.verdicts: dict[int, Verdict | None] = {}
        self.passed: dict[int, bool] = {}

    def plan_job(self, count: int) -> PlannedJob:
        return plan_job(_with(self.job, self.target, count * self.step))

    def verdict(self, count: int) -> Verdict | None:
        """The verdict on a value, by the card or by the limit; None: the model cannot take the value."""
        if count not in self.verdicts:
            try:
                self.verdicts[count] = self._judge(self.plan_job(count))
            except NotTraced:
                raise
            except PlanError:
                if count == 1:
                    raise
                self.verdicts[count] = None
        return self.verdicts[count]

    def _judge(self, planned: PlannedJob) -> Verdict:
        if self.limit is None:
            return verdict_on(planned, planned.card)
        needed = planned.summary.reserved
        spare = self.limit - needed
        word = "fits" if spare >= 0 else "tight"
        return Verdict(word, self.limit, needed, spare, (spare, spare), 0, "the limit that was given")

    def over(self, count: int) -> int | None:
        """Bytes by which the allocator, left alone, reserves more than there is; 0 and less: it fits."""
        found = self.verdict(count)
        return None if found is None else -_spare(found)

    def over_surely(self, count: int) -> int | None:
        found = self.verdict(count)
        return None if found is None else found.margin - _spare(found)

    def passes(self, count: int) -> bool:
        """Whether the replay passes; the allocator may give back its unused cache."""
        if count not in self.passed:
            found = self.verdict(count)
            if found is None or found.verdict == "does_not_fit":
                self.passed[count] = False
            elif self.limit is not None and _spare(found) < 0:
                self.passed[count] = step_fits_under(self.plan_job(count), self.limit)
            else:
                self.passed[count] = True
        return self.passed[count]


def _spare(verdict: Verdict) -> int:
    return verdict.limit - verdict.needed


def _largest_of(job: Job, target: str, limit: int | None, step: int) -> dict:
    _needs_memory(job, limit)
    tries = _Tries(job, target, limit, step)
    ceiling, first = LARGEST[target] // step, _value(job, target) // step
    alone = largest_fitting(tries.over, ceiling, first)
    found = largest_passing(tries.passes, alone, ceiling)
    out: dict[str, Any] = {target: found * step}
    if limit is None:
        sure = largest_fitting(tries.over_surely, ceiling, max(alone, 1))
        out |= {"sure": sure * step, "gpu": card_name(job)}
    one = tries.verdict(1)
    out["memory_limit_bytes"] = one.limit if one else None
    if target == "accumulation_free_batch" and found:
        out["gradient_accumulation_steps"] = -(-job.batch_size * job.gradient_accumulation_steps // found)
    alone_fit = {count: True for count, verdict in tries.verdicts.items() if verdict and _spare(verdict) >= 0}
    checked = {count * step: fits for count, fits in sorted((alone_fit | tries.passed).items())}
    return {**out, "tries": checked, "refused": [count * step for count, v in tries.verdicts.items() if v is None]}


COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Cards that are tried together: what one machine has, then whole machines of eight."""


def _fewest_cards(job: Job, limit: int | None) -> dict:
    """The fewest of :data:`COUNTS` cards, in the job's nodes, of which each holds its rank.

    A rank needs less of more cards: the counts are halved. What the strategy or the model does not divide into is left
    out. Raises :class:`PlanError`.
    """
    if job.strategy == "single":
        raise PlanError(
            "strategy single takes one card", "set strategy to fsdp2, zero3 or another of many cards", "for"
        )
    _needs_memory(job, limit)
    nodes, tries = job.nodes, _Tries(job, "gpu_count", limit, 1)
    reasons: dict[int, PlanError] = {}

    def passes(count: int) -> bool | None:
        try:
            tries.plan_job(count)
        except NotTraced:
            raise
        except PlanError as error:
            reasons[count] = error
            return None
        return tries.passes(count)

    left = [count for count in COUNTS if not count % nodes]
    found = 0
    while left:
        at = len(left) // 2
        fits = passes(left[at])
        if fits is None:
            del left[at]
        elif fits:
            found, left = left[at], left[:at]
        else:
            left = left[at + 1 :]
    if not tries.passed:
        raise next(iter(reasons.values()))
    one = next(verdict for verdict in tries.verdicts.values() if verdict)
    return {
        "gpu_count": found,
        "gpu": card_name(job),
        "memory_limit_bytes": one.limit,
        "tries": dict(sorted(tries.passed.items())),
        "refused": sorted(reasons),
    }


def _needs_memory(job: Job, limit: int | None) -> None:
    """Raise :class:`PlanError` where neither a card nor a limit says how much memory there is."""
    if limit is None and job.gpu is None:
        raise PlanError(
            "nothing says how much memory there is: neither `gpu` nor `memory_limit_bytes`",
            "name a card, or the bytes that the allocator may hold: 24 GiB are 25769803776",
            "memory_limit_bytes",
        )


def card_name(job: Job) -> str | None:
    """The card that a job names, by its key or its own name."""
    return job.gpu.name if isinstance(job.gpu, OwnGpu) else job.gpu


def _whole(value: Any, field: str, least: int, hint: str) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise PlanError(f"`{field}` should be a whole number from {least} on (got {value!r})", hint, field)
    return value


def _value(job: Job, target: str) -> int:
    if target == "accumulation_free_batch":
        return job.batch_size * job.gradient_accumulation_steps
    value: int = job.lora.r if target == "r" and job.lora else getattr(job, target)
    return value


def _with(job: Job, target: str, value: int) -> Job:
    if target == "r" and job.lora:
        return job.model_copy(update={"lora": job.lora.model_copy(update={"r": value})})
    if target == "accumulation_free_batch":
        return job.model_copy(update={"batch_size": value, "gradient_accumulation_steps": 1})
    return job.model_copy(update={target: value})


Over = Callable[[int], int | None]


def largest_fitting(over: Over, ceiling: int, first: int) -> int:
    """The largest value up to ``ceiling`` with which ``over`` is 0 or less; 0: none is.

    ``over`` (None: impossible) grows with the value, nearly in a line, but for kernels that take over somewhere: so the
    search interpolates from ``first``, a good guess, and when it has a value that fits beside one that does not, it
    looks further beyond (:data:`BEYOND`, :data:`ALIGNED`), and goes on from there if it finds that memory has fallen.
    """

    def fits(value: int) -> bool:
        found = over(value)
        return found is not None and found <= 0

    if not fits(1):
        return 0
    low, high, guess = 1, None, min(max(first, 2), ceiling)
    while True:
        while high is None and low < ceiling:
            if fits(guess):
                low, guess = guess, min(_outward(over, low, guess), ceiling)
            else:
                high = guess
        halve = False
        while high is not None and high - low > 1:
            at, gap = (low + high) // 2 if halve else _between(over, low, high), high - low
            low, high = (at, high) if fits(at) else (low, at)
            halve = not halve and 2 * (high - low) > gap
        beyond = {-(-(low + 2) // of) * of for of in ALIGNED} | {int(low * factor) + 1 for factor in BEYOND}
        again = next((value for value in sorted(beyond) if low + 1 < value <= ceiling and fits(value)), None)
        if again is None:
            return low
        low, high, guess = again, None, min(again + 1, ceiling)


def largest_passing(passes: Callable[[int], bool], low: int, ceiling: int) -> int:
    """A value from ``low`` upwards that passes while the next one does not.

    There the order of a few blocks decides, and one length may pass where its neighbours do not: so every one of the
    next few is tried, and farther up, where the search doubles its stride and halves the gap, a value counts only if
    those just below it pass as well.
    """

    def steadily(value: int) -> bool:
        return all(passes(value - below) for below in range(NEXT))

    for value in range(low + 1, min(low + NEXT, ceiling) + 1):
        if not passes(value):
            return value - 1
    low, stride = min(low + NEXT, ceiling), NEXT
    while low + stride <= ceiling and steadily(low + stride):
        low, stride = low + stride, 2 * stride
    high = min(low + stride, ceiling + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if steadily(middle) else (low, middle)
    return low


def _outward(over: Over, before: int, low: int) -> int:
    """An estimate of the first value that does not fit, by the line through two values that fit."""
    then, now = over(before), over(low)
    if then is not None and now is not None and before < low and then < now < 0:
        return min(max(low - now * (low - before) // (now - then) + 1, low + 1), 8 * low)
    return 2 * low


def _between(over: Over, low: int, high: int) -> int:
    """The value at which the line between two values crosses 0."""
    under, above = over(low), over(high)
    if under is None or above is None or under == above:
        return (low + high) // 2
    return min(max(low - under * (high - low) // (above - under), low + 1), high - 1)


def smallest_card(job: Job, prices: dict[str, float] | None = None) -> dict:
    """The smallest card of the catalogue that takes ``job`` as it is, planned with its own kernels, and the next
    smaller one, which does not; with ``prices``, every priced card that does, the cheapest first.
    """
    base = plan_job(job)
    cards = [card for card in every_card() if card.bf16 or not base.job.in_bfloat16]

    def on(card: Gpu) -> dict:
        """The summary on a card: planned with its own kernels, or by the base's where those cannot be traced here."""
        try:
            return summary(plan_job(job.model_copy(update={"gpu": card.key})))
        except NotTraced:
            return {**summary(base, card), "same_kernels": False}

    if prices is not None:
        ranked = [{"price": prices[card.key], **on(card)} for card in cards if card.key in prices]
        ranked.sort(key=lambda row: (row["verdict"] not in FITTING, row["price"]))
        found = ranked[0]["gpu"] if ranked and ranked[0]["verdict"] in FITTING else None
        return {"gpu": found, "cards": ranked}
    likely = [verdict_on(base, card).verdict in FITTING for card in cards]
    at = likely.index(True) if True in likely else len(cards)
    while at < len(cards) and on(cards[at])["verdict"] not in FITTING:
        at += 1
    while at > 0 and on(cards[at - 1])["verdict"] in FITTING:
        at -= 1
    rows = [on(card) for card in cards[max(at - 1, 0) : at + 1]]
    return {"gpu": cards[at].key if at < len(cards) else None, "cards": rows}


def _loads(job: Job, card: Gpu | OwnGpu, limit: int) -> bool | None:
    """Whether the model alone can be loaded within ``limit`` bytes; None: the job's fields do not suit the model."""
    try:
        return fits_under_limit(load_of(job, config_of(job)[0], card), replace(allocator_config_of(job), limit=limit))[
            0
        ]
    except NotTraced:
        raise
    except PlanError:
        return None


def largest_model(data: dict) -> dict:
    """The model of the catalogue with the most parameters with which the job (that names none) fits its card.

    Every larger one is ruled out: by its weights alone, else by its step. Models that the job's fields do not suit are
    passed over.
    """
    if data.get("model") is not None or data.get("config") is not None:
        raise PlanError("the largest model is sought, and the job names one", "leave model out", "model")
    if data.get("gpu") is None:
        raise PlanError("the largest model is sought for a card, and the job names none", "set gpu", "gpu")
    asked = read_job({**data, "model": MODELS[0].id})
    job = resolved(asked)
    card = card_of(job)
    limit = budget_on(card, job.reserve, 0, job).limit
    plain = 4.0 if job.dtype == "float32" else 2.0
    smallest = plain if job.quantizer is None else job.quantizer.least_bytes
    tries, refused, last = [], 0, None
    for model in sorted(MODELS, key=lambda model: -model.parameters):
        if model.parameters * smallest > limit or last == model.facts:
            continue
        last = model.facts
        mine = resolved(asked.model_copy(update={"model": model.id}))
        loads = _loads(mine, card, limit)
        refused += loads is None
        if not loads:
            continue
        try:
            found = summary(plan_job(mine))
        except NotTraced:
            raise
        except PlanError:
            refused += 1
            continue
        tries.append({"model": model.id, "parameters": model.parameters, **found})
        if found["verdict"] in FITTING:
            return {"model": model.id, "parameters": model.parameters, "gpu": card_name(job), "tries": tries,
                    "refused": refused}  # fmt: skip
    return {"model": None, "parameters": 0, "gpu": card_name(job), "tries": tries, "refused": refused}
