"""The fewest cards that hold a job."""

from __future__ import annotations

import json

import pytest
from tiny import LLAMA
from vramplan import PlanError, cli, plan, solve

MODEL = {**LLAMA, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 4096}
JOB = {"config": MODEL, "method": "full", "sequence_length": 64, "trainer": "pytorch", "gpu": "h100"}


def needs(count: int, **fields) -> int:
    return plan({**JOB, "strategy": "fsdp2", "gpu_count": count, **fields}).peak.reserved


def test_the_fewest_cards_are_found_by_halving():
    """Each rank holds its share: eight need less than four, and the limit lies between."""
    four, eight = needs(4), needs(8)
    assert eight < four
    found = solve({**JOB, "strategy": "fsdp2"}, "gpu_count", memory_limit_bytes=(four + eight) // 2)
    assert found.gpu_count == 8 and found.tries[8] and not found.tries[4]
    assert solve({**JOB, "strategy": "fsdp2"}, "gpu_count", memory_limit_bytes=1 << 20).gpu_count == 0


def test_what_the_model_does_not_divide_into_is_left_out():
    """The model has four heads: tensor parallelism takes one, two or four cards."""
    fields = {**JOB, "method": "inference", "trainer": None, "strategy": "tensor-parallel"}
    found = solve(fields, "gpu_count")
    assert found.gpu_count in (1, 2) and set(found.refused) <= {
        8,
        16,
        24,
        32,
        48,
        64,
        96,
        128,
        192,
        256,
        384,
        512,
        768,
        1024,
    }


def test_the_terminal_says_how_many(tmp_path, monkeypatch, capsys):
    path = tmp_path / "job.json"
    path.write_text(json.dumps({**JOB, "strategy": "ddp"}))
    for limit, said in (("99999999999", "One card with 93.1 GiB"), ("1048576", "No number of cards with 1.0 MiB")):
        monkeypatch.setattr(
            "sys.argv",
            ["vramplan", "solve", "--for", "gpu_count", "--job", str(path), "--memory-limit-bytes", limit],
        )
        with pytest.raises(SystemExit):
            cli.main()
        assert said in capsys.readouterr().out


def test_one_card_is_no_count():
    with pytest.raises(PlanError, match="strategy single takes one card") as told:
        solve(JOB, "gpu_count")
    assert "fsdp2" in told.value.hint
