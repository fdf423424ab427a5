"""The arguments of a trainer's config class: what every trainer is told of a job, then what the job says itself.

Nothing is ignored silently. What a field of the job says already, and what is not modelled, is refused; what has no
effect on memory is left out, and the answer says so.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from ...errors import PlanError
from ...job import Job
from ...registry.optimizers import JOIN, optimizer_of
from ..symbols import number_of

OURS = frozenset({"compute_metrics", "eval_rows", "document_length", "reward_funcs", "margin", "teacher_model"})
"""Keys of ``trainer_args`` that no config class has."""
SAID_BY_FIELDS = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "optim": "optimizer",
    "gradient_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
}
"""Arguments that a field of the job says."""
_PROCESSES = "several processes are not planned yet"
_COMPILED = "compiled steps are not modelled"
_ENGINE = "generation by another engine is not modelled"
REFUSED = {
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config"), _PROCESSES),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILED),
    **dict.fromkeys(("use_vllm", "use_transformers_paged", "vllm_mode"), _ENGINE),
    "resume_from_checkpoint": "what resuming reads is not modelled: the step that follows it is planned without",
    "load_best_model_at_end": "what it reads at the end is not modelled",
    "auto_find_batch_size": "it runs out of memory until a batch fits: solve for batch_size instead",
    "full_determinism": "deterministic kernels are not modelled",
    "use_cpu": "a step on the CPU takes no memory of a card",
    "debug": "debugging is not modelled",
    "sync_ref_model": "copying weights to the reference is not modelled",
    "chat_template_path": "rows are tokens already: no file is read",
    "model_init_kwargs": "the model is the job's",
    "ref_model_init_kwargs": "the reference is the job's model",
    "teacher_model_init_kwargs": "the teacher is trainer_args' teacher_model, a config",
    "teacher_model_name_or_path": "the teacher is trainer_args' teacher_model, a config",
    "reward_model_path": "reward models are reward_funcs, by their configs",
    "tools": "calls of tools are not modelled",
}
"""Arguments that change memory in a way that is not planned, and why not."""
WITHOUT_EFFECT = frozenset(
    """output_dir run_name report_to project trackio_space_id logging_strategy logging_steps logging_first_step
    logging_nan_inf_filter logging_dir log_level log_level_replica log_on_each_node log_completions
    num_completions_to_print disable_tqdm seed data_seed push_to_hub hub_model_id hub_strategy hub_token
    hub_private_repo hub_always_push hub_revision max_steps num_train_epochs learning_rate warmup_steps warmup_ratio
    lr_scheduler_type lr_scheduler_kwargs weight_decay save_total_limit dataloader_num_workers dataloader_pin_memory
    dataloader_prefetch_factor dataloader_persistent_workers dataset_num_proc dataset_text_field dataset_kwargs
    skip_memory_metrics metric_for_best_model greater_is_better tf32 ddp_timeout local_rank""".split()
)
"""Arguments that change no allocation of a step."""


def arguments_of(job: Job, config: type, common: dict[str, Any]) -> Any:
    """The trainer's config: what is ``common`` to all, then what the job says. Raises :class:`PlanError`."""
    known = [field.name for field in fields(config)]
    for name in job.trainer_args:
        _check(name, [*known, *OURS], config)
    _check_ours(job)
    left_out = OURS | WITHOUT_EFFECT
    own = {name: value for name, value in job.trainer_args.items() if name not in left_out}
    try:
        return config(**{**common, **own})
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        message = str(error).strip().splitlines()[0]
        raise PlanError(f"{config.__name__} refuses: {message}", "change trainer_args", "trainer_args") from None


def _check_ours(job: Job) -> None:
    """Refuse values of :data:`OURS` that mean nothing."""
    given = job.trainer_args
    for name in ("eval_rows", "document_length", "per_device_eval_batch_size"):
        value = given.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise PlanError(
                f"trainer_args.{name} should be a whole number from 1 on (got {value!r})", "", "trainer_args"
            )
    if not isinstance(given.get("teacher_model", {}), dict):
        raise PlanError("trainer_args.teacher_model should be a config", "give its config.json", "trainer_args")
    rewards = given.get("reward_funcs", [])
    if not isinstance(rewards, list) or not all(isinstance(config, dict) for config in rewards):
        raise PlanError(
            "trainer_args.reward_funcs should be a list of configs of reward models",
            "give each one's config.json as an object; leave it out for a function in Python",
            "trainer_args",
        )


def without_effect(job: Job) -> list[str]:
    """The arguments of the job that change no allocation."""
    return sorted(WITHOUT_EFFECT & job.trainer_args.keys())


def _check(name: str, known: list[str], config: type) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"see the arguments of {config.__name__}"
        raise PlanError(f"{config.__name__} has no argument {name!r}", hint, "trainer_args")
    if name in SAID_BY_FIELDS:
        field = SAID_BY_FIELDS[name]
        raise PlanError(f"trainer_args.{name} is the job's field {field}", f"set {field}", "trainer_args")
    if name in REFUSED:
        raise PlanError(f"trainer_args.{name}: {REFUSED[name]}", f"leave {name} out", "trainer_args")


def common_arguments(job: Job, steps: int, batches: int, folder: str) -> dict[str, Any]:
    """What every trainer's config class is told of the job. ``batches`` are run of a step's accumulated ones."""
    checkpointing = job.gradient_checkpointing != "off"
    kwargs = {"use_reentrant": job.gradient_checkpointing == "reentrant"} if checkpointing else None
    named = JOIN not in job.optimizer and optimizer_of(job.optimizer).named_by_transformers
    return {
        "output_dir": folder,
        "per_device_train_batch_size": number_of(job.batch_size),
        "gradient_accumulation_steps": batches,
        "max_steps": steps,
        "bf16": job.mixed_precision == "bf16",
        "fp16": job.mixed_precision == "fp16",
        "optim": job.optimizer if named else "adamw_torch",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": kwargs,
    }
