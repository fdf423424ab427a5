"""Tensor parallelism: transformers' own plan of the model's class, on DTensors of the meta device.

Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/distributed/tensor_parallel.py
``apply_tensor_parallelism``, which ``from_pretrained`` calls before it loads the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed import DistributedConfig

from ...errors import PlanError
from ..build.loading import MetaWeights
from ..tracker import MemoryTracker
from . import RankStrategy
from .process_group import process_group
from .warm_up import warm_up


class TensorParallel(RankStrategy):
    """``from_pretrained(tp_plan="auto")`` on every rank. Raises :class:`PlanError`."""

    @contextmanager
    def environment(self, tracker: MemoryTracker) -> Iterator[None]:
        """A process group of all ranks."""
        self._refuse()
        with process_group(self.job.gpu_count, self.rank, self.job.nodes, tracker):
            yield

    def weights(self, model: torch.nn.Module, tracker: MemoryTracker) -> MetaWeights:
        """The model's own shards."""
        return _Shards(self.job.gpu_count)

    def _refuse(self) -> None:
        """Refuse what the stack does not run."""
        if self.job.quantization is not None:
            raise PlanError(
                "tensor parallelism of quantised layers is not planned", "leave quantization out", "quantization"
            )
        if self.job.lora is not None or self.job.adapter is not None:
            raise PlanError(
                "adapters on a tensor-parallel model do not run in this stack: the base layer's output is sharded and "
                "the adapter's is not, a size mismatch in PEFT's lora/layer.py",
                "set strategy to ddp or fsdp2, or method to full",
                "strategy",
            )
        if self.job.trainer != "pytorch" and self.job.method != "inference":
            raise PlanError("tensor parallelism is planned in a plain loop", "set trainer to pytorch", "trainer")


class _Shards(MetaWeights):
    """Shards of a model's weights on the meta device."""

    def __init__(self, size: int):
        self.size = size

    def allocate(self, model: torch.nn.Module, observer: MemoryTracker) -> None:
        """Shard the model by its class's plan and record this rank's part. Raises :class:`PlanError`."""
        if self.size > 1:
            self._shard(model)
        card = torch.device("cuda", 0)
        warm_up(observer, model, dict.fromkeys(model.state_dict(), card), 0, None)
        super().allocate(model, observer)

    def _shard(self, model: torch.nn.Module) -> None:
        if not model.supports_tp_plan:
            raise PlanError(
                f"{type(model).__name__} has no plan for tensor parallelism", "set strategy to device-map or fsdp2"
            )
        config = DistributedConfig(tp_plan="auto", tp_size=self.size)
        try:
            model.maybe_distribute_model(model, config, init_device_mesh("meta", (self.size,)))
            _check_heads(model.config.get_text_config(), self.size)
        except ValueError as error:
            raise PlanError(str(error).splitlines()[0], "set gpu_count to a divisor of it", "gpu_count") from None
        model.tie_weights()


def _check_heads(config, size: int) -> None:
    """The layers view their shard as heads of the config's size: a head is not divided."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise ValueError(f"the model's {name} are {heads}, which {size} cards do not divide")
