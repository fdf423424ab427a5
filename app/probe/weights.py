"""Random weights, made on the card: nothing is fetched, and the loader's order is the plan's."""

from __future__ import annotations

import bitsandbytes as bnb
import torch

from ..dryrun.build.adapters import adapt
from ..dryrun.build.loading import MetaWeights
from ..dryrun.build.quantizers.linear import shape_of
from ..job import Job

SPREAD = 0.02
"""Standard deviation of the weights; norms are one, biases zero. As in ``shared/measured/measure.py``."""


class CardWeights(MetaWeights):
    """The methods of :class:`~vramplan.dryrun.build.loading.MetaWeights`, on a real device."""

    def __init__(self, device: str):
        self.device = device

    def quantized(self, linear: torch.nn.Linear, job: Job, path: str, tracker) -> torch.nn.Module:
        """``linear`` with random weights, quantised by bitsandbytes on the card."""
        quantization, (rows, columns) = job.quantization, shape_of(linear)
        bias = linear.bias is not None
        arriving = torch.empty(rows, columns, dtype=getattr(torch, job.dtype), device=self.device).normal_(0, SPREAD)
        if quantization.type == "int8":
            new = bnb.nn.Linear8bitLt(columns, rows, bias, has_fp16_weights=False, threshold=6.0, device="meta")
            weight = bnb.nn.Int8Params(arriving.cpu(), requires_grad=False, has_fp16_weights=False)
            new.weight = weight.to(self.device)  # it quantises what comes from the host
        else:
            options = {"compress_statistics": quantization.double_quant, "quant_type": quantization.type}
            compute = getattr(torch, quantization.compute_dtype)
            new = bnb.nn.Linear4bit(columns, rows, bias, compute_dtype=compute, device="meta", **options)
            weight = bnb.nn.Params4bit(arriving, requires_grad=False, module=new, **options)
            new.weight = weight.to(self.device)
        if bias:
            new.bias = linear.bias
        return new

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
