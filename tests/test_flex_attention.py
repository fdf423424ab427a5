"""Flex attention: what a compiled kernel of it takes, where it runs on a card."""

from __future__ import annotations

import torch
from tiny import LLAMA
from vramplan import plan
from vramplan.dryrun.cuda import flex_attention as flex

JOB = {
    "config": {**LLAMA, "num_key_value_heads": 2},
    "method": "full",
    "trainer": "transformers",
    "gpu": "h100",
    "batch_size": 2,
    "sequence_length": 384,
    "attention": "flex_attention",
}


def forward(**fields) -> int:
    """What a steady forward pass keeps."""
    phases = plan({**JOB, **fields}).phases
    found = next(phase for phase in phases if (phase.step, phase.name) == (2, "forward"))
    return found.allocated_end - found.allocated_start


def test_it_keeps_no_scores():
    batch, heads, length, layers = JOB["batch_size"], LLAMA["num_attention_heads"], JOB["sequence_length"], 2
    scores = batch * heads * length * length * 2
    assert forward(attention="eager") - forward() > layers * scores


def test_padding_is_a_mask_of_blocks():
    masks = 4 * (3 + 9) * JOB["batch_size"] * 4
    assert forward(attention_mask="padded") <= forward() + masks + 8 * 512


def test_the_output_lies_as_the_queries_do():
    """[B, H, S, D] in the order of [B, S, H, D]: what follows needs no copy."""
    query = torch.empty(2, 8, 4, 16, device="meta").transpose(1, 2)
    assert flex._dense(query, (2, 4, 8, 32)).transpose(1, 2).is_contiguous()


def test_gradients_of_grouped_heads_have_the_heads_of_the_keys():
    query, key, value = (torch.empty(1, heads, 8, 16, device="meta", requires_grad=True) for heads in (4, 2, 2))
    out, _ = flex._Flex.apply(query, key, value)
    out.sum().backward()
    assert query.grad.shape == query.shape and key.grad.shape == key.shape and value.grad.shape == value.shape
