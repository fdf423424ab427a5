"""The trainers that are hosted: transformers' and TRL's own classes, run on the meta device; and what they leave."""

from __future__ import annotations

import os
import random
import sys
import threading

import accelerate.state
import pytest
import torch
import transformers
from tiny import LLAMA
from vramplan import plan
from vramplan.dryrun import sandbox
from vramplan.errors import PlanError
from vramplan.job import read_job
from vramplan.planning.planned_job import plan_job
from vramplan.planning.tracer import key_of
from vramplan.render import words
from vramplan.usecases import other_trainers

TINY = {"config": LLAMA, "method": "full", "trainer": "trl", "gpu": "h100", "batch_size": 2}
PAIRS = {**TINY, "prompt_length": 24, "completion_length": 8}
GROUPS = {**PAIRS, "batch_size": 4, "trainer_args": {"num_generations": 4, "max_completion_length": 8}}
JOBS = {
    "trainer": {**TINY, "trainer": "transformers", "sequence_length": 32},
    "sft": {**TINY, "sequence_length": 32},
    "sft qlora": {**TINY, "method": "qlora", "sequence_length": 32, "lora": {"target_modules": "all-linear"}},
    "sft liger": {**TINY, "sequence_length": 32, "trainer_args": {"use_liger_kernel": True}},
    "dpo": {**PAIRS, "objective": "dpo"},
    "kto": {**PAIRS, "objective": "kto"},
    "reward": {**PAIRS, "objective": "reward", "config": {**LLAMA, "num_labels": 1}},
    "orpo": {**PAIRS, "objective": "orpo"},
    "cpo": {**PAIRS, "objective": "cpo"},
    "grpo": {**GROUPS, "objective": "grpo"},
    "rloo": {**GROUPS, "objective": "rloo"},
    "gkd": {**PAIRS, "objective": "gkd", "trainer_args": {"max_new_tokens": 8}},
    "distillation": {**PAIRS, "objective": "distillation", "trainer_args": {"max_completion_length": 8}},
    "online dpo": {**PAIRS, "method": "lora", "objective": "online_dpo", "trainer_args": {"max_new_tokens": 8}},
}


def planned(**fields):
    """The plan of a job that was not traced before."""
    return plan_job(read_job(fields))


def phases(plan, step: int = 2) -> list[str]:
    return [phase.name for phase in plan.summary.phases if phase.step == step]


def modules(plan) -> set[str]:
    return set(plan.concrete.template.fqns)


def foreign_state() -> dict:
    """What a trace could leave behind: every name of the sandbox's table that can be told, and the process's state."""
    import accelerate.accelerator
    import accelerate.utils.memory
    import trl.trainer.dpo_trainer
    import trl.trainer.utils

    return {
        "cuda": torch.Tensor.cuda,
        "inference_mode": torch.inference_mode,
        "data_ptr": torch.UntypedStorage.data_ptr,
        "autocast": torch.autocast,
        "device": vars(transformers.TrainingArguments)["_setup_devices"],
        "generate": transformers.GenerationMixin.generate,
        "clear": accelerate.utils.memory.clear_device_cache,
        "scaler": accelerate.accelerator.get_grad_scaler,
        "shared": vars(accelerate.state.PartialState)["_shared_state"],
        "reference": trl.trainer.dpo_trainer.create_model_from_path,
        "triton": trl.trainer.utils.is_triton_available,
        "fused": hasattr(trl.trainer.utils, "_fused_logprob_entropy"),
        "environment": dict(os.environ),
        "random": random.getstate(),
        "torch random": torch.get_rng_state().tolist(),
        "finders": [*sys.meta_path],
        "triton modules": {name for name in sys.modules if name.partition(".")[0] in ("triton", "liger_kernel")},
    }


@pytest.mark.parametrize("name", JOBS)
def test_a_step_of_every_trainer(name):
    plan = planned(**JOBS[name])
    assert {"forward", "backward", "optimizer", "end"} <= set(phases(plan))
    assert plan.summary.peak.peak == sum(plan.summary.parts.values()) and plan.facts["optimizer_state"] > 0
    assert plan.facts["trainable_parameters"] <= plan.facts["parameters"]


@pytest.mark.parametrize("name, inner", [("grpo", {"score", "generate", "reward"}), ("rloo", {"score", "reference"})])
def test_what_runs_within_a_step_is_a_phase(name, inner):
    assert inner <= set(phases(planned(**JOBS[name])))


def test_a_reference_is_a_copy_of_the_model():
    copied = planned(**JOBS["dpo"])
    assert "reference.model.layers.1.mlp.up_proj" in modules(copied) and "reference" in phases(copied)
    weights = copied.summary.parts["weights"]
    assert weights > 1.9 * planned(**JOBS["sft"]).summary.parts["weights"]


def test_a_teacher_is_the_model_once_more_or_another():
    own = planned(**JOBS["distillation"])
    assert "reference.model.layers.1.mlp.up_proj" in modules(own)
    larger = {**LLAMA, "num_hidden_layers": 4}
    other = planned(**{**JOBS["distillation"], "trainer_args": {"teacher_model": larger, "max_completion_length": 8}})
    assert other.summary.parts["weights"] > own.summary.parts["weights"]
    assert other.facts["trainable_parameters"] == own.facts["trainable_parameters"]


def test_with_adapters_the_reference_is_the_model_without_them():
    adapted = planned(**{**JOBS["dpo"], "method": "lora"})
    assert not [fqn for fqn in modules(adapted) if fqn.startswith("reference.")] and "reference" in phases(adapted)


def test_a_reference_may_be_asked_before_the_first_step():
    asked = planned(**{**JOBS["dpo"], "method": "lora", "trainer_args": {"precompute_ref_log_probs": True}})
    assert "reference" not in phases(asked)


def test_evaluation_and_saving_are_phases():
    given = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "eval_rows": 4}
    plan = planned(**{**JOBS["trainer"], "trainer_args": {**given, "per_device_eval_batch_size": 2}})
    assert {"eval", "save"} <= set(phases(plan, 1))


def test_a_trainer_s_argument_changes_its_step():
    plain = planned(**JOBS["trainer"])
    smoothed = planned(**JOBS["trainer"], trainer_args={"label_smoothing_factor": 0.1})
    assert smoothed.summary.peak.peak > plain.summary.peak.peak


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"objective": "dpo", "trainer": "pytorch"}, "set trainer to trl"),
        ({"objective": "grpo", "trainer": "transformers"}, "set trainer to trl"),
        ({"objective": "dpo"}, "prompt_length and completion_length"),
        ({"objective": "dpoo"}, "dpo"),
        ({"prompt_length": 8}, "set sequence_length"),
        ({"trainer_args": {"max_grad_nrom": 1}}, "max_grad_norm"),
        ({"trainer": "transformers", "trainer_args": {"packing": True}}, "no argument"),
        ({"trainer": "pytorch", "trainer_args": {"max_grad_norm": 1}}, "plain loop"),
        ({"trainer_args": {"bf16": True}}, "mixed_precision"),
        ({"trainer_args": {"deepspeed": "x.json"}}, "several processes"),
        ({"trainer_args": {"torch_compile": True}}, "not modelled"),
        ({"trainer_args": {"resume_from_checkpoint": "x"}}, "not modelled"),
        ({"generation_args": {"num_beams": 4}}, "method inference"),
        ({"method": "lora", "adapter": {"peft_type": "IA4"}}, "IA3"),
        ({"method": "lora", "adapter": {"peft_type": "IA3", "target_module": ["q_proj"]}}, "target_modules"),
        ({"method": "lora", "lora": {"rank_patern": {}}}, "rank_pattern"),
        ({"adapter": {"peft_type": "IA3"}}, "method lora"),
        ({"attention": "flex_attention", "method": "inference"}, "attention"),
        ({"trainer": "transformers", "optimizer": "torch.optim.Muon+adamw_torch"}, "one optimizer"),
    ],
    ids=str,
)
def test_what_is_not_planned_is_refused(fields, words):
    with pytest.raises(PlanError) as told:
        planned(**{**JOBS["sft"], **fields})
    assert words in f"{told.value.message} {told.value.hint}"


def test_arguments_without_effect_are_said_to_have_none():
    plan = planned(**JOBS["sft"], trainer_args={"learning_rate": 1e-5, "report_to": "wandb"})
    assert any("learning_rate, report_to" in warning for warning in plan.profile.warnings)


@pytest.mark.parametrize("adapter", [{"peft_type": "IA3"}, {"peft_type": "LN_TUNING", "target_modules": ["norm"]}])
def test_any_method_of_peft(adapter):
    plan = planned(**{**JOBS["trainer"], "method": "lora", "adapter": adapter})
    assert 0 < plan.summary.parts["adapters"] < plan.summary.parts["weights"] / 10


def test_lora_takes_every_argument():
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    plain, pattern = (
        planned(**{**JOBS["trainer"], "method": "lora", "lora": {**given, **more}})
        for more in ({}, {"rank_pattern": {"v_proj": 32}})
    )
    assert pattern.facts["trainable_parameters"] > plain.facts["trainable_parameters"]


@pytest.mark.parametrize("name", ["adagrad", "rmsprop", "torch.optim.Adafactor", "ademamix_8bit", "stable_adamw"])
def test_optimizers_by_name(name):
    assert planned(**JOBS["trainer"], optimizer=name).facts["optimizer_state"] > 0


@pytest.mark.parametrize("name", ["galore_adamw_8bit", "apollo_adamw"])
def test_optimizers_that_project_gradients(name):
    given = {**JOBS["trainer"], "trainer_args": {"optim_target_modules": ["attn", "mlp"]}}
    assert planned(**given, optimizer=name).facts["optimizer_state"] > 0


def test_stable_adamw_runs_its_kernels():
    """On a card they are Triton's and take no temporaries; without Triton the package takes PyTorch's operators."""
    plan = planned(**JOBS["trainer"], optimizer="stable_adamw")
    optimizer = next(phase for phase in plan.summary.phases if (phase.step, phase.name) == (2, "optimizer"))
    largest = LLAMA["vocab_size"] * LLAMA["hidden_size"] * 2
    assert optimizer.peak - optimizer.start < 2 * largest


def test_adapters_that_nobody_casts_stay_as_they_arrive():
    job = {**JOBS["trainer"], "method": "lora"}
    cast, left = (planned(**job, lora={"autocast_adapter_dtype": casts}) for casts in (True, False))
    assert left.summary.parts["adapters"] == cast.summary.parts["adapters"] / 2
    assert left.facts["trainable_parameters"] == cast.facts["trainable_parameters"]


def test_what_is_learned_of_a_conversation_is_said():
    plan = planned(**JOBS["sft"], trainer_args={"assistant_only_loss": True})
    assert any("half of the tokens" in warning for warning in plan.profile.warnings)


def test_8_bit_optimizers_keep_the_state_of_embeddings_in_32_bits():
    """As transformers tells bitsandbytes to: the trainer and the optimizer have to ask one and the same manager."""
    embedding = LLAMA["vocab_size"] * LLAMA["hidden_size"]
    by_trainer, by_loop = (
        planned(**JOBS["trainer"] | {"trainer": trainer, "optimizer": "adamw_8bit"}).facts["optimizer_state"]
        for trainer in ("transformers", "pytorch")
    )
    assert by_trainer - by_loop > 5 * embedding


def test_what_the_other_trainers_take_and_why():
    job = {"config": LLAMA, "method": "qlora", "gpu": "h100", "sequence_length": 32}
    rows = {row["trainer"]: row for row in other_trainers(job)}
    assert rows.keys() == {"pytorch", "transformers"}
    for name, row in rows.items():
        alone = planned(**job, trainer=name).summary
        assert row["peak"] == {"allocated": alone.peak.peak, "reserved": alone.reserved}
    assert rows["pytorch"]["why"] == [
        "no autocast",
        "adamw_torch",
        "what is not quantised in float32",
        "all logits at once",
    ]
    told = words.other_trainers({**plan(job).model_dump(), "other_trainers": [*rows.values()]})
    assert "a plain loop (no autocast" in told and "with TRL's SFTTrainer." in told


def test_other_trainers_that_are_not_known_are_not_traced():
    job = {"config": LLAMA, "method": "qlora", "gpu": "h100", "sequence_length": 31}
    planned(**job)
    assert other_trainers(job, trace=False) == []
    planned(**job, trainer="pytorch")
    assert [row["trainer"] for row in other_trainers(job, trace=False)] == ["pytorch"]
    assert other_trainers(JOBS["dpo"]) == []


def test_everything_is_as_before_after_a_trace():
    before = foreign_state()
    planned(**{**JOBS["dpo"], "completion_length": 9})
    assert foreign_state() == before


def test_everything_is_as_before_after_a_trace_that_failed(monkeypatch):
    import trl

    planned(**JOBS["dpo"])  # imports are done
    before = foreign_state()

    def fail(self, *args, **kwargs):
        raise ValueError("this step fails")

    monkeypatch.setattr(trl.DPOTrainer, "_compute_loss", fail)
    with pytest.raises(PlanError, match="this step fails"):
        planned(**{**JOBS["dpo"], "completion_length": 10})
    monkeypatch.undo()
    assert foreign_state() == before


def test_another_thread_s_accelerate_is_left_alone():
    """Its state, its device and its seeds' functions: replaced for the tracing thread alone."""
    seen = {}

    def look():
        seen["state"] = dict(accelerate.state.PartialState._shared_state)
        seen["cuda"] = torch.inference_mode is not None and isinstance(torch.inference_mode(), torch.inference_mode)

    accelerate.state.PartialState._shared_state["mine"] = 1
    try:
        with sandbox.active(), sandbox.replaced(accelerate.state.PartialState, "_shared_state", {}):
            assert accelerate.state.PartialState._shared_state == {}
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
    finally:
        del accelerate.state.PartialState._shared_state["mine"]
    assert seen["state"]["mine"] == 1 and seen["cuda"]


def test_the_key_of_a_job_of_before_is_what_it_was():
    """A job that uses none of the fields that came later is found under the key that it had."""
    kernels = ((9, 0), 132, None)
    old = key_of(read_job({"config": LLAMA, "method": "full"}).resolved(), LLAMA, kernels)
    assert "trainer_args" not in old and "objective" not in old
    new = key_of(read_job({**JOBS["dpo"]}).resolved(), LLAMA, kernels)
    assert '"objective": "dpo"' in new and '"completion_length": 8' in new
