"""The image processor of a checkpoint: its own caps on pixels, from wherever its settings lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vramplan import PlanError, plan
from vramplan.catalog.models import find_model

JOB = {"method": "inference", "gpu": "h100", "new_tokens": 2, "sequence_length": 20000}
PAGE, PHOTO = [2530, 1000], [4000, 3000]
QWEN2 = {"min_pixels": 3136, "max_pixels": 12845056}


def tokens(**job) -> int:
    """The tokens of an image, by what the answer says of them."""
    (said,) = [text for text in plan({**JOB, **job}).warnings if "of its tokens each" in text]
    return int(said.split("pixels in every sequence, ")[1].split()[0])


@pytest.fixture
def config():
    """A small model of Qwen2-VL's kind."""
    model = find_model("qwen2-vl-2b").config
    return {**model, "num_hidden_layers": 2, "vision_config": {**model.get("vision_config", {}), "depth": 2}}


def test_a_catalogue_s_model_has_the_caps_of_its_checkpoint():
    """A page of 1000 × 2530 has 3,240 tokens, a photo of 3000 × 4000 15,301 of Qwen2-VL; with the class's cap 1,232."""
    assert tokens(model="qwen2-vl-2b", image_size=PAGE) == 3240
    assert tokens(model="qwen2-vl-2b", image_size=PHOTO) == 15301
    assert tokens(model="qwen2-vl-2b", image_size=PAGE, processor={"max_pixels": 1003520}) == 1232


def test_large_images_take_what_they_took_on_a_card():
    """generate() on an H200 with pixels in bfloat16, transformers 5.17: allocated within 0.1 %, reserved within 4 %."""
    for row in map(json.loads, (Path(__file__).parent / "measured/h200-images.jsonl").read_text().splitlines()):
        peak = plan(row["job"]).peak
        assert abs(peak.allocated / row["measured"]["peak_allocated"] - 1) <= 0.001, row["id"]
        assert abs(peak.reserved / row["measured"]["peak_reserved"] - 1) <= 0.05, row["id"]


def test_an_inline_config_has_those_that_are_given_beside_it(config):
    assert tokens(config=config, image_size=PAGE) == 1232
    assert tokens(config=config, image_size=PAGE, processor=QWEN2) == 3240
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    assert tokens(config=config, image_size=PAGE, processor={"size": size, "patch_size": 14}) == 3240
    assert tokens(config=config, image_size=PAGE) == 1232  # the class's own cap is as it was


def test_a_folder_s_own_settings_are_read(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tokens(model=str(tmp_path), image_size=PAGE) == 1232
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Qwen2VLImageProcessor", **QWEN2})
    )
    assert tokens(model=str(tmp_path), image_size=PAGE) == 3240
    assert tokens(model=str(tmp_path / "config.json"), image_size=PAGE, processor={"max_pixels": 1003520}) == 1232


@pytest.mark.parametrize(
    "processor",
    [
        {"min_pixels": 1 << 40},
        {"size": {"shortest_edge": 1 << 40, "longest_edge": 1 << 41}},
        {"size": "large"},
        {"size": {"height": 1 << 20, "width": 1 << 20}},
        {"max_pixels": -1},
        {"patch_size": 0},
    ],
)
def test_a_processor_that_cannot_be_is_refused(config, processor):
    with pytest.raises(PlanError) as told:
        plan({**JOB, "config": config, "image_size": PAGE, "processor": processor})
    assert told.value.field in ("processor", "images")


def test_a_model_that_reads_no_images_says_so(config):
    text = find_model("gpt2").config
    warnings = plan({**JOB, "config": text, "sequence_length": 64, "processor": QWEN2}).warnings
    assert "processor costs no memory here: GPT2LMHeadModel reads text alone" in warnings
