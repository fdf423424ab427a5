"""Random weights, made on the card: nothing is fetched, and the order of loading is the plan's."""

from __future__ import annotations

import torch

from ..dryrun.build.adapters import adapt
from ..dryrun.build.quantizers import Layout
from ..dryrun.build.quantizers.bnb_linear import shape_of
from ..job import Job
from .recorder import Recorder

SPREAD = 0.02
"""Standard deviation of the weights; norms are one, biases zero. As in ``shared/measured/measure.py``."""


class CardWeights:
    """:class:`~vramplan.dryrun.build.loading.Weights` on a real device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def quantized(
        self, layout: Layout, linear: torch.nn.Module, job: Job, path: str, observer: Recorder
    ) -> torch.nn.Module:
        """``linear`` with random weights, quantised by its library on the card."""
        weight = torch.empty(*shape_of(linear), dtype=getattr(torch, job.dtype), device=self.device)
        return layout.on_card(linear, job, weight.normal_(0, SPREAD))

    def allocate(self, model: torch.nn.Module, observer: Recorder) -> None:
        """Give every parameter that is on the meta device random values on the card, and every buffer zeros."""
        made: dict[int, torch.nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device.type == "meta":
                    if id(parameter) not in made:  # a tied weight is one
                        values = self._random(parameter, 1.0 if "weight" in name else 0.0)
                        made[id(parameter)] = torch.nn.Parameter(values, parameter.requires_grad)
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=self.device)

    def _random(self, parameter: torch.Tensor, vector: float) -> torch.Tensor:
        """Values of the shape of ``parameter``: random ones of a matrix, ``vector`` of a vector."""
        out = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
        if not out.is_floating_point():
            return out.zero_()
        return out.normal_(0, SPREAD) if out.dim() > 1 else out.fill_(vector)

    def adapted(self, model: torch.nn.Module, job: Job, task: str, observer: Recorder) -> torch.nn.Module:
        """The model with the job's adapters, made on the card."""
        return adapt(model, job, task, self.device)
