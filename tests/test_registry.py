"""The tables of names agree with the code that they name, and with the libraries that they speak of."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import peft
import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.training_args import OptimizerNames
from vramplan.dryrun import steps
from vramplan.dryrun.build import quantizers as layouts
from vramplan.dryrun.build.model_config import _TASKS_TRIED, AUTO
from vramplan.errors import PlanError
from vramplan.job import LORA_ARGUMENTS, Job, Lora, read_job
from vramplan.memory.fit import MEASURED
from vramplan.memory.table import Layer
from vramplan.planning.resolve import refuse_unplanned
from vramplan.registry import load
from vramplan.registry.objectives import OBJECTIVES
from vramplan.registry.optimizers import LEARNING_RATE, OPTIMIZERS, TORCH, TORCH_CLASSES, optimizer_of, optimizers_for
from vramplan.registry.quantizers import QUANTIZERS, WEIGHT_COLUMNS
from vramplan.registry.strategies import STRATEGIES
from vramplan.registry.tasks import CAUSAL_TYPES
from vramplan.registry.trainers import TRAINERS

MADE_HERE = [name for name, row in OPTIMIZERS.items() if row.constructor is not None]
NAMED = sorted(name for name in MADE_HERE if OPTIMIZERS[name].named_by_transformers)
LEFT_OUT = {"adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"}


def names_of(field: str) -> set[str]:
    """The names that a job's field takes."""
    options = get_args(Job.model_fields[field].annotation)
    return {name for option in options for name in get_args(option) or (option,)} - {type(None)}


def test_a_job_takes_the_names_of_the_tables():
    optimizers, *_ = get_args(Job.model_fields["optimizer"].annotation)
    assert set(get_args(optimizers)) == OPTIMIZERS.keys()
    assert names_of("objective") == OBJECTIVES.keys()
    assert names_of("trainer") == TRAINERS.keys()
    assert names_of("strategy") == STRATEGIES.keys()


def test_the_types_of_causal_language_models_are_the_installed_ones():
    """Those whose configs, where they name no class, mean one."""

    def is_causal(known: type) -> bool:
        first = next((task for task in _TASKS_TRIED if known in AUTO[task]._model_mapping), None)
        return first == "causal-lm"

    assert {kind for kind in CONFIG_MAPPING if is_causal(CONFIG_MAPPING[kind])} == CAUSAL_TYPES


@pytest.mark.parametrize(
    "fields, trainer",
    [
        ({"config": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}}, "trl"),
        ({"config": {"model_type": "llama"}}, "trl"),
        ({"config": {"model_type": "bert", "architectures": ["BertForMaskedLM"]}}, "transformers"),
        ({"config": {"model_type": "t5"}}, "transformers"),
        ({"config": {"model_type": "llama"}, "task": "sequence-classification"}, "transformers"),
        ({"config": {"model_type": "bert"}, "task": "causal-lm"}, "trl"),
        ({"config": {"model_type": "llama"}, "trainer": "pytorch"}, "pytorch"),
        ({"config": {"model_type": "llama"}, "method": "inference"}, "pytorch"),
        ({"config": {"model_type": "t5"}, "objective": "reward", "prompt_length": 8, "completion_length": 8}, "trl"),
    ],
    ids=str,
)
def test_whose_step_it_is_where_a_job_does_not_say(fields, trainer):
    job = read_job(fields).resolved()
    assert job.trainer == trainer and job.mixed_precision == ("no" if trainer == "pytorch" else "bf16")


def test_the_tables_need_no_torch():
    code = (
        "import sys, vramplan.job, vramplan.registry.objectives, vramplan.registry.optimizers, "
        "vramplan.registry.quantizers, "
        "vramplan.registry.strategies, vramplan.registry.tasks, vramplan.registry.trainers; "
        "sys.exit(bool({'torch', 'transformers', 'bitsandbytes', 'peft', 'trl'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_names_are_the_installed_ones():
    """transformers' and PyTorch's, but for those that run on other devices or need a package that is gone."""
    assert {entry.value for entry in OptimizerNames} - OPTIMIZERS.keys() == LEFT_OUT
    assert OPTIMIZERS.keys() - {entry.value for entry in OptimizerNames} == {"adamw_torch_forloop", "sgd_momentum"}
    kinds = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type) and name != "Optimizer"}
    assert kinds == set(TORCH_CLASSES)
    assert optimizer_of(f"{TORCH}Muon").constructor == "torch.optim:Muon"


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - set(MADE_HERE)))
def test_an_optimizer_of_a_package_names_it(name):
    """Made where the package is installed; else the refusal says what to install."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    try:
        assert isinstance(optimizers_for(name, model)[0], torch.optim.Optimizer)
    except PlanError as error:
        words = (OPTIMIZERS[name].package, "optim_target_modules", "within the backward pass")
        assert any(word in error.message for word in words)


def test_two_optimizers_share_the_parameters():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ends, self.inner = torch.nn.Embedding(4, 8), torch.nn.Linear(8, 8)

        def get_input_embeddings(self):
            return self.ends

        def get_output_embeddings(self):
            return None

    model = Model()
    muon, adamw = optimizers_for("torch.optim.Muon+adamw_torch", model)
    assert muon.param_groups[0]["params"] == [model.inner.weight] and type(muon).__name__ == "Muon"
    assert len(adamw.param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    "name, words", [("adamw_torhc", "adamw_torch"), ("torch.optim.Muno", "torch.optim.Muon"), ("a+b+c", "unknown")]
)
def test_an_unknown_optimizer_names_the_nearest(name, words):
    with pytest.raises(PlanError) as told:
        read_job({"model": "gpt2", "optimizer": name})
    assert words in told.value.message + told.value.hint and told.value.field == "optimizer"


def test_lora_takes_every_argument_of_peft_s():
    """But for what names files, models or other processes, and what the job says itself."""
    known = {entry.name for entry in dataclasses.fields(peft.LoraConfig)} & inspect.signature(
        peft.LoraConfig
    ).parameters.keys()
    left_out = (
        "auto_mapping base_model_name_or_path inference_mode megatron_config megatron_core peft_type peft_version"
    )
    own = Lora.model_fields.keys() - {"alpha", "dropout"} | {"lora_alpha", "lora_dropout"}
    left_out = {*left_out.split(), "revision", "runtime_config", "task_type"}
    assert known - own - left_out == LORA_ARGUMENTS - {"autocast_adapter_dtype"}


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if row.refusal is None])
def test_every_objective_has_its_trainer(name):
    goal = OBJECTIVES[name]
    assert issubclass(load(f"{goal.module}:{goal.trainer}"), transformers.Trainer)
    assert callable(load(f"{goal.module}:{goal.config}")) and callable(load(goal.rows, steps.__name__))


@pytest.mark.parametrize("name", MADE_HERE)
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


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_has_its_loops(name):
    row = TRAINERS[name]
    assert callable(load(row.loop, steps.__name__)) and row.optimizer in OPTIMIZERS


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
