"""One run for every batch and length of its kind: what a profile says of another job is what a run of that job says."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vramplan.catalog.gpus import Gpu, find_gpu
from vramplan.dryrun.cuda.bitsandbytes_ops import gemm_4bit_is_fused
from vramplan.dryrun.cuda.card_facts import Card
from vramplan.dryrun.symbols import Conditions, symbol
from vramplan.dryrun.trace import trace
from vramplan.job import read_job
from vramplan.memory.profile import Profile
from vramplan.memory.sizes import SYMBOLS, ShapePoint, Size, compiled, decide, floordiv, function, remainder, text_of
from vramplan.planning.cards import every_card
from vramplan.planning.resolve import config_of, kernels_of, shape_point_of

from tests.tiny import LLAMA

pytestmark = pytest.mark.usefixtures("sandbox")

WINDOW = {
    **LLAMA,
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "sliding_window": 700,
    "max_position_embeddings": 4096,
}
LIMIT = {"gpt2": 1024, "bert-base-uncased": 512, "t5-small": 512}
JOBS = [
    {"model": "qwen2.5-0.5b", "method": "full"},
    {"model": "llama-3.2-1b", "method": "qlora"},
    {"model": "smollm2-360m", "method": "lora", "trainer": "trl"},
    {"model": "gemma-2-2b", "method": "lora", "attention": "eager"},
    {"model": "gpt2", "method": "full", "trainer": "transformers", "optimizer": "adamw_8bit"},
    {"model": "bert-base-uncased", "method": "full", "dtype": "float32", "attention_mask": "padded"},
    {"model": "vit-base-patch16-224-in21k", "method": "full", "gpu": "rtx-4090"},
    {"model": "t5-small", "method": "full", "gpu": "t4"},
    {"config": WINDOW, "method": "full", "trainer": "pytorch", "gradient_checkpointing": "reentrant"},
    {"model": "llama-3.2-1b", "method": "inference", "sequence_length": 100, "new_tokens": 3},
]


def traced(job, general: bool) -> Profile:
    config = config_of(job)[0]
    return trace(job.resolved(config), config, *kernels_of(find_gpu(job.gpu)), general=general)


def traced_with_numbers(job) -> Profile:
    """Without any symbol, the card's multiprocessors included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vramplan.dryrun.trace.symbol", lambda name, value, seen: value)
        return traced(job, general=False)


@cache
def points(number: int, count: int) -> list[tuple[int, int, Gpu]]:
    """Batches, lengths, and cards with the same kernels."""
    dice = random.Random(number)
    fixed = JOBS[number].get("sequence_length")
    most = LIMIT.get(JOBS[number].get("model"), 3000)
    kernels = find_gpu(JOBS[number].get("gpu", "h100-80gb")).compute_capability
    cards = [card for card in every_card() if card.compute_capability == kernels]
    return [(dice.randint(1, 40), fixed or dice.randint(2, most), dice.choice(cards)) for _ in range(count)]


def check(number: int, count: int) -> tuple[int, int]:
    """How many points were right, and how many runs it took to know them."""
    known: list[Profile] = []
    for batch, length, card in points(number, count):
        task = {"batch_size": batch, "sequence_length": length, "gpu": card.key}
        if "vit" in JOBS[number].get("model", ""):
            task.pop("sequence_length")
        job = read_job({**JOBS[number], **task})
        point = shape_point_of(job, card)
        profile = next((p for p in known if p.template.holds(point)), None)
        if profile is None:
            profile = traced(job, general=True)
            assert profile.template.holds(point)
            known.append(Profile.load(profile.dump()))
        fresh = traced_with_numbers(job)
        mine, theirs = profile.template.at(point), fresh.template.at(point)
        assert (mine.template.events == theirs.template.events).all()
        assert (mine.sizes == theirs.sizes).all()
        assert mine.trace_log() == theirs.trace_log()
        assert profile.table.at(point, every=True) == fresh.table.at(point, every=True)
        assert profile.facts == fresh.facts and profile.warnings == fresh.warnings
    return count, len(known)


SLOW = ("qwen2.5-0.5b", "smollm2-360m", "gemma-2-2b", "t5-small")
"""Models of which the jobs like theirs above take long; twenty points of each are slow, too."""


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(
            number,
            id=f"{job.get('model', 'window')}-{job['method']}",
            marks=[pytest.mark.slow] if job.get("model") in SLOW else [],
        )
        for number, job in enumerate(JOBS)
    ],
)
def test_another_batch_or_length_is_what_a_run_says(number):
    check(number, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", range(len(JOBS)), ids=[f"{job.get('model', 'window')}-{job['method']}" for job in JOBS]
)
def test_twenty_random_points(number):
    points_right, runs = check(number, 20)
    print(f"{points_right} points from {runs} runs")


def test_a_few_runs_know_every_length_of_a_usual_job():
    """Where bitsandbytes multiplies packed weights another way, or a reduction is split, its own rules say for all."""
    known: list[Profile] = []
    for length in range(8, 3000, 8):
        job = read_job({"model": "llama-3.2-1b", "method": "qlora", "sequence_length": length, "gpu": "a100-80gb"})
        if not any(profile.template.holds(shape_point_of(job, find_gpu("a100-80gb"))) for profile in known):
            known.append(traced(job, general=True))
    assert len(known) <= 6 and all(profile.covers_many_points for profile in known[1:])


@given(
    st.sampled_from([(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from(
        [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (256, 2048), (2048, 512), (128256, 512)]
    ),
    st.tuples(st.integers(1, 1700), st.sampled_from([20, 46, 84, 108, 132, 170])),
    st.lists(st.tuples(st.integers(1, 1700), st.integers(1, 200)), min_size=8, max_size=8),
)
def test_an_answer_is_one_condition_whatever_the_way_to_it(capability, dtype, shape, point, others):
    """Where the condition holds the answer is the same, and nowhere else."""
    conditions = Conditions()
    card = Card(capability, symbol("m", point[1], conditions))
    found = gemm_4bit_is_fused(card, dtype, symbol("s", point[0], conditions), *shape, 64)
    for rows, multiprocessors in (point, *others):
        same = found == gemm_4bit_is_fused(Card(capability, multiprocessors), dtype, rows, *shape, 64)
        assert all(compiled(conditions)(ShapePoint(1, rows, multiprocessors))) == same


NUMBERS = st.recursive(
    st.one_of(st.integers(0, 3000), st.sampled_from([*map(Size.symbol, SYMBOLS)])),
    lambda inner: st.tuples(st.sampled_from("+-*/%Mm"), inner, inner),
    max_leaves=6,
)


def _computed(tree, symbols):
    if not isinstance(tree, tuple):
        return symbols.get(text_of(tree), tree)
    sign, left, right = tree
    left, right = _computed(left, symbols), _computed(right, symbols)
    plain = not isinstance(left, Size) and not isinstance(right, Size)
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    if sign in "/%":
        right = right * right + 7
        return (
            (left // right if sign == "/" else left % right)
            if plain
            else (floordiv if sign == "/" else remainder)(left, right)
        )
    return (
        (max if sign == "M" else min)(left, right) if plain else function("max" if sign == "M" else "min", left, right)
    )


@given(NUMBERS, st.integers(1, 64), st.integers(1, 9000), st.integers(1, 160))
def test_sizes_are_what_integers_are(tree, batch, length, multiprocessors):
    """Any arithmetic with symbols, kept as text and compiled, gives what it gives with numbers; and what is said to
    hold everywhere holds here."""
    general = _computed(tree, {})
    exact = _computed(tree, {"b": batch, "s": length, "m": multiprocessors})
    assert compiled([text_of(general)])(ShapePoint(batch, length, multiprocessors)) == [exact]
    for comparison in ("==", "!=", "<", "<=", ">", ">="):
        always = decide(comparison, general)
        assert always is None or always == eval(f"{exact} {comparison} 0")


def test_damaged_bytes_are_no_profile():
    data = bytearray(
        traced(
            read_job({"config": LLAMA, "method": "full", "trainer": "pytorch", "sequence_length": 64, "gpu": "h100"}),
            general=False,
        ).dump()
    )
    assert Profile.load(bytes(data)).template.events.dtype == np.int32
    for at in range(0, len(data), max(1, len(data) // 40)):
        broken = bytes(data[:at]) + bytes([data[at] ^ 0x55]) + bytes(data[at + 1 :])
        try:  # A few bits of a compressed block decide nothing: zlib then finds the same data, and the same checksum.
            assert Profile.load(broken).dump() == data
        except ValueError:
            continue
    with pytest.raises(ValueError):
        compiled(["__import__('os')"])
