"""FSDP2: torch's own ``fully_shard`` on the meta device, as a plain loop calls it or as accelerate does.

Sharded are the modules of a model's ``_no_split_modules``, then what is left, as one. The model is loaded on the host,
unless it is quantised; ``fully_shard`` moves what it shards to the card, group by group.

Source: https://github.com/pytorch/pytorch/tree/v2.11.0/torch/distributed/fsdp/_fully_shard
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ...errors import PlanError
from ...job import Fsdp, Job
from ...registry.trainers import TRAINERS
from ..inputs import base_of
from ..sandbox import replaced
from ..tracker import MemoryTracker
from . import RankClass, RankStrategy
from .process_group import process_group


class Fsdp2(RankStrategy):
    """FSDP2 over all the ranks."""

    @property
    def options(self) -> Fsdp:
        """The job's options; where it has none, the defaults."""
        return self.job.fsdp or Fsdp()

    @contextmanager
    def environment(self, tracker: MemoryTracker) -> Iterator[None]:
        """A process group, and ``fully_shard`` for tensors on the meta device. A quantised model is made on the card,
        any other on the host."""
        if self.options.cpu_offload:
            raise PlanError("FSDP2's cpu_offload is not planned yet", "leave fsdp.cpu_offload out", "fsdp")
        with process_group(self.job.gpu_count, self.rank, self.job.nodes, tracker), ExitStack() as undo:
            tracker.on_host = self.job.quantization is None
            for holder, name, value in self._replaced(tracker):
                undo.enter_context(replaced(holder, name, value))
            yield

    def wrap(self, model: torch.nn.Module, tracker: MemoryTracker) -> torch.nn.Module:
        """The model of a plain loop, sharded; a hosted trainer's own accelerate does it."""
        if TRAINERS[self.job.trainer].hosted:
            return model
        options = self.options
        names = set(options.wrap or getattr(base_of(model), "_no_split_modules", None) or ())
        found = [module for module in model.modules() if type(module).__name__ in names]
        if not found:
            raise PlanError(
                f"{type(base_of(model)).__name__} has no modules of the classes to be sharded: {sorted(names)}",
                "name classes of its layers in fsdp.wrap",
                "fsdp",
            )
        from torch.distributed import fsdp

        how = {"reshard_after_forward": options.reshard_after_forward, **_policies(options)}
        tracker.mark("load", 0, "weights")
        for module in found:
            fsdp.fully_shard(module, **how)
        fsdp.fully_shard(model, **how)
        _on_card_now(model, tracker, self.job)
        return model

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of ``TrainingArguments``: FSDP of version 2, as transformers' documentation writes it."""
        options = self.options
        wrap = {"transformer_layer_cls_to_wrap": list(options.wrap)} if options.wrap is not None else {}
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "state_dict_type": "SHARDED_STATE_DICT",
                "cpu_ram_efficient_loading": False,
                "reshard_after_forward": options.reshard_after_forward,
                "cpu_offload": options.cpu_offload,
                "activation_checkpointing": options.activation_checkpointing,
                **wrap,
            },
        }

    @property
    def trained_itemsize(self) -> int:
        """accelerate casts what is trained to float32 where it computes in less, unless weights are in 4 bit."""
        cast = TRAINERS[self.job.trainer].hosted and self.job.mixed_precision != "no" and not self.job.quantization
        return 4 if cast else super().trained_itemsize

    def rank_classes(self, model: torch.nn.Module) -> list[RankClass]:
        """Ranks whose shards are alike. A parameter's rows are dealt out in chunks of equal size, the last ranks get
        fewer or none; the gathered copies are padded to equal shards, what an optimiser keeps is not."""
        world = self.job.gpu_count
        bounds = {world}
        for rows in {parameter.shape[0] for parameter in model.parameters() if parameter.dim()}:
            chunk = -(-rows // world)
            bounds |= {rows // chunk, -(-rows // chunk)}
        ordered = sorted(bound for bound in bounds if 0 < bound <= world)
        if len(ordered) == 1:
            return []
        words = ["full shards of every weight", *["smaller shards of weights that do not divide"] * (len(ordered) - 1)]
        return [
            RankClass(word, first, last - 1) for word, first, last in zip(words, [0, *ordered], ordered, strict=False)
        ]

    def _replaced(self, tracker: MemoryTracker) -> Iterator[tuple[Any, str, Any]]:
        """What is replaced of FSDP2: holder, name and value."""
        from accelerate import accelerator
        from torch.distributed import fsdp
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

        init = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_init")
        shard, gather = fsdp.fully_shard, FSDPParam.alloc_all_gather_outputs
        states: dict[int, tuple[str, str]] = {}

        def fully_shard(module, *args, **kwargs):
            for one in [module] if isinstance(module, torch.nn.Module) else module:
                states.update(_states(one, tracker, self.job.method))
            before, tracker.on_host = tracker.on_host, False
            try:
                return shard(module, *args, **kwargs)
            finally:
                tracker.on_host = before

        def move(params, buffers, device) -> None:
            for tensor in (*params, *buffers):
                if tracker.key_of(tensor) is None:  # it lies on the host, and others may hold it there
                    with _disable_current_modes():
                        tensor.data = torch.empty_like(tensor.data)
                    tracker.register_existing(tensor, *states.get(id(tensor), ("", "weights")))

        def gather_outputs(param: FSDPParam) -> None:
            gather(param)
            for tensor in param.all_gather_outputs:
                tracker.reclassify(tensor, "weights")
                tracker.inherit_owner(tensor, param._sharded_param_data)

        prepare = accelerator.fsdp2_prepare_model

        def prepared(accelerate, model):
            model = prepare(accelerate, model)
            _on_card_now(model, tracker, self.job)
            return model

        yield accelerator, "fsdp2_prepare_model", prepared
        yield torch.Tensor, "data_ptr", _address(torch.Tensor.data_ptr)
        yield fsdp, "fully_shard", fully_shard
        yield init, "_move_states_to_device", move
        entry = importlib.import_module("torch.distributed.fsdp._fully_shard._fully_shard")
        yield entry, "_init_default_mesh", lambda *names: init_device_mesh("meta", (self.job.gpu_count,))
        yield entry, "_get_device_from_mesh", lambda mesh: torch.device("meta")
        yield FSDPParamGroup, "_validate_no_meta_params", lambda group: None
        yield FSDPParam, "alloc_all_gather_outputs", gather_outputs


def _states(module: torch.nn.Module, tracker: MemoryTracker, method: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """The parameters and buffers below ``module``, by identity: the module that each belongs to, and its kind."""
    for child in module.modules():
        for store, kind in ((child._parameters, "weights"), (child._buffers, "buffers")):
            for tensor in store.values():
                if tensor is not None:
                    trained = tensor.requires_grad and method != "full"
                    yield id(tensor), (tracker.fqn_of(child), "adapters" if trained else kind)


def _on_card_now(model: torch.nn.Module, tracker: MemoryTracker, job: Job) -> None:
    """The model is sharded: what is made from now on lies on the card, and its shards are named."""
    tracker.on_host = False
    for child in model.modules():
        for parameter in child._parameters.values():
            if parameter is not None:
                kind = "adapters" if parameter.requires_grad and job.method != "full" else "weights"
                tracker.reclassify(parameter, kind, tracker.fqn_of(child))
    tracker.empty_cache()


def _address(data_ptr: Callable[[torch.Tensor], int]) -> Callable[[torch.Tensor], int]:
    """``Tensor.data_ptr``, that tells tensors without memory apart by their storages."""

    def address(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata if tensor.device.type == "meta" else data_ptr(tensor)

    return address


def _policies(options: Fsdp) -> dict[str, Any]:
    """The arguments of ``fully_shard`` that say in which dtype it gathers and reduces."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    named = {"param_dtype": options.param_dtype, "reduce_dtype": options.reduce_dtype}
    given = {name: getattr(torch, dtype) for name, dtype in named.items() if dtype is not None}
    return {"mp_policy": MixedPrecisionPolicy(**given)} if given else {}
