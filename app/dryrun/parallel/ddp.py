"""DDP: torch's own ``DistributedDataParallel`` on the meta device, over a reducer in Python.

The one of torch is C++ and reads addresses of gradients. What it allocates is restated here, under its names: buckets,
built anew before the second forward pass. Its collectives work in the buckets, and take nothing else.

Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/csrc/distributed/c10d/reducer.cpp
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ...errors import PlanError
from ...registry.trainers import TRAINERS
from ..sandbox import environment, replaced
from ..tracker import MemoryTracker
from . import RankStrategy
from .process_group import process_group

IN_TRAINING_ARGUMENTS = {
    "find_unused_parameters": "ddp_find_unused_parameters",
    "bucket_cap_mb": "ddp_bucket_cap_mb",
    "static_graph": "ddp_static_graph",
}
"""Options of a job, and the arguments of ``TrainingArguments`` that say the same."""


class Ddp(RankStrategy):
    """DDP over all the ranks, which allocate alike."""

    steps = 3  # the second one builds the buckets anew

    @contextmanager
    def environment(self, tracker: MemoryTracker) -> Iterator[None]:
        """A process group, and a reducer for gradients on the meta device."""
        with process_group(self.job.gpu_count, self.rank, self.job.nodes, tracker), ExitStack() as undo:
            undo.enter_context(environment(ACCELERATE_BYPASS_DEVICE_MAP="true"))
            reducer = type("Reducer", (Reducer,), {"tracker": tracker})
            for holder, name, value in (
                (dist, "Reducer", reducer),
                (dist, "Logger", Logger),
                (torch.nn.parallel.distributed, "_verify_param_shape_across_processes", lambda *args, **kwargs: True),
            ):
                undo.enter_context(replaced(holder, name, value))
            yield

    def wrap(self, model: torch.nn.Module, tracker: MemoryTracker) -> torch.nn.Module:
        """The model of a plain loop in ``DistributedDataParallel``; a hosted trainer's own accelerate does it."""
        if TRAINERS[self.job.trainer].hosted:
            return model
        tracker.mark("load", 0, "temporaries")
        wrapped = torch.nn.parallel.DistributedDataParallel(model, **self._given())
        tracker.empty_cache()
        return wrapped

    def caveats(self, trained: int) -> list[str]:
        """The buckets of the first step may stay through the second one, on one rank and not on the other.

        NCCL's work keeps its tensors until a thread of the process group has seen it end, and that thread looks every
        100 ms; by then the buckets that replace them may have been made.

        Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp
        ``Watchdog::runLoop``, ``TensorShelf``. Confirmed by two ranks of llama-3.2-1b on two H100s whose peaks differ
        by the bytes of the buckets, 2,473,582,592.
        """
        if self._given().get("find_unused_parameters"):
            return []
        took = trained * self.trained_itemsize / 2**30
        return [
            f"DDP builds its buckets anew in the second step, and NCCL's watchdog, which looks every 100 ms, may still "
            f"hold those of the first: a rank may take {took:.2f} GiB more in that step"
        ]

    def trainer_arguments(self) -> dict[str, Any]:
        """What ``TrainingArguments`` says of DDP, as far as the job does. Raises :class:`PlanError` for the rest."""
        given = self._given()
        for name in given.keys() - IN_TRAINING_ARGUMENTS.keys():
            raise PlanError(f"TrainingArguments has no word for ddp.{name}", f"leave ddp.{name} out", "ddp")
        return {IN_TRAINING_ARGUMENTS[name]: value for name, value in given.items()}

    def _given(self) -> dict[str, Any]:
        """The options that the job sets."""
        return {} if self.job.ddp is None else self.job.ddp.model_dump(exclude_none=True)


class Logger:
    """``dist.Logger``, which takes nothing of a card."""

    def __init__(self, reducer: Reducer):
        """As ``dist.Logger``."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class Reducer:
    """``dist.Reducer``, as far as it allocates.

    A bucket is one tensor for the gradients of its parameters. Each gradient is copied there when it is ready, or is a
    view of it from then on (``gradient_as_bucket_view``).
    """

    tracker: MemoryTracker

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        bucket_indices: list[list[int]],
        per_bucket_size_limits: list[int],
        process_group: Any,
        expect_sparse_gradients: Sequence[bool],
        bucket_bytes_cap: int,
        find_unused_parameters: bool,
        gradient_as_bucket_view: bool,
        names: Any,
        first_bucket_bytes_cap: int,
        *others: Any,
    ):
        self.parameters, self.expect_sparse_gradients = parameters, list(expect_sparse_gradients)
        self.limits = [first_bucket_bytes_cap, bucket_bytes_cap]
        self.find_unused_parameters, self.as_view = find_unused_parameters, gradient_as_bucket_view
        self.static_graph = self.has_rebuilt_buckets = self.expect_autograd_hooks = self.finalizes = False
        self.ready: list[int] = []
        self.initialize_buckets(bucket_indices)
        self.local_used_map_dev = torch.empty(len(parameters), dtype=torch.int32, device=parameters[0].device)
        for index, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: self.autograd_hook(index))

    def initialize_buckets(self, bucket_indices: list[list[int]]) -> None:
        """The buckets of these parameters, after those that were there are gone."""
        self.buckets: list[torch.Tensor] = []
        self.views: dict[int, torch.Tensor] = {}
        for indices in bucket_indices:
            members = [self.parameters[index] for index in indices]
            size = sum(member.numel() for member in members)
            bucket = torch.empty(size, dtype=members[0].dtype, device=members[0].device)
            self.tracker.reclassify(bucket, "gradients")
            self.buckets.append(bucket)
            if self.as_view:
                parts = bucket.split([member.numel() for member in members])
                views = (part.view(member.shape) for part, member in zip(parts, members, strict=True))
                self.views.update(zip(indices, views, strict=True))

    def autograd_hook(self, index: int) -> None:
        """A gradient is ready (``mark_variable_ready_dense``)."""
        if not self.expect_autograd_hooks:
            return
        if not self.finalizes:
            self.finalizes = True
            torch.autograd.Variable._execution_engine.queue_callback(self.finalize_backward)
        if self.should_rebuild_buckets():
            self.ready.append(index)
        if self.as_view and index in self.views:
            self.parameters[index].grad = self.views[index]

    def should_rebuild_buckets(self) -> bool:
        """Once, after the first backward pass, unless parameters may be unused."""
        return (self.static_graph or not self.find_unused_parameters) and not self.has_rebuilt_buckets

    def _rebuild_buckets(self) -> bool:
        """The buckets in the order in which gradients became ready, where that is due."""
        if not self.should_rebuild_buckets() or not self.ready:
            return False
        order = [*dict.fromkeys(self.ready)]
        indices, _ = dist._compute_bucket_assignment_by_size(
            [self.parameters[index] for index in order],
            self.limits,
            [self.expect_sparse_gradients[index] for index in order],
            order,
        )
        self.has_rebuilt_buckets = True
        self.initialize_buckets(indices)
        self.ready.clear()
        return True

    def prepare_for_backward(self, outputs: list[torch.Tensor]) -> None:
        """Gradients that become ready from now on are reduced."""
        self.expect_autograd_hooks = True

    def finalize_backward(self) -> None:
        """All are reduced; a pass that is not prepared for is not synchronised."""
        self.expect_autograd_hooks = self.finalizes = False

    def _set_static_graph(self) -> None:
        self.static_graph = True

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None
