"""Generation: what the arguments of ``generate()`` change, and that it ends."""

from __future__ import annotations

import pytest
from tiny import LLAMA, T5
from vramplan import PlanError, plan

JOB = {"config": LLAMA, "method": "inference", "gpu": "h100", "batch_size": 2, "sequence_length": 80, "new_tokens": 9}


def planned(**arguments):
    return plan({**JOB, "generation_args": arguments})


def phases(answer) -> dict[str, int]:
    return {phase.name: phase.peak_allocated for phase in answer.phases if phase.step == 1}


def test_a_prepared_model_is_served_in_float32():
    """Measured on an H200: 4330098176 bytes, of which 1536 are measure.py's own; 1985468928 without the casts."""
    job = {
        "model": "qwen2.5-1.5b",
        "method": "inference",
        "gpu": "h200",
        "quantization": {"type": "nf4"},
        "lora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "dropout": 0.05},
        "batch_size": 4,
        "sequence_length": 2048,
        "new_tokens": 8,
    }
    assert plan({**job, "prepare_for_kbit_training": True}).peak.allocated == 4330098176 - 1536
    assert plan(job).peak.allocated == 1985468928


def test_autocast_keeps_a_copy_of_each_weight_while_tokens_are_made():
    cast = plan({**JOB, "dtype": "float32", "mixed_precision": "bf16"})
    block = 4 * LLAMA["hidden_size"] ** 2 + 3 * LLAMA["hidden_size"] * LLAMA["intermediate_size"]
    linear = LLAMA["num_hidden_layers"] * block + LLAMA["vocab_size"] * LLAMA["hidden_size"]
    assert phases(cast)["decode"] >= cast.load.placed_allocated + 2 * linear


def test_the_prompt_and_the_tokens_are_phases_of_one_row_each():
    answer = planned()
    assert [phase.name for phase in answer.phases] == ["load", "generate", "prefill", "decode", "end"]
    assert answer.peak.phase == "generate" and answer.peak.allocated == max(phases(answer).values())


def test_beams_hold_a_cache_each():
    cache = 2 * 2 * JOB["batch_size"] * (JOB["sequence_length"] + JOB["new_tokens"]) * LLAMA["hidden_size"] * 2
    assert phases(planned(num_beams=4))["decode"] > phases(planned())["decode"] + 2 * cache


def test_sequences_that_are_returned_hold_a_cache_each():
    sampled = planned(do_sample=True, num_return_sequences=4)
    assert phases(sampled)["decode"] > phases(planned())["decode"]


def test_a_prompt_read_in_pieces_takes_less():
    assert phases(planned(prefill_chunk_size=20))["decode"] < phases(planned())["prefill"]


def test_scores_that_are_returned_stay():
    kept = planned(output_scores=True, return_dict_in_generate=True)
    logits = JOB["batch_size"] * LLAMA["vocab_size"] * 4
    assert phases(kept)["generate"] >= phases(planned())["generate"] + (JOB["new_tokens"] - 4) * logits


def test_without_a_cache_every_pass_reads_the_prompt():
    assert "decode" not in phases(planned(use_cache=False))


def test_a_static_cache_has_its_length_from_the_start():
    assert (
        phases(planned(cache_implementation="static", disable_compile=True))["prefill"] > phases(planned())["prefill"]
    )


def test_guidance_runs_a_second_pass_for_each_token():
    assert phases(planned(guidance_scale=1.5))["decode"] > phases(planned())["decode"]


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}])
def test_an_encoder_decoder_generates(arguments):
    answer = plan({**JOB, "config": T5, "generation_args": arguments})
    assert answer.peak.phase == "generate" and "decode" in phases(answer)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"topk": 4}, "top_k"),
        ({"max_new_tokens": 4}, "new_tokens"),
        ({"prompt_lookup_num_tokens": 3}, "not known"),
        ({"assistant_model": LLAMA}, "not known"),
        ({"cache_implementation": "quantized"}, "planned are dynamic"),
        ({"cache_implementation": "static"}, "disable_compile"),
        ({"max_time": 2.0}, "when it ends"),
    ],
    ids=str,
)
def test_what_is_not_planned_is_refused(arguments, words):
    with pytest.raises(PlanError) as told:
        planned(**arguments)
    assert words in f"{told.value.message} {told.value.hint}"
