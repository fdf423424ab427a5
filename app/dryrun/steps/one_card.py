"""What transformers, accelerate and TRL ask a machine for, answered for the one card that is planned.

None of it changes what a trainer computes. It says which device there is, leaves out what takes time and no memory, and
gives a dry run what only a card could tell. Everything is replaced through :mod:`vramplan.dryrun.sandbox`, whose table
has the reasons.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...job import Job
from .. import sandbox
from ..observer import StepObserver
from ..symbols import sym_range
from . import empty_triton


class _OnCuda:
    """A tensor as its program would find it on a card."""

    device = torch.device("cuda")

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def __getattr__(self, name: str):
        return getattr(self._tensor, name)


@contextlib.contextmanager
def as_one_card(observer: StepObserver, job: Job) -> Iterator[None]:
    """While the context lasts, the job's trainer finds a process with one card, of the observer's device."""
    trl = job.trainer == "trl"
    if trl:
        import trl.trainer.utils
    before = empty_triton.Kernel.values
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, empty_triton.Kernel, "values", before)
        empty_triton.Kernel.values = observer.values
        undo.enter_context(sandbox.environment(ACCELERATE_TORCH_DEVICE=observer.device, DS_ACCELERATOR="cpu"))
        for holder, name, value in (
            *_for_trainers(observer),
            *(_for_trl() if trl else ()),
            *(_for_apollo() if "apollo" in job.optimizer else ()),
        ):
            undo.enter_context(sandbox.replaced(holder, name, value))
        yield


def _for_trainers(observer: StepObserver) -> Iterator[tuple[Any, str, Any]]:
    """What every trainer finds replaced: holder, name and value."""
    import accelerate.accelerator
    import accelerate.state
    import accelerate.utils.memory
    import transformers.trainer
    import transformers.training_args
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    for state in ("PartialState", "AcceleratorState", "GradientState"):
        yield getattr(accelerate.state, state), "_shared_state", {}
    if torch.distributed.is_initialized():
        many = accelerate.state.DistributedType.MULTI_GPU
        yield accelerate.state.PartialState, "_prepare_backend", lambda *args, **kwargs: ("fake", many)
        yield accelerate.state.PartialState, "set_device", _set_device(observer)
    yield transformers.training_args.TrainingArguments, "_setup_devices", _device_of(observer)
    yield transformers.training_args, "is_torch_bf16_gpu_available", _always(True)
    yield accelerate.accelerator, "is_bf16_available", _always(True)
    yield accelerate.accelerator, "get_grad_scaler", _scaler_of(observer)
    for module in (accelerate.utils.memory, transformers.trainer):
        yield module, "clear_device_cache", lambda *args, **kwargs: observer.empty_cache()
    manager = sandbox.new_optimizer_manager()  # the trainer and its optimiser speak to the same one
    yield GlobalOptimManager, "get_instance", lambda: manager
    yield torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor.to(observer.device)
    yield torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()


def _for_trl() -> Iterator[tuple[Any, str, Any]]:
    """What TRL's trainers find replaced beside it.

    The kernels of the chunked head fold tiles in place. On CUDA its product is ``addmm(out=…)``, without a temporary.

    Source: https://github.com/huggingface/trl/blob/v1.16.0/trl/kernels/chunked_logprob.py#L52 ``_addmm_fp32``.
    """
    chunked = [importlib.import_module(f"trl.kernels.chunked_{name}") for name in ("logprob", "divergence")]
    utils = importlib.import_module("trl.trainer.utils")
    base = importlib.import_module("trl.trainer.base_trainer")
    yield base._BaseTrainer, "_send_telemetry", _always(None)
    for module in chunked:
        for kernel in ("_forward_kernel", "_stats_kernel", "_jsd_kernel", "_backward_kernel"):
            yield module, kernel, empty_triton.Kernel(None)
        yield module, "_use_triton", _always(True)
        yield module, "_addmm_fp32", _always(None)
        yield module, "range", functools.partial(_tiles, module.TOKEN_CHUNK_SIZE)
        yield module, "triton", type("triton", (), {"cdiv": staticmethod(lambda a, b: -(-a // b))})
    yield chunked[1], "_project", _projected(chunked[1]._project)
    yield utils, "_use_triton", _always(True)
    yield utils, "is_triton_available", _always(True)
    yield utils, "_supports_trl_loss_kernel", _asked_as_on_cuda(utils._supports_trl_loss_kernel)
    fused = empty_triton.fused_logprob_module().selective_log_softmax_and_entropy
    yield utils, "_fused_logprob_entropy", fused


def _tiles(rows: int, start, stop=None, step=1):
    """``range``, but of a loop over tiles of ``rows`` tokens the first, the second and the last.

    Each one between takes what the second takes, and leaves nothing behind. So a plan does not grow with the tokens,
    and one run is that of any number of tiles from four on.
    """
    if stop is None or step != rows or stop <= start + 3 * step:
        return sym_range(start, stop, step)
    return [start, start + step, start + (-(-(stop - start) // step) - 1) * step]


def _projected(whole: Callable) -> Callable:
    """``_project`` of the chunked divergence: on CUDA a product of half precision is written where it is wanted.

    Source: https://github.com/huggingface/trl/blob/v1.16.0/trl/kernels/chunked_divergence.py#L360 ``_project``.
    """

    def project(tile, hidden, weight, bias, start, end, dtype) -> None:
        if dtype not in (torch.float16, torch.bfloat16):
            return whole(tile, hidden, weight, bias, start, end, dtype)
        weight[start:end].to(dtype)
        return None if bias is None else tile.add_(bias[start:end].float())

    return project


def _for_apollo() -> Iterator[tuple[Any, str, Any]]:
    """What APOLLO's projector finds replaced: its random numbers, without the generator."""
    with contextlib.suppress(ImportError):  # transformers tells which package is missing
        projector = importlib.import_module("apollo_torch.random_projector")
        yield (
            projector,
            "stable_randn",
            lambda shape, seed, device, dtype: torch.randn(shape, device=device, dtype=dtype),
        )


def cards_seen(observer: StepObserver) -> int:
    """How many cards a trainer's process finds. It takes a batch for each, unless the model lies on several."""
    return 1 if observer.places is None else max(observer.places.cards, 1)


def _set_device(observer: StepObserver) -> Callable:
    """``PartialState.set_device`` of a process whose card is the observer's device."""

    def set_device(state) -> None:
        state.device = torch.device(observer.device)

    return set_device


def _always(value: Any) -> Callable:
    """A function that answers ``value``, whatever it is asked."""
    return lambda *args, **kwargs: value


def _device_of(observer: StepObserver) -> property:
    """``TrainingArguments._setup_devices`` of a process with one card."""

    def setup(arguments) -> torch.device:
        from accelerate.state import AcceleratorState, PartialState

        if vars(arguments).get("distributed_state") is None:
            AcceleratorState._reset_state(reset_partial_state=True)
            arguments.distributed_state, arguments._n_gpu = PartialState(), cards_seen(observer)
        return torch.device(observer.device)

    return property(setup)


def _scaler_of(observer: StepObserver) -> Callable:
    return lambda distributed_type=None, **kwargs: torch.amp.GradScaler(observer.device, **kwargs)


def _asked_as_on_cuda(function: Callable) -> Callable:
    """The function itself, whose tensors tell it that they lie on a card."""
    return lambda *tensors: function(*(None if tensor is None else _OnCuda(tensor) for tensor in tensors))
