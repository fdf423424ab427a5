"""DeepSpeed's config for a job: the job's own, or the one that transformers documents for a stage.

Source: https://github.com/huggingface/transformers/blob/v5.17.0/docs/source/en/deepspeed.md
"""

from __future__ import annotations

import copy
from typing import Any

from ...errors import PlanError, near
from ...job import Job

_PLACES = ("none", "cpu")
_EITHER = (True, False)
OPTIONS: dict[str, tuple] = {
    "offload_optimizer": _PLACES,
    "offload_param": _PLACES,
    "zero_init": _EITHER,
    "torch_adam": _EITHER,
    "client_optimizer": _EITHER,
    "buckets": ("auto", "default"),
}
"""The keys of a job's ``deepspeed`` where it is no DeepSpeed config, and what each may be."""
BUCKET = 5e8
"""Elements of a bucket in transformers' documentation."""


def deepspeed_config(job: Job) -> dict[str, Any]:
    """The config, with ``auto`` where the Trainer decides. Raises :class:`PlanError`."""
    stage, given = int(job.strategy[-1]), job.deepspeed or {}
    if "zero_optimization" in given:
        _check_stage(given, stage)
        return copy.deepcopy(given)
    given = _checked(given, stage)
    config = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": _zero_optimization(stage, given),
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    if not given.get("client_optimizer"):
        params: dict[str, Any] = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        if given.get("torch_adam"):
            params["torch_adam"] = True
        config["optimizer"] = {"type": "AdamW", "params": params}
    return config


def _checked(given: dict[str, Any], stage: int) -> dict[str, Any]:
    """The options; of a place true is ``cpu``, false ``none``. Raises :class:`PlanError` for what is no option, or no
    value of it."""
    out = {}
    for name, value in given.items():
        if name not in OPTIONS:
            raise PlanError(f"deepspeed has no option {name!r}", near(name, OPTIONS), "deepspeed")
        if OPTIONS[name] is _PLACES and isinstance(value, bool):
            value = _PLACES[value]
        if value is not None and (value not in OPTIONS[name] or isinstance(value, bool) != (OPTIONS[name] is _EITHER)):
            said = ", ".join(str(one).lower() for one in OPTIONS[name])
            raise PlanError(f"deepspeed.{name} is {value!r}", f"it may be {said}", "deepspeed")
        out[name] = value
    if out.get("offload_param") == "cpu" and stage < 3:
        hint = "set strategy to zero3, or leave offload_param out"
        raise PlanError("zero3 alone offloads parameters", hint, "deepspeed")
    return out


def _check_stage(config: dict, stage: int) -> None:
    said = config["zero_optimization"].get("stage") if isinstance(config["zero_optimization"], dict) else None
    if said != stage:
        raise PlanError(
            f"zero_optimization.stage is {said!r}, and the strategy is zero{stage}", "make them agree", "deepspeed"
        )


def _zero_optimization(stage: int, given: dict) -> dict[str, Any]:
    """The ``zero_optimization`` of the documented config of this stage."""
    automatic = given.get("buckets", "default" if stage < 3 else "auto") == "auto"
    zero: dict[str, Any] = {"stage": stage}
    if stage == 1 and automatic:
        zero["reduce_bucket_size"] = "auto"
    if stage == 2:
        zero |= dict.fromkeys(("allgather_partitions", "overlap_comm", "reduce_scatter", "contiguous_gradients"), True)
        zero |= {"allgather_bucket_size": BUCKET, "reduce_bucket_size": "auto" if automatic else BUCKET}
    if stage == 3:
        zero |= dict.fromkeys(
            ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"
        )
        zero |= dict.fromkeys(("sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 1e9)
        zero |= {"overlap_comm": True, "contiguous_gradients": True, "stage3_gather_16bit_weights_on_model_save": True}
    for name in ("offload_optimizer", "offload_param"):
        if given.get(name) == "cpu":
            zero[name] = {"device": "cpu", "pin_memory": True}
    return zero
