"""The interface between a step and whoever observes it: the tracker of a dry run, or the recorder of a real one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from .known_values import Images, KnownValues


class AutocastSwitch(Protocol):
    """Something that can enter autocast: :class:`~vramplan.dryrun.autocast.Autocast`, or PyTorch's own."""

    def on(self) -> AbstractContextManager[Any]:
        """Autocast is on while the context lasts."""


class StepObserver(Protocol):
    """Whoever observes a step.

    The code that builds a model, makes a batch and runs a step tells its observer where phases begin and which tensors
    are what. :class:`~vramplan.dryrun.tracker.MemoryTracker` observes a dry run on the meta device,
    :class:`~vramplan.probe.recorder.Recorder` a run on a GPU.
    """

    device: str
    """The device on which a batch is made: ``meta``, or the recorder's."""
    autocast: AutocastSwitch | None
    """The job's autocast, or None where the job does not use mixed precision."""
    in_backward: bool
    """True while autograd runs backward."""
    forwards_left: int | None
    """How many forward passes of the model may still begin; None: any number."""
    length: int | torch.SymInt
    """The length of the job's sequences, in tokens."""
    shifted: int | torch.SymInt
    """The number of label positions after the causal shift."""
    labelled: int | torch.SymInt
    """How many of the ``shifted`` labels are not -100. A mask of ``shifted`` elements selects that many rows."""

    @property
    def images(self) -> Images | None:
        """The images that a vision-language model is shown."""

    @property
    def values(self) -> KnownValues | None:
        """The values that are known on the meta device; None where none are followed, and on a GPU."""

    def mark(self, phase: str, step: int, kind: str) -> None:
        """Begin ``phase`` of ``step``. Allocations are of ``kind`` until :meth:`reclassify` says otherwise."""

    @property
    def phase(self) -> str:
        """The phase that is open."""

    def during(self, phase: str, kind: str = "activations") -> AbstractContextManager[Any]:
        """A phase within another one, which goes on afterwards."""

    def register_model(self, model: torch.nn.Module, prefix: str) -> None:
        """Take note of one more model, which is on the device now. Its fqns begin with ``prefix``."""

    def close(self) -> Any:
        """Stop: what is freed after this is not the job's."""

    def empty_cache(self) -> None:
        """``torch.cuda.empty_cache()``."""

    def watching(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """Attribute allocations to the modules of ``model`` while the context lasts."""

    def register_batch(self, batch: dict[str, torch.Tensor], stated: dict[str, torch.Tensor]) -> None:
        """Take note of a batch that is on the device now; ``stated`` has the values that the job states of it."""

    def reclassify(self, tensor: torch.Tensor, kind: str, fqn: str | None = None) -> None:
        """Say what an allocation turned out to be: a gradient, an optimiser state, an input."""

    def inherit_owner(self, tensor: torch.Tensor, owned: torch.Tensor) -> None:
        """Attribute ``tensor`` to the module to which ``owned`` belongs."""
