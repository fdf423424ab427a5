"""A job on many cards as people read it: every class of ranks, what a node holds, the cards in the verdict."""

from __future__ import annotations

import json

import pytest
from tiny import LLAMA
from vramplan import PlanError, cli, plan
from vramplan.render import words

JOB = {"config": LLAMA, "method": "full", "sequence_length": 64, "gpu": "h100", "gpu_count": 2}
OFFLOADED = {**JOB, "strategy": "zero2", "deepspeed": {"offload_optimizer": True}, "trainer": "transformers"}


def test_of_a_job_on_one_card_no_ranks_are_shown():
    answer = plan({**JOB, "gpu_count": 1}).model_dump(mode="json", by_alias=True)
    assert words.ranks(answer) == [] and words.host(answer) == "" and "cards" not in words.settings(answer)


def test_ranks_that_are_alike_are_one_row():
    answer = plan(OFFLOADED).model_dump(mode="json", by_alias=True)
    (row,) = words.ranks(answer)
    assert row["name"] == "ranks 0 to 1" and not row["worst"] and row["peak"] == answer["ranks"][0]["peak"]
    assert words.verdict(answer).startswith("Fits 2 × H100") and words.settings(answer).endswith("zero2 on 2 cards")
    assert words.host(answer).startswith("A node's own memory holds 1.5 MiB while it loads, ")
    assert "on each of 2 cards" in words.verdict({**answer, "job": {**answer["job"], "gpu": None}})


def test_of_ranks_that_differ_the_one_that_needs_most_is_marked():
    job = {**JOB, "method": "inference", "strategy": "device-map", "device_map": {"model.layers.0": 0, "": 1}}
    answer = plan(job).model_dump(mode="json", by_alias=True)
    rows = words.ranks(answer)
    most = max(row["peak"]["reserved"] for row in rows)
    assert len(rows) == 2 and [row["worst"] for row in rows] == [row["peak"]["reserved"] == most for row in rows]


def test_the_terminal_and_the_page_show_them(tmp_path, monkeypatch, capsys):
    from fastapi.testclient import TestClient
    from vramplan.server import app

    path = tmp_path / "job.json"
    path.write_text(json.dumps(OFFLOADED))
    monkeypatch.setattr("sys.argv", ["vramplan", "estimate", "--job", str(path), "--gpu-count", "4"])
    with pytest.raises(SystemExit):
        cli.main()
    out = capsys.readouterr().out
    assert "ranks 0 to 3" in out and "Fits 4 × H100" in out and "A node's own memory" in out
    with TestClient(app.create_app()) as client:
        page = client.get("/", params={"config": json.dumps(LLAMA), "method": "full", "sequence_length": "64",
                                       "gpu": "h100", "gpu_count": "2", "strategy": "ddp"}).text  # fmt: skip
    assert 'name="gpu_count" value="2"' in page and "<option selected>ddp</option>" in page
    assert "Every rank" in page and "ranks 0 to 1" in page and "ddp on 2 cards" in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offload_optimizer": "nvme"}, "offload_optimizer is 'nvme'"),
        ({"offload_param": True}, "zero3 alone offloads parameters"),
        ({"torch_adam": "yes"}, "torch_adam is 'yes'"),
        ({"buckets": 5}, "buckets is 5"),
        ({"ofload_optimizer": "cpu"}, "no option 'ofload_optimizer'"),
    ],
)
def test_no_option_of_deepspeed_is_ignored(options, said):
    with pytest.raises(PlanError, match=said) as told:
        plan({**OFFLOADED, "deepspeed": options})
    assert told.value.field == "deepspeed" and told.value.hint


def test_true_is_the_host():
    told = [plan({**OFFLOADED, "deepspeed": {"offload_optimizer": value}}) for value in (True, "cpu", False, "none")]
    assert told[0].host == told[1].host and told[2].host == told[3].host
    assert told[0].optimizer_state == 0 < told[2].optimizer_state
