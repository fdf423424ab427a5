"""ZeRO, tensor parallelism and device_map: DeepSpeed's, transformers' and accelerate's own code beside two H100s."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import LLAMA
from vramplan.dryrun.cuda.card_facts import Card
from vramplan.dryrun.parallel.deepspeed_config import deepspeed_config
from vramplan.dryrun.places import HOST, NOWHERE, Places
from vramplan.dryrun.tracker import MemoryTracker
from vramplan.errors import PlanError
from vramplan.job import read_job
from vramplan.planning.estimate import estimate

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "tests/measured/h100-many-cards.jsonl", ROOT / "tests/measured/h100-own-many-cards.jsonl"]
ROWS = [json.loads(line) for path in FILES if path.exists() for line in path.read_text(encoding="utf-8").splitlines()]
MEASURED = [row for row in ROWS if row["job"]["strategy"].startswith(("zero", "tensor", "device"))]
CHEAP = (
    "zero1/hf/llama-3.2-1b/full/b2s1024/off/adamw_torch/a1/bfloat16/bf16",
    "zero2/hf/llama-3.1-8b@8/qlora/b1s1024/non_reentrant/adamw_torch/a1/bfloat16/bf16",
    "zero3/hf/olmoe-1b-7b@4/full/b1s512/non_reentrant/adamw_torch/a1/bfloat16/bf16",
    "tensor-parallel/plain/llama-3.1-8b@8/inference/b2s1024/off/adamw_torch/a1/bfloat16/no/new32",
    "device-map/hf/llama-3.1-8b@8/qlora/b1s512/non_reentrant/adamw_torch/a1/bfloat16/bf16/map=auto",
    "device-map/plain/llama-3.1-8b@8/inference/b1s512/off/adamw_torch/a1/bfloat16/no/map=auto/max_memory="
    "{'0': '3GiB', 'cpu': '64GiB'}/new8",
)
LOOSE = {
    # What a step with parameters on the host gathers ahead is 2 % more than planned; the ranks differ by as much.
    "zero3/hf/qwen3-0.6b/full/b2s512/off/adamw_torch/a1/bfloat16/bf16/offload_opt=True/offload_param=True": (
        0.03,
        0.06,
    ),
    # Experts are stacked on the card while they are loaded, which leaves holes: a loader of experts is not planned.
    "device-map/plain/olmoe-1b-7b@4/inference/b1s512/off/adamw_torch/a1/bfloat16/no/map=auto/new16": (0.003, 0.25),
}
JOB = {
    "config": LLAMA,
    "method": "full",
    "trainer": "pytorch",
    "sequence_length": 64,
    "gpu": "h100-80gb",
    "gpu_count": 2,
}

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def spoiled(row: dict) -> bool:
    """Whether a first try with another optimizer failed, and what it held stayed there: what is placed is three times
    the weights that were loaded."""
    rank = row["measured"]["ranks"][0]
    return (
        "load_peak" in rank
        and rank["placed_allocated"] > 2 * max(rank["load_peak"], 1 << 20)
        and "zero" not in row["id"]
    )


def cases() -> Iterator:
    for row in MEASURED:
        if row["job"]["strategy"] == "tensor-parallel" and spoiled(row):
            continue
        marks = [] if row["id"] in CHEAP else [pytest.mark.slow]
        yield pytest.param(
            row, id=row["id"], marks=marks + [needs_deepspeed] * row["job"]["strategy"].startswith("zero")
        )


def near(planned: int, measured: int, share: float) -> bool:
    return abs(planned - measured) <= share * measured


@pytest.mark.parametrize("row", [*cases()])
def test_the_worst_rank_takes_what_was_measured(row):
    """Allocated within 0.3 %, reserved within 6 %, what lies there before the first step and the state within 0.2 %."""
    measured = row["measured"]
    allocated, reserved = LOOSE.get(row["id"], (0.003, 0.06))
    worst = max(measured["ranks"], key=lambda rank: rank["peak_allocated"])
    answer = estimate(row["job"])
    assert near(max(rank["peak"]["allocated"] for rank in answer["ranks"]), measured["peak_allocated"], allocated)
    if "peak_reserved" in measured:
        most = max(rank["peak"]["reserved"] for rank in answer["ranks"])
        assert near(most, measured["peak_reserved"], reserved)
    if worst.get("optimizer_state") is not None:
        states = [rank["optimizer_state"] for rank in answer["ranks"]]
        assert near(max(states), max(rank["optimizer_state"] for rank in measured["ranks"]), 0.002)
    if "device_used_end" in worst:
        assert near(answer["peak"]["process"], worst["device_used_end"], 0.05)


@needs_deepspeed
def test_deepspeed_leaves_no_state_behind():
    """Its groups, its accelerator and the functions that it replaces are those of one run."""
    linear = torch.nn.functional.linear
    job = {**JOB, "trainer": "transformers", "mixed_precision": "bf16", "deepspeed": {"torch_adam": True}}
    answers = [estimate({**job, "strategy": name}) for name in ("zero3", "zero2", "zero3")]
    assert answers[0]["peak"] == answers[2]["peak"]
    assert torch.nn.functional.linear is linear and not torch.distributed.is_initialized()


@needs_deepspeed
def test_zero_s_share_shrinks_with_the_cards_and_its_host_holds_what_is_offloaded():
    job = {**JOB, "trainer": "transformers", "mixed_precision": "bf16", "strategy": "zero2"}
    two, eight = (estimate({**job, "gpu_count": count})["optimizer_state"] for count in (2, 8))
    assert two == pytest.approx(4 * eight, rel=0.01)
    offloaded = estimate({**job, "deepspeed": {"offload_optimizer": "cpu"}})
    assert offloaded["optimizer_state"] == 0
    assert offloaded["host"]["pinned"] > 0


def test_a_documented_config_asks_for_what_the_job_says():
    job = read_job({**JOB, "strategy": "zero3", "trainer": "transformers", "deepspeed": {"offload_param": "cpu"}})
    config = deepspeed_config(job)
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert config["optimizer"]["type"] == "AdamW"
    own = read_job(
        {**JOB, "strategy": "zero2", "trainer": "transformers", "deepspeed": {"zero_optimization": {"stage": 2}}}
    )
    assert deepspeed_config(own) == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "zero2"}, "through a Trainer"),
        ({"strategy": "zero2", "method": "inference", "trainer": "transformers"}, "shards a training"),
        ({"strategy": "zero2", "trainer": "transformers", "deepspeed": {"offload": "cpu"}}, "no option 'offload'"),
        (
            {"strategy": "zero3", "trainer": "transformers", "deepspeed": {"zero_optimization": {"stage": 2}}},
            "the strategy is zero3",
        ),
        ({"strategy": "tensor-parallel", "method": "lora"}, "adapters on a tensor-parallel model"),
        ({"strategy": "tensor-parallel", "gpu_count": 3}, "must be divisible by the tensor parallel size"),
        ({"strategy": "tensor-parallel", "gpu_count": 8}, "num_attention_heads are 4, which 8 cards do not divide"),
        ({"strategy": "tensor-parallel", "trainer": "transformers"}, "in a plain loop"),
        ({"strategy": "device-map", "max_memory": {"2": "1GiB"}}, "there are 2 cards"),
        ({"strategy": "device-map", "device_map": "by hand"}, "device_map"),
        ({"strategy": "device-map", "max_memory": {"0": 1 << 16, "cpu": "1GiB"}}, "is not trained"),
    ],
)
def test_what_the_stack_does_not_run_is_refused(fields, message):
    if fields["strategy"].startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    with pytest.raises(PlanError, match=message):
        estimate({**JOB, **fields})


def test_a_map_names_every_card_and_the_host_holds_the_rest():
    job = {**JOB, "method": "inference", "new_tokens": 4, "strategy": "device-map"}
    both = estimate({**job, "device_map": "balanced"})
    assert [rank["ranks"] for rank in both["ranks"]] == [[0, 0], [1, 1]]
    layers = {f"model.layers.{number}": "cpu" for number in range(1, LLAMA["num_hidden_layers"])}
    on_card = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), 0)
    one = estimate({**job, "gpu_count": 1, "device_map": on_card | layers})
    assert one["host"]["pageable"] > 0
    assert one["parts"]["weights"] < both["parts"]["weights"] * 2


def test_what_a_card_does_not_hold_is_left_to_the_host():
    """Where the job names no ``max_memory``, the card's own counts, of which transformers leaves a tenth."""
    job = {**JOB, "gpu_count": 1, "method": "inference", "new_tokens": 2, "strategy": "device-map"}
    small = {"name": "small", "memory_bytes": 600 << 20, "like": "a100-40gb"}
    wide = {**LLAMA, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    assert estimate({**job, "config": wide})["host"]["load"] == 0
    assert estimate({**job, "config": wide, "gpu": small})["host"]["load"] > 0


def test_a_tensor_moves_and_its_gradient_comes_back(sandbox):
    tracker = MemoryTracker(Card())
    with Places(tracker, 1, 2) as places, tracker:
        weight = torch.empty(4, 4, device="cuda:0", requires_grad=True)
        moved = weight.to("cuda:1")
        assert (weight.device, moved.device) == (torch.device("cuda", 0), torch.device("cuda", 1))
        (moved * 2).sum().backward()
        assert tracker.place_of(weight.grad) == 0
        kept = weight.detach().cpu()
        assert kept.device == torch.device("cpu") and places.host.now["pageable"] == 64
        tracker.pin(kept)
        assert places.host.now == {"pageable": 0, "pinned": 64}
        assert tracker.place_of(weight.to("meta")) == NOWHERE and tracker.place_of(kept) == HOST
    sizes = [tracker.trace_log.allocations[event].size for event in tracker.trace_log.events if event >= 0]
    assert 64 in sizes and max(sizes) == 64  # of what lies on card 1 alone
