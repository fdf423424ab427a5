"""DeepSpeed's config for a job: the job's own, or the one that transformers documents for a stage.

Source: https://github.com/huggingface/transformers/blob/v5.17.0/docs/source/en/deepspeed.md
"""

from __future__ import annotations

import copy
from typing import Any

from ...errors import PlanError
from ...job import Job

OPTIONS = ("offload_optimizer", "offload_param", "zero_init", "torch_adam", "client_optimizer", "buckets")
"""The keys of a job's ``deepspeed`` where it is no DeepSpeed config."""
BUCKET = 5e8
"""Elements of a bucket in transformers' documentation."""


def deepspeed_config(job: Job) -> dict[str, Any]:
    """The config, with ``auto`` where the Trainer decides. Raises :class:`PlanError`."""
    stage, given = int(job.strategy[-1]), job.deepspeed or {}
    if "zero_optimization" in given:
        _check_stage(given, stage)
        return copy.deepcopy(given)
    for name in given.keys() - set(OPTIONS):
        raise PlanError(f"deepspeed has no option {name!r}", f"it has {', '.join(OPTIONS)}", "deepspeed")
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
