"""The tables of names agree with the code that they name, and with the libraries that they speak of."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import transformers
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.training_args import OptimizerNames
from vramplan.dryrun import steps
from vramplan.dryrun.build import quantizers as layouts
from vramplan.errors import PlanError
from vramplan.job import Job
from vramplan.memory.fit import MEASURED
from vramplan.memory.table import Layer
from vramplan.planning.resolve import refuse_unplanned
from vramplan.registry import load
from vramplan.registry.optimizers import LEARNING_RATE, OPTIMIZERS
from vramplan.registry.quantizers import QUANTIZERS, WEIGHT_COLUMNS
from vramplan.registry.strategies import STRATEGIES
from vramplan.registry.trainers import TRAINERS

NAMED = sorted(name for name, row in OPTIMIZERS.items() if row.named_by_transformers)


def names_of(field: str) -> set[str]:
    """The names that a job's field takes."""
    return set(get_args(Job.model_fields[field].annotation)) - {type(None)}


def test_a_job_takes_the_names_of_the_tables():
    optimizers, _ = get_args(Job.model_fields["optimizer"].annotation)
    assert set(get_args(optimizers)) == OPTIMIZERS.keys()
    assert names_of("trainer") == TRAINERS.keys()
    assert names_of("strategy") == STRATEGIES.keys()


def test_the_tables_need_no_torch():
    code = (
        "import sys, vramplan.job, vramplan.registry.optimizers, vramplan.registry.quantizers, "
        "vramplan.registry.strategies, vramplan.registry.trainers; "
        "sys.exit(bool({'torch', 'transformers', 'bitsandbytes', 'peft', 'trl'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_made(name):
    parameter = torch.nn.Parameter(torch.zeros(4096))
    optimizer = OPTIMIZERS[name].make([parameter])
    assert isinstance(optimizer, torch.optim.Optimizer) and optimizer.param_groups[0]["params"] == [parameter]
    others = {OPTIMIZERS[name].fused, OPTIMIZERS[name].eight_bit, OPTIMIZERS[name].paged} - {None}
    assert others <= OPTIMIZERS.keys() - {name}


@pytest.mark.parametrize("name", NAMED)
def test_an_optimizer_is_the_one_that_transformers_makes(name):
    """Its class, and all settings but those that transformers takes from its own arguments."""
    kind = OptimizerNames(name)
    args = transformers.TrainingArguments(optim=kind, learning_rate=LEARNING_RATE)
    context = OptimizerContext(
        args=args,
        model=None,
        optimizer_kwargs={"lr": args.learning_rate},
        adam_kwargs={"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon},
        optim_args={},
    )
    made, kwargs = _OPTIMIZER_HANDLERS[kind](context)
    parameter = torch.nn.Parameter(torch.zeros(4096))
    theirs, ours = made([parameter], **kwargs), OPTIMIZERS[name].make([parameter])
    assert isinstance(ours, made) and settings_of(ours) == settings_of(theirs)


def settings_of(optimizer: torch.optim.Optimizer) -> dict:
    """What of an optimiser's settings costs memory, or may."""
    group = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "betas", "eps")}
    args = getattr(optimizer, "args", None) or SimpleNamespace(optim_bits=32)
    return {**group, "bits": args.optim_bits, "paged": getattr(optimizer, "is_paged", False)}


def test_an_8_bit_optimizer_keeps_what_it_is_told_to_in_32_bits():
    kept, other = (torch.nn.Parameter(torch.zeros(4096)) for _ in range(2))
    for name, row in OPTIMIZERS.items():
        optimizer = row.make([kept, other], [kept])
        if row.state_bits == 8:
            told = optimizer.mng.pid2config
            assert told[id(kept)] == {"optim_bits": 32} and id(other) not in told, name


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_has_its_loops(name):
    row = TRAINERS[name]
    assert callable(load(row.loop, steps.__name__)) and row.optimizer in OPTIMIZERS
    assert row.card_loop is None or callable(load(row.card_loop, "vramplan.probe"))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_has_its_layout(name):
    row = QUANTIZERS[name]
    layout = load(row.layout, layouts.__name__)()
    assert issubclass(layout.packed, torch.nn.Parameter) and layout.packed in layouts.packed_classes()
    assert all(callable(getattr(layout, part)) for part in ("replaced", "on_meta", "on_card", "mark"))
    assert {row.column, row.nested_column} - {None} <= WEIGHT_COLUMNS.keys() <= set(Layer._fields)
    assert row.measured_as is None or row.measured_as in MEASURED


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_not_planned_is_refused_with_its_reason(name):
    job = Job(model="llama-3.1-8b", strategy=name)
    if STRATEGIES[name].refusal is None:
        return refuse_unplanned(job)
    with pytest.raises(PlanError, match=STRATEGIES[name].refusal) as told:
        refuse_unplanned(job)
    assert told.value.field == "strategy" and told.value.hint == STRATEGIES[name].hint
