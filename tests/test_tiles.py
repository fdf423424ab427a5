"""The tiles of tokens of TRL's chunked head that are left out take nothing that the others do not take."""

from __future__ import annotations

import pytest
from tiny import LLAMA
from vramplan.catalog.gpus import find_gpu
from vramplan.dryrun.steps import one_card
from vramplan.dryrun.symbols import sym_range
from vramplan.dryrun.trace import trace
from vramplan.job import read_job
from vramplan.memory.sizes import ShapePoint
from vramplan.memory.summary import summarize
from vramplan.planning.resolve import allocator_config_of, config_of, kernels_of

pytestmark = pytest.mark.usefixtures("sandbox")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 70000, "max_position_embeddings": 8192}
MODEL = {**LLAMA, **SIZES}
CASES = {
    "full": {"method": "full"},
    "full in float32": {"method": "full", "dtype": "float32"},
    "lora": {"method": "lora", "lora": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}},
}


def run(general: bool, batch: int, length: int, case: dict):
    job = read_job(
        {"config": MODEL, "gpu": "h100", "trainer": "trl", "batch_size": batch, "sequence_length": length, **case}
    )
    config = config_of(job)[0]
    job = job.resolved(config)
    return trace(job, config, *kernels_of(find_gpu("h100")), general=general), job


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_out_takes_nothing(name, monkeypatch):
    """A batch of 6 tiles and a part, with all of them and with three."""
    found = []
    for tiles in (one_card._tiles, lambda rows, start, stop=None, step=1: sym_range(start, stop, step)):
        monkeypatch.setattr(one_card, "_tiles", tiles)
        profile, job = run(False, 13, 2001, CASES[name])
        concrete = profile.template.at(ShapePoint(13, 2001, 132))
        summary = summarize(concrete, allocator_config_of(job))
        phases = [(phase.name, phase.peak) for phase in summary.phases]
        found.append((concrete.sizes.size, summary.peak.peak, summary.reserved, phases))
    few, every = found
    assert few[1:] == every[1:]
    assert (few[0] < every[0]) == (name == "full in float32")  # else a tile makes no tensor of its own


def test_one_run_is_that_of_any_number_of_tiles():
    profile, _ = run(True, 5, 4001, CASES["full"])
    for batch, length in ((9, 4001), (13, 2001), (12, 6001)):
        point = ShapePoint(batch, length, 132)
        assert profile.template.holds(point)
        fresh = run(False, batch, length, CASES["full"])[0].template.at(point)
        assert (profile.template.at(point).sizes == fresh.sizes).all()
    assert not profile.template.holds(ShapePoint(2, 4001, 132))
