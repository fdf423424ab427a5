"""A loop over tokens is run for a few of them: the books are those of the whole loop, entry for entry."""

from __future__ import annotations

import pytest
from vramplan.dryrun.build.model import bare
from vramplan.dryrun.cuda.card_facts import Card
from vramplan.dryrun.steps.dry_run import dry_run
from vramplan.dryrun.token_loops import TOKENS_RUN, repeat_tokens
from vramplan.job import read_job
from vramplan.memory.repeat import same

pytestmark = pytest.mark.usefixtures("sandbox")

MAMBA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
    "vocab_size": 512,
}
JAMBA = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 4,
}
LORA = {"target_modules": ["in_proj", "x_proj"], "dropout": 0.1}
JOBS = {
    "full": (MAMBA, {"method": "full", "batch_size": 2}),
    "checkpointing": (MAMBA, {"method": "full", "gradient_checkpointing": True}),
    "reentrant adapters": (MAMBA, {"method": "lora", "lora": LORA, "gradient_checkpointing": "reentrant"}),
    "autocast": (MAMBA, {"method": "full", "trainer": "transformers", "dtype": "float32"}),
    "generation": (MAMBA, {"method": "inference", "new_tokens": 2}),
    "hybrid": (JAMBA, {"method": "lora", "lora": LORA, "gradient_checkpointing": True}),
}
LENGTH = 2 * TOKENS_RUN + 8


@pytest.mark.parametrize("name", JOBS)
def test_a_few_tokens_stand_for_all(name):
    config, fields = JOBS[name]
    job = read_job({"config": config, "sequence_length": LENGTH, **fields}).resolved()

    def trace_log(tokens: int):
        base, task = bare(config, job.task, job.dtype, job.attention)
        return dry_run(base, job, task, Card((9, 0), 132), tokens=tokens)

    whole = trace_log(LENGTH)
    assert same(repeat_tokens(trace_log(TOKENS_RUN)).trace_log(), whole)
    assert sum(entry.op == "mul.Tensor" for entry in whole.allocations) > LENGTH  # the loop ran
