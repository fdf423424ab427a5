"""ZeRO: DeepSpeed's own engine and optimizers on the meta device, through the Trainer that asks for them.

DeepSpeed reaches a device through one object (:mod:`~vramplan.dryrun.parallel.deepspeed_accelerator`). Its compiled
optimizers update what exists and allocate nothing, so they are left out. What lies on the host is counted
(:mod:`vramplan.dryrun.places`).

Source: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage_1_and_2.py
``DeepSpeedZeroOptimizer``; https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage3.py
``DeepSpeedZeroOptimizer_Stage3``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ...errors import PlanError
from ..places import Places
from ..sandbox import compiling_later, environment, names_restored, replaced, silenced
from ..tracker import MemoryTracker
from . import RankStrategy
from .deepspeed_config import deepspeed_config
from .process_group import process_group

_STATE = (
    *("deepspeed.utils.groups", "deepspeed.comm.comm", "deepspeed.comm.torch", "deepspeed.runtime.zero.utils"),
    *("deepspeed.runtime.zero.partition_parameters", "deepspeed.runtime.zero.parameter_offload"),
    *("deepspeed.accelerator.real_accelerator", "deepspeed.runtime.utils", "deepspeed.utils.nvtx"),
    *("transformers.integrations.deepspeed", "torch.nn.functional"),
)
"""Modules that DeepSpeed keeps the state of a process in, or whose functions it replaces."""
_COMPILED = ("deepspeed.ops.adam.cpu_adam", "deepspeed.ops.adam.fused_adam")
_AGREE = tuple(
    f"deepspeed.runtime.zero.{name}" for name in ("partitioned_param_coordinator", "partition_parameters", "stage3")
)


class Zero(RankStrategy):
    """ZeRO of the stage that the strategy's name ends with. Raises :class:`PlanError`."""

    repeats_layers = False  # buckets and prefetching go by numbers of elements

    @contextmanager
    def environment(self, tracker: MemoryTracker) -> Iterator[None]:
        """A process group, DeepSpeed's accelerator, and a host beside the card."""
        self._refuse()
        _import_deepspeed()
        with (
            silenced("DeepSpeed", "accelerate"),
            process_group(self.job.gpu_count, self.rank, self.job.nodes, tracker),
            names_restored([importlib.import_module(name) for name in _STATE]),
            Places(tracker),
            ExitStack() as undo,
        ):
            undo.enter_context(warnings.catch_warnings(action="ignore", category=FutureWarning))
            for holder, name, value in _replacements(tracker):
                undo.enter_context(replaced(holder, name, value))
            yield

    def trainer_arguments(self) -> dict[str, Any]:
        """The Trainer's argument that asks for DeepSpeed."""
        return {"deepspeed": deepspeed_config(self.job)}

    def host_bytes(self, model: torch.nn.Module) -> dict[str, int]:
        """Every rank of a node makes the whole model on the host first, unless it is partitioned while it is made."""
        if (self.job.deepspeed or {}).get("zero_init"):
            return {}
        tensors = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in model.state_dict().values()}
        return {"load": sum(tensors.values()) * (self.job.gpu_count // self.job.nodes)}

    def _refuse(self) -> None:
        """Refuse a job that DeepSpeed's engine is not made for by a Trainer."""
        if self.job.method == "inference":
            raise PlanError("ZeRO shards a training", "set strategy to tensor-parallel or device-map", "strategy")
        if self.job.trainer == "pytorch":
            raise PlanError(
                "ZeRO is planned through a Trainer, which makes DeepSpeed's engine", "set trainer to transformers"
            )


def _import_deepspeed() -> None:
    """Import DeepSpeed, which looks for a device when it is imported. Raises :class:`PlanError`."""
    try:
        with environment(DS_ACCELERATOR="cpu"), compiling_later():
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - it compiles while it is imported
    except ImportError:
        raise PlanError("ZeRO needs the package deepspeed", "pip install deepspeed==0.19.8", "strategy") from None


def _replacements(tracker: MemoryTracker) -> Iterator[tuple[Any, str, Any]]:
    """What DeepSpeed finds replaced: holder, name and value."""
    from deepspeed.accelerator import real_accelerator
    from deepspeed.runtime import engine

    from .deepspeed_accelerator import CompiledKernels, MetaAccelerator

    yield real_accelerator, "ds_accelerator", MetaAccelerator(tracker)
    yield torch.Tensor, "record_stream", lambda tensor, stream: None
    yield engine.DeepSpeedEngine, "step", _told(engine.DeepSpeedEngine.step, tracker)
    for name in _COMPILED:
        module = importlib.import_module(name)
        for builder in [known for known in vars(module) if known.endswith("Builder")]:
            yield module, builder, CompiledKernels
    for name in _AGREE:  # it asks the other ranks, of which there are none
        yield importlib.import_module(name), "assert_ints_same_as_other_ranks", lambda ints: None


def _told(step, tracker: MemoryTracker):
    """``DeepSpeedEngine.step``, which accelerate calls at the end of its backward: the phase ``optimizer`` begins."""

    def run(engine, *args, **kwargs):
        if engine.is_gradient_accumulation_boundary():
            tracker.in_backward = False
            tracker.mark("optimizer", tracker.step, "optimizer_temporaries")
        return step(engine, *args, **kwargs)

    return run
