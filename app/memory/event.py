"""A training step as a list of events: memory taken and memory given back.

Writers are the dry run on the meta device and the probe on a real card; readers are the allocator replay,
the breakdown, the timeline and the comparison. They meet only here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

KINDS = (
    "weights",
    "quantization_constants",
    "adapters",
    "buffers",
    "inputs",
    "gradients",
    "optimizer_state",
    "activations",
    "activation_gradients",
    "logits_and_loss",
    "kv_cache",
    "dequantized_weights",
    "optimizer_temporaries",
    "kernel_workspace",
    "temporaries",
)
"""What an allocation is for. The parts of a peak are sums over these and nothing else."""


class Allocation(NamedTuple):
    """One request to the allocator.

    ``size`` is the bytes asked for (before any rounding), ``module`` the dotted path of the module on whose
    behalf it was made (``""``: the model itself or the training loop), ``kind`` one of :data:`KINDS`,
    ``phase`` the phase in which it was made and ``op`` the operator that made it.
    """

    size: int
    module: str
    kind: str
    phase: str
    op: str


class Mark(NamedTuple):
    """A place in the stream: everything from event ``at`` on belongs to phase ``name`` of step ``step``.

    A mark named ``empty_cache`` is the call of that name: the allocator gives back what it holds unused.
    """

    at: int
    name: str
    step: int


EMPTY_CACHE = "empty_cache"


@dataclass
class Books:
    """The events of one run, in order.

    ``events[i]`` is ``k`` where ``allocations[k]`` is taken and ``~k`` where it is given back.
    ``sites[i]`` is the module path during which event ``i`` happened: for a release, where it was released.
    """

    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
