"""Random weights, made on the card: nothing is fetched, and the loader's order is the plan's."""

from __future__ import annotations

import torch

from ..dryrun.build.adapters import adapt
from ..dryrun.build.loading import MetaWeights
from ..dryrun.build.quantizers import Layout
from ..dryrun.build.quantizers.bnb_linear import shape_of
from ..job import Job

SPREAD = 0.02
"""Standard deviation of the weights; norms are one, biases zero. As in ``shared/measured/measure.py``."""


class CardWeights(MetaWeights):
    """The methods of :class:`~vramplan.dryrun.build.loading.MetaWeights`, on a real device."""

    def __init__(self, device: str):
        self.device = device

    def quantized(self, layout: Layout, linear: torch.nn.Module, job: Job, path: str, tracker) -> torch.nn.Module:
        """``linear`` with random weights, quantised by its library on the card."""
        weight = torch.empty(*shape_of(linear), dtype=getattr(torch, job.dtype), device=self.device)
        return layout.on_card(linear, job, weight.normal_(0, SPREAD))

    def allocate(self, model: torch.nn.Module, tracker) -> None:
        made: dict[int, torch.Tensor] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device.type == "meta":
                    if id(parameter) not in made:  # a tied weight is one
                        weight = self._random(parameter, 1.0 if "weight" in name else 0.0)
                        made[id(parameter)] = torch.nn.Parameter(weight, parameter.requires_grad)
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=self.device)

    def _random(self, parameter: torch.Tensor, vector: float) -> torch.Tensor:
        out = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
        if not out.is_floating_point():
            return out.zero_()
        return out.normal_(0, SPREAD) if out.dim() > 1 else out.fill_(vector)

    def adapted(self, model: torch.nn.Module, job: Job, task: str, tracker) -> torch.nn.Module:
        return adapt(model, job, task, self.device)

    def cast_by_trl(self, model: torch.nn.Module, tracker) -> None:
        """The real ``SFTTrainer.__init__`` does it."""
