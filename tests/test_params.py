"""The parameters of every published config are those that ``PARAMS.md`` counted, to the last one."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from published import REFUSED, config_of, counts, ids, needs_configs
from vramplan.catalog.models import MODELS
from vramplan.dryrun.build.model import build_base
from vramplan.dryrun.build.model_config import read_config, task_of
from vramplan.errors import PlanError

pytestmark = [needs_configs, pytest.mark.usefixtures("sandbox")]

BARE = {
    "BAAI/bge-large-en",
    "Snowflake/snowflake-arctic-embed-m",
    "google/vit-base-patch16-224-in21k",
    "google/vit-huge-patch14-224-in21k",
    "google/vit-large-patch32-224-in21k",
    "ibm-granite/granite-embedding-125m-english",
    "intfloat/multilingual-e5-large",
    "microsoft/deberta-v3-base",
    "microsoft/deberta-v3-large",
    "moonshotai/Kimi-K2.5",
    "nvidia/Kimi-K2.5-NVFP4",
    "nvidia/Kimi-K2.6-NVFP4",
    "nvidia/Kimi-K2.7-Code-NVFP4",
    "stepfun-ai/Step-3.7-Flash",
    "stepfun-ai/Step-3.7-Flash-FP8",
}
"""``PARAMS.md`` counts ``AutoModel``, without the head that a loss needs: encoders and vision transformers named
as bare models, and vision-language models whose named class is not in transformers. Here it is counted too."""
UNCOUNTED = {
    "Qwen/Qwen3-30B-A3B-FP8",
    "Qwen/Qwen3.8-2.4T-A95B-FP8",
    "deepseek-ai/DeepSeek-V2-Lite",
    "meta-llama/Llama-3.1-70B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "moonshotai/Kimi-K2-Instruct",
}
"""Without a count in ``PARAMS.md``."""


def parameters_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def planned(id: str) -> int | str:
    """How many parameters the model has that is planned, or why there is none."""
    try:
        config = read_config(config_of(id), None)
        return parameters_of(build_base(config, task_of(config), torch.bfloat16))
    except PlanError as error:
        return error.message


def bare(id: str) -> int:
    with init_empty_weights(include_buffers=True):
        model = transformers.AutoModel.from_config(read_config(config_of(id), None))
    model.tie_weights()
    return parameters_of(model)


@pytest.mark.parametrize("first", [chr(letter) for letter in range(ord("a"), ord("z") + 1)] + ["0"])
def test_every_parameter_is_counted(first):
    """By the first letter of the publisher, so that a failure says little and whose it is."""
    known = counts()
    for id in ids():
        if id[0].lower() != first:
            continue
        found = planned(id)
        if id in REFUSED:
            assert isinstance(found, str) and REFUSED[id] in found, (id, found)
        elif id in UNCOUNTED:
            assert isinstance(found, int) and not known.get(id), (id, found)
        elif id in BARE:
            assert {bare(id)} == known[id] and found not in known[id], (id, found)
        else:
            assert found in known[id], (id, found, known[id])


def test_the_lists_name_what_there_is():
    there = set(ids())
    assert len(there) == 264 and not (BARE | UNCOUNTED | REFUSED.keys()) - there


def test_the_catalogue_states_every_size():
    for model in MODELS:
        assert task_of(read_config(dict(model.config), None)), model.id
