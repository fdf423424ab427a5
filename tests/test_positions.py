"""Sequences longer than the positions that a model was made for."""

from __future__ import annotations

import pytest
from tiny import LLAMA, T5
from vramplan import PlanError, plan

JOB = {"method": "full", "gpu": "h100", "trainer": "pytorch"}
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 64}  # fmt: skip
GPTJ = {"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "n_embd": 64, "n_layer": 2, "n_head": 4,
        "rotary_dim": 8, "n_positions": 64, "vocab_size": 512}  # fmt: skip
WHISPER = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "d_model": 64,
           "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
           "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 512, "max_target_positions": 48,
           "max_source_positions": 100, "num_mel_bins": 16, "pad_token_id": 0, "decoder_start_token_id": 3}  # fmt: skip


def said(config: dict, **fields) -> list[str]:
    return [text for text in plan({"config": config, **JOB, **fields}).warnings if "positions" in text]


def test_a_rotary_model_runs_past_its_positions_with_a_warning():
    """Olmo-3 ran on a card with 8,256 tokens of 8,192."""
    config = {**LLAMA, "max_position_embeddings": 64}
    (warning,) = said(config, sequence_length=72)
    assert "72 tokens is longer than the 64 positions" in warning
    assert said(config, sequence_length=64) == []
    (warning,) = said(config, method="inference", sequence_length=60, new_tokens=5, trainer=None)
    assert "65 tokens" in warning


@pytest.mark.parametrize(("config", "most"), [(BERT, 64), (GPTJ, 64)], ids=["an embedding", "a buffer"])
def test_a_table_of_positions_is_not_exceeded(config, most):
    with pytest.raises(PlanError, match=f"longer than this model's {most} positions") as told:
        plan({"config": config, **JOB, "sequence_length": most + 1})
    assert told.value.field == "sequence_length"
    assert plan({"config": config, **JOB, "sequence_length": most}).peak.allocated > 0


def test_positions_of_roberta_begin_after_its_padding():
    config = {**BERT, "model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "pad_token_id": 1}
    with pytest.raises(PlanError, match="longer than this model's 62 positions"):
        plan({"config": config, **JOB, "sequence_length": 63})
    assert plan({"config": config, **JOB, "sequence_length": 62}).peak.allocated > 0


def test_t5_has_no_positions_to_exceed():
    assert said(T5, sequence_length=5000) == []


def test_a_speech_job_needs_the_length_of_its_labels_alone():
    assert plan({"config": WHISPER, **JOB, "target_length": 48}).peak.allocated > 0
    with pytest.raises(PlanError, match="longer than this model's 48 positions") as told:
        plan({"config": WHISPER, **JOB})
    assert told.value.field == "target_length" and told.value.hint == "set target_length to at most 48"
