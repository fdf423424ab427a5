"""The request bodies of the HTTP API: their types, and the examples that the OpenAPI document shows."""

from __future__ import annotations

from typing import Annotated

from fastapi import Body
from pydantic import BaseModel, Field, WrapValidator

from ..job import Job, read_job

EXAMPLES = {
    "qlora": {
        "summary": "QLoRA of an 8B model on a 24 GB card",
        "value": {"model": "llama-3.1-8b", "method": "qlora", "sequence_length": 2048, "gpu": "rtx-4090"},
    },
    "full": {
        "summary": "A config of one's own, trained in full on a card of one's own",
        "value": {
            "config": {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 512,
                "intermediate_size": 1376,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "vocab_size": 32000,
            },
            "method": "full",
            "batch_size": 8,
            "gpu": {"name": "my card", "memory_bytes": 12 << 30},
        },
    },
}
BATCH_EXAMPLES = {
    "two": {
        "summary": "A job, and a job with an id",
        "value": [EXAMPLES["qlora"]["value"], {"id": "own", "job": EXAMPLES["full"]["value"]}],
    }
}
SOLVE_EXAMPLES = {
    "batch": {
        "summary": "The largest batch in 20 GiB",
        "value": {**EXAMPLES["qlora"]["value"], "memory_limit_bytes": 20 << 30},
    }
}
COMPARE_EXAMPLES = {
    "over": {
        "summary": "One job over methods and cards",
        "value": {
            "job": {"model": "llama-3.1-8b", "sequence_length": 2048},
            "over": {"method": ["lora", "qlora"], "gpu": ["rtx-4090", "a100-40gb"]},
        },
    }
}


SERVING_EXAMPLES = {
    "vllm": {
        "summary": "A 70B model by vLLM on two H100",
        "value": {"command": "vllm serve llama-3.3-70b --max-model-len 32768 -tp 2", "gpu": "h100"},
    }
}


class ServingQuestion(BaseModel):
    """A server's command, and the card that it is to run on."""

    command: str = Field(description="What starts the server, as it would be typed.")
    gpu: str | dict | None = Field(None, description="A card of the catalogue, or one's own; of each rank.")
    config: dict | None = Field(None, description="The model's config.json, instead of the one that it names.")


class LimitedJob(Job):
    """A job, and how much memory there is where its card is not meant."""

    memory_limit_bytes: int | None = Field(None, description="What the allocator may hold, instead of the job's card.")
    multiple_of: int | None = Field(None, description="Only multiples of it are sought.")
    prices: dict[str, float] | None = Field(None, description="By card: priced cards are ranked, for=gpu.")


class Comparable(BaseModel):
    """`jobs`, or a `job` and what of it to vary."""

    jobs: list[Job] | None = Field(None, description="At most six.")
    job: Job | None = None
    over: dict[str, list] | None = Field(None, description="Values by dotted field: every combination is planned.")


JobBody = Annotated[Job, WrapValidator(lambda value, _: read_job(value)), Body(openapi_examples=EXAMPLES)]
"""A Job, documented by its schema and read by :func:`read_job`, whose errors name the nearest field."""
SolveBody = Annotated[LimitedJob, WrapValidator(lambda value, _: value), Body(openapi_examples=SOLVE_EXAMPLES)]
"""A job with limits, as it came: the solver reads it."""
CompareBody = Annotated[Comparable, WrapValidator(lambda value, _: value), Body(openapi_examples=COMPARE_EXAMPLES)]
"""A comparison, as it came: the planner reads it."""
BatchBody = Annotated[list[Job | dict], WrapValidator(lambda value, _: value), Body(openapi_examples=BATCH_EXAMPLES)]
"""A list of jobs, as it came: each is read on its own, so that one that is none fails alone."""
ServingBody = Annotated[ServingQuestion, WrapValidator(lambda value, _: value), Body(openapi_examples=SERVING_EXAMPLES)]
"""A command, as it came: the use case reads it."""
