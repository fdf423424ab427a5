"""The one place where others' code is patched: what, why, for which versions, and who else may notice.

A trace runs the real torch, transformers, PEFT, bitsandbytes and TRL. Some of their functions must behave as they do
on a CUDA device, so they are replaced while a trace runs, and only then: :func:`active` takes one lock for the whole
process, and undoes on exit whatever is still replaced. :func:`replaced` is the only way to set a foreign name, and it
takes the names of :data:`PATCHES` only.

Another thread's code runs as before meanwhile: a replaced function answers the tracing thread alone
(:class:`_PerThread`), unless its row says how the value itself tells its own objects from others. One thing is seen by
all: while a trace runs, meta tensors take their shapes from PyTorch's C++ functions, not from those in Python.
"""

from __future__ import annotations

import builtins
import ctypes
import functools
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from threading import RLock, get_ident
from types import MethodType, ModuleType
from typing import Any, NamedTuple, Protocol

import huggingface_hub.constants
import numpy
import torch

from ..errors import OurFault


class Patch(NamedTuple):
    """A foreign name that a trace replaces.

    ``target`` is the module's or the class's full name and the attribute (``*``: any part). ``versions`` are those in
    which the name was read. ``alone`` tells that only the tracing thread sees the new value; else the reason says why
    no other thread's code notices. ``absent`` says why an installed version may not have the name.
    """

    target: str
    reason: str
    versions: str
    alone: bool = True
    absent: str = ""


_FOREACH = "torch.optim takes its for-each and fused kernels by device type: the meta device stands for CUDA"
_NO_VALUES = "weights that do not exist need no initialisation"
_PAGED = "paged optimizer state lies in managed memory, which the caching allocator does not hand out"
_FUSED_HEAD = "SFTTrainer's fused head takes its Triton kernels on a GPU; they allocate nothing"
_COMPILED = "it is compiled on a card, for the card"
_TORCH = "torch 2.13"
_BNB = "bitsandbytes 0.50"
_TRL = "trl 1.16"
_PEFT = "peft 0.21"
_TRANSFORMERS = "transformers 5"
_ACCELERATE = "accelerate 1.15"
_ONE_CARD = "asks the machine for cards; meant is the one card that is planned"
_OWN_STATE = "accelerate keeps one state for the process: a trace has its own"
_CACHE = "empties the card's cache: the allocator that is planned has to know"
_MADE_HERE = "TRL makes models for itself; here they are made without weights, and what exists is used"
_SCRIPT = "in the process of vramplan run, cuda is the dry card"
_NO_CHECKPOINT = "the weights of a script's model are not read"
_RANKS = "one rank of many runs in one process, its tensors on the meta device"
_COMPILED = "builds kernels with a compiler; they update what exists"
_HOOKS = "compares devices that a hook sees, which the modes that name cards are not asked for in a forward pass"
_DEEPSPEED = "deepspeed 0.19"
_ASKED_FOR = "a package of its own, which ZeRO asks for"
_OFFLOADING = "activation offloading asks for streams and addresses, which only a card has"

PATCHES = (
    Patch(
        "sys.unraisablehook",
        "an error in a callback that frees memory is dropped by Python, and the trace would go on without the event",
        "Python 3.11 to 3.13",
    ),
    Patch(
        "huggingface_hub.constants.HF_HUB_OFFLINE",
        "a stranger's config makes no requests: vramplan.hub.client alone may reach the network",
        "huggingface_hub 1.33",
    ),
    Patch(
        "torch.compile",
        "bitsandbytes compiles functions for the CPU while it is imported, which imports the compiler: 42 MiB, 1 s",
        _TORCH,
    ),
    Patch(
        "torch.nn.modules.module.Module.__call__",
        "who an allocation is for is read off the module that runs",
        _TORCH,
        alone=False,  # calls of modules that the tracker does not know go straight on
    ),
    Patch("torch.nn.modules.module.Module.register_buffer", "large buffers need not exist", _TORCH),
    Patch(
        "torch.nn.modules.module.Module.register_parameter",
        "parameters of a model that is built need not exist (accelerate's init_empty_weights does so for all threads)",
        _TORCH,
    ),
    Patch("peft.*.init_empty_weights", "accelerate's sets a name of torch.nn.Module for all threads", _PEFT),
    Patch("sys.stderr", "a config's class may print to it", "Python 3.11 to 3.13"),
    Patch("torch.tensor", "on the meta device it drops its data before an operator runs", _TORCH),
    Patch("torch.nn.init.*_", _NO_VALUES, _TORCH),
    Patch("transformers.modeling_utils.PreTrainedModel.init_weights", _NO_VALUES, "transformers 5"),
    Patch("torch.autocast", "the meta device has no autocast key: a mode of ours casts", _TORCH),
    Patch("torch.is_autocast_enabled", "who asks of the meta device means CUDA", _TORCH),
    Patch("torch.get_autocast_dtype", "who asks of the meta device means CUDA", _TORCH),
    Patch("transformers.*.maybe_autocast", "the models' way to torch.autocast", "transformers 5"),
    Patch("torch.*._get_foreach_kernels_supported_devices", _FOREACH, _TORCH),
    Patch("torch.*._get_fused_kernels_supported_devices", _FOREACH, _TORCH),
    Patch("torch.cuda.synchronize", _PAGED, _TORCH),
    Patch(
        "torch.fx.experimental.symbolic_shapes._static_eval_sym_bool",
        "shape functions in Python are to ask the nodes of vramplan.dryrun.symbols",
        _TORCH,
        alone=False,  # other nodes are asked as before
    ),
    Patch(
        "torch._C._cuda_getCurrentRawStream",
        "bitsandbytes.backends.cuda.ops names it on import",
        _TORCH,
        absent="a build of torch for CPUs lacks it: that is why it is set",
    ),
    Patch("bitsandbytes.functional.get_paged", _PAGED, _BNB),
    Patch("bitsandbytes.functional.prefetch_tensor", _PAGED, _BNB),
    Patch("bitsandbytes.functional.fill", _PAGED, _BNB),
    Patch("bitsandbytes.functional.is_on_gpu", _PAGED, _BNB),
    Patch(
        "bitsandbytes.backends.cuda.ops._gpu_dispatch_props",
        "its heuristic for 4-bit products is asked for the planned card",
        _BNB,
    ),
    Patch(
        "bitsandbytes.optim.optimizer.GlobalOptimManager.get_instance",
        "a trace's optimizers have a manager of their own: the process's keeps the user's overrides",
        _BNB,
    ),
    Patch(
        "torch.ops.bitsandbytes.optimizer_update_32bit",
        "a norm that it takes as a number is a tensor without a value",
        _BNB,
        alone=False,  # who gives it a number gets what was there
    ),
    Patch("transformers.integrations.flex_attention.compile_friendly_flex_attention", _COMPILED, _TRANSFORMERS),
    Patch("transformers.masking_utils.create_block_mask", _COMPILED, _TRANSFORMERS),
    Patch("apollo_torch.random_projector.stable_randn", "the meta device has no generator", "apollo-torch 1.0"),
    Patch(
        "peft.tuners.lora.dora.DoraLinearLayer.update_layer",
        "what DoRA computes while it adapts is computed on the card",
        _PEFT,
    ),
    Patch("peft.tuners.lora.layer.LoraLayer.*_init", "what PiSSA and its like compute is computed on the card", _PEFT),
    Patch(
        "transformers.models.*.range",
        "a recurrent scan is run for a few tokens",
        "transformers 5",
        alone=False,  # asks for the thread itself: it looks at who called it
        absent="a builtin, until a trace sets it in the module",
    ),
    Patch("trl.kernels.chunked_*._*_kernel", _FUSED_HEAD, _TRL, absent="without Triton it is not there"),
    Patch("trl.kernels.chunked_divergence._project", "asks for the device's type", _TRL),
    Patch("trl.kernels.chunked_*._use_triton", _FUSED_HEAD, _TRL),
    Patch("trl.kernels.chunked_*._addmm_fp32", _FUSED_HEAD, _TRL),
    Patch(
        "trl.kernels.chunked_*.range",
        "a loop over sizes that are symbols",
        _TRL,
        absent="a builtin, until a trace sets it in the module",
    ),
    Patch("trl.kernels.chunked_*.triton", _FUSED_HEAD, _TRL, absent="without Triton it is not there"),
    Patch("trl.trainer.utils._use_triton", _FUSED_HEAD, _TRL),
    Patch("trl.trainer.utils.is_triton_available", _FUSED_HEAD, _TRL),
    Patch("trl.trainer.utils._supports_trl_loss_kernel", "asks for the device's type", _TRL),
    Patch("trl.trainer.utils._fused_logprob_entropy", _FUSED_HEAD, _TRL, absent="without Triton it is not there"),
    Patch("trl.trainer.base_trainer._BaseTrainer._send_telemetry", "nobody trains here", _TRL),
    Patch("trl.*.get_peft_model", _MADE_HERE, _TRL),
    Patch("trl.*.create_model_from_path", _MADE_HERE, _TRL),
    Patch("trl.*.create_reference_model", _MADE_HERE, _TRL),
    Patch("trl.*.empty_cache", _CACHE, _TRL),
    Patch("trl.*.disable_gradient_checkpointing", "tells where a pass of the reference begins and ends", _TRL),
    Patch("trl.*.hash_module", "reads weights, to name a file of probabilities", _TRL),
    Patch("transformers.training_args.TrainingArguments._setup_devices", _ONE_CARD, _TRANSFORMERS),
    Patch("transformers.training_args.is_torch_bf16_gpu_available", _ONE_CARD, _TRANSFORMERS),
    Patch("transformers.trainer.clear_device_cache", _CACHE, _TRANSFORMERS),
    Patch(
        "transformers.generation.utils.GenerationMixin.generate",
        "of a completion within a step the first few tokens and the last few are run",
        _TRANSFORMERS,
    ),
    Patch("accelerate.accelerator.is_bf16_available", _ONE_CARD, _ACCELERATE),
    Patch("accelerate.accelerator.get_grad_scaler", "a scaler for CUDA switches itself off without it", _ACCELERATE),
    Patch("accelerate.utils.*.clear_device_cache", _CACHE, _ACCELERATE),
    Patch("accelerate.state.PartialState._shared_state", _OWN_STATE, _ACCELERATE),
    Patch("accelerate.state.AcceleratorState._shared_state", _OWN_STATE, _ACCELERATE),
    Patch("accelerate.state.GradientState._shared_state", _OWN_STATE, _ACCELERATE),
    Patch("torch.autograd._engine_run_backward", _SCRIPT, _TORCH),
    Patch("torch.clear_autocast_cache", _SCRIPT, _TORCH),
    Patch(
        "torch.utils.checkpoint._allowed_determinism_checks_to_fns",
        _SCRIPT,
        _TORCH,
        alone=False,  # the process runs nothing but the script
    ),
    Patch("torch.Generator", _SCRIPT, _TORCH),
    Patch("torch.distributed.init_process_group", _SCRIPT, _TORCH),
    Patch("torch.utils.data.dataloader.DataLoader.__init__", _SCRIPT, _TORCH),
    Patch("torch.__future__.get_swap_module_params_on_conversion", _SCRIPT, _TORCH),
    Patch("torch.cuda.*", _SCRIPT, _TORCH),
    Patch("torch.accelerator.*", _SCRIPT, _TORCH),
    Patch("transformers.modeling_utils._get_resolved_checkpoint_files", _NO_CHECKPOINT, _TRANSFORMERS),
    Patch("transformers.modeling_utils.PreTrainedModel._from_config", _NO_CHECKPOINT, _TRANSFORMERS),
    Patch("transformers.modeling_utils.PreTrainedModel._load_pretrained_model", _NO_CHECKPOINT, _TRANSFORMERS),
    Patch("transformers.modeling_utils.PreTrainedModel._initialize_missing_keys", _NO_CHECKPOINT, _TRANSFORMERS),
    *(
        Patch(
            f"transformers.quantizers.quantizer_bnb_{bits}bit.Bnb{bits}BitHfQuantizer.{name}",
            _NO_CHECKPOINT,
            _TRANSFORMERS,
        )
        for bits in (4, 8)
        for name in ("_process_model_before_weight_loading", "validate_environment")
    ),
    Patch("torch.Tensor.cuda", "LOMO takes a tensor to the card", _TORCH),
    Patch("torch.inference_mode", "in it composite operators reach a dispatch mode whole", _TORCH),
    Patch("torch.accelerator.current_accelerator", _OFFLOADING, _TORCH),
    Patch("torch.get_device_module", _OFFLOADING, _TORCH),
    Patch("torch.storage.UntypedStorage.data_ptr", _OFFLOADING, _TORCH),
    Patch("accelerate.state.PartialState.set_device", _RANKS, _ACCELERATE),
    Patch("deepspeed.accelerator.real_accelerator.ds_accelerator", _RANKS, _DEEPSPEED, absent=_ASKED_FOR),
    Patch("deepspeed.runtime.zero.*.assert_ints_same_as_other_ranks", _RANKS, _DEEPSPEED, absent=_ASKED_FOR),
    Patch(
        "deepspeed.runtime.engine.DeepSpeedEngine.step",
        "tells where the optimizer's phase begins",
        _DEEPSPEED,
        absent=_ASKED_FOR,
    ),
    Patch("deepspeed.ops.adam.*_adam.*Builder", _COMPILED, _DEEPSPEED, absent=_ASKED_FOR),
    Patch("torch.Tensor.record_stream", "takes a stream of CUDA; here every stream has done its work", _TORCH),
    Patch("transformers.integrations.accelerate.accelerate_max_memory", _ONE_CARD, _TRANSFORMERS),
    Patch("torch.utils.checkpoint._CheckpointFrame.check_recomputed_tensors_match", _HOOKS, _TORCH),
    Patch("torch._C._group_tensors_by_device_and_dtype", "the meta device is one; here it stands for cards", _TORCH),
    Patch("torch.cuda.device_count", _ONE_CARD, _TORCH),
    Patch("torch.cuda.get_device_capability", _ONE_CARD, _TORCH),
    Patch("torch.meta", _RANKS, _TORCH, absent="the meta device has no module of its own: that is why it is set"),
    Patch(
        "torch.distributed.tensor._sharding_prop.ShardingPropagator._propagate_tensor_meta_non_cached",
        "a DTensor's shape is found with fake tensors, which take nothing of a card",
        _TORCH,
    ),
    Patch("torch.distributed.fsdp.fully_shard", _RANKS, _TORCH),
    Patch("torch.distributed.fsdp._fully_shard._fsdp_init._move_states_to_device", _RANKS, _TORCH),
    Patch("torch.distributed.fsdp._fully_shard._fully_shard._init_default_mesh", _RANKS, _TORCH),
    Patch("torch.distributed.fsdp._fully_shard._fully_shard._get_device_from_mesh", _RANKS, _TORCH),
    Patch(
        "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup._validate_no_meta_params", _RANKS, _TORCH
    ),
    Patch("torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam.alloc_all_gather_outputs", _RANKS, _TORCH),
    Patch("torch.distributed.Reducer", "DDP's reducer is C++ that reads where gradients lie", _TORCH),
    Patch("sys.excepthook", "PyTorch's process group sets one that names the rank", _TORCH),
    Patch("torch.distributed.Logger", "it logs what the reducer does", _TORCH),
    Patch("torch.nn.parallel.distributed._verify_param_shape_across_processes", _RANKS, _TORCH),
    Patch("torch.Tensor.data_ptr", "accelerate tells parameters apart by where they lie", _TORCH),
    Patch("accelerate.accelerator.fsdp2_prepare_model", _RANKS, _ACCELERATE),
    Patch("accelerate.state.PartialState._prepare_backend", _RANKS, _ACCELERATE),
    Patch("accelerate.state.PartialState.set_device", _RANKS, _ACCELERATE),
    Patch("torch.storage.UntypedStorage.resize_", "FSDP and DeepSpeed free a weight by it", _TORCH),
)
"""Every foreign name that is replaced. Beside them a trace registers kernels with PyTorch's dispatcher, and takes them
back: :data:`AUTOGRAD_META`, and the shape functions of :mod:`vramplan.dryrun.meta_kernels`."""

AUTOGRAD_META: dict[str, Callable] = {}
"""Composite operators that do on CUDA what they do not do on the meta device, by name: the kernel of ours that a trace
registers under the key AutogradMeta."""

_lock = RLock()
_tracing: int | None = None
"""The thread that holds the sandbox."""
_applied: list[Change] = []
"""What is changed now, in order."""
_kept: list[Change] = []
"""What is changed for the life of this process: :func:`hold`."""
_dropped: list[BaseException] = []
"""Errors that Python dropped while a trace ran."""
_MISSING = object()
_TRIES = 3
"""Times that a change is undone again after an interruption."""


class Change(Protocol):
    """A change of others' state. ``undo`` may be called again after it was interrupted."""

    def apply(self) -> None:
        """Make the change."""

    def undo(self) -> None:
        """Take the change back."""


class _Replacement:
    """The change of one attribute of a foreign module or class."""

    def __init__(self, holder: Any, name: str, value: Any):
        self.holder, self.name, self.value = holder, name, value
        self.before = vars(holder).get(name, _MISSING)

    def apply(self) -> None:
        setattr(self.holder, self.name, self.value)

    def undo(self) -> None:
        if self.before is not _MISSING:
            setattr(self.holder, self.name, self.before)
        elif self.name in vars(self.holder):
            delattr(self.holder, self.name)


class _ProcessState:
    """The change of environment variables. Undone are also those that libraries write meanwhile, and the seeds that
    they set, of the random numbers of Python, numpy and torch."""

    before: tuple | None = None

    def __init__(self, variables: dict[str, str]):
        self.variables = variables

    def apply(self) -> None:
        self.before = dict(os.environ), random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        os.environ.update(self.variables)

    def undo(self) -> None:
        if self.before is None:
            return
        environment, ours, numbers, tensors = self.before
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        random.setstate(ours)
        numpy.random.set_state(numbers)
        torch.set_rng_state(tensors)


class _ModuleNames:
    """The change that a library makes to names of these modules: undone, they are what they were."""

    def __init__(self, modules: Iterable[ModuleType]):
        self.before = [(module, dict(vars(module))) for module in modules]

    def apply(self) -> None:
        """The library does it."""

    def undo(self) -> None:
        for module, names in self.before:
            for name in vars(module).keys() - names.keys():
                delattr(module, name)
            for name, value in names.items():
                if vars(module).get(name, _MISSING) is not value:
                    setattr(module, name, value)


class _AutogradMetaKernels:
    """The change of PyTorch's dispatcher that puts :data:`AUTOGRAD_META` in place."""

    library: torch.library.Library | None = None

    def apply(self) -> None:
        self.library = torch.library.Library("aten", "IMPL", "AutogradMeta")
        for name, kernel in AUTOGRAD_META.items():
            self.library.impl(name, _in_this_thread(_overload(name), kernel))
            _overload(name)._dispatch_cache.clear()

    def undo(self) -> None:
        if self.library is not None:
            self.library._destroy()
        for name in AUTOGRAD_META:
            _overload(name)._dispatch_cache.clear()


class _Silence:
    """The change of a library's own log handlers, or of the one that serves who has none, that drops what the library
    writes below the level error in the tracing thread."""

    def __init__(self, library: str):
        self.library = library
        own = logging.getLogger(library).handlers
        self.handlers = [*own, *([logging.lastResort] if logging.lastResort and not own else [])]

    def apply(self) -> None:
        for handler in self.handlers:
            handler.addFilter(self.keeps)

    def undo(self) -> None:
        for handler in self.handlers:
            handler.removeFilter(self.keeps)

    def keeps(self, record: logging.LogRecord) -> bool:
        theirs = record.name.partition(".")[0] == self.library
        return not theirs or record.levelno >= logging.ERROR or record.thread != _tracing


def _overload(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _in_this_thread(overload: torch._ops.OpOverload, kernel: Callable) -> Callable:
    """``kernel`` for the tracing thread; for every other the composition that PyTorch has."""

    def run_composite(*args, **kwargs):
        if get_ident() == _tracing:
            return kernel(*args, **kwargs)
        return overload._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)

    return run_composite


class _PerThread:
    """A value for the tracing thread, and the one that was there for every other."""

    def __init__(self, value: Any, before: Any):
        self._value, self._before = value, before
        if callable(before):
            functools.update_wrapper(self, before, updated=())

    def _own(self) -> Any:
        return self._value if get_ident() == _tracing else self._before

    def __call__(self, *args, **kwargs):
        return (self._value if get_ident() == _tracing else self._before)(*args, **kwargs)

    def __get__(self, instance, owner=None):
        return self if instance is None else MethodType(self, instance)

    def __getattr__(self, name: str):
        return getattr(self._own(), name)

    def __getitem__(self, key):
        return self._own()[key]

    def __bool__(self) -> bool:
        return bool(self._own())

    def __instancecheck__(self, instance) -> bool:
        return isinstance(instance, self._before)

    def __mro_entries__(self, bases) -> tuple:
        return (self._before,)


class _PerThreadAttribute:
    """A value, or a property, of a class for the tracing thread, and what was there for every other."""

    def __init__(self, value: Any, before: Any):
        self._value, self._before = value, before

    def __get__(self, instance, owner=None):
        own = self._value if get_ident() == _tracing else self._before
        return own.__get__(instance, owner) if hasattr(own, "__get__") else own


def is_tracing() -> bool:
    """Whether this thread holds the sandbox."""
    return get_ident() == _tracing


def patch_of(holder: Any, name: str) -> Patch:
    """The row of :data:`PATCHES` for an attribute of a module or a class. Raises :class:`OurFault` for any other."""
    owner = holder.__name__ if isinstance(holder, ModuleType) else f"{holder.__module__}.{holder.__qualname__}"
    for patch in PATCHES:
        if fnmatchcase(f"{owner}.{name}", patch.target):
            return patch
    raise OurFault(f"{owner}.{name} is replaced, and vramplan.dryrun.sandbox does not list it")


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """``value`` for an attribute of a foreign module or class, until the block ends. Raises :class:`OurFault` for a
    name that is not listed, and outside of the sandbox."""
    patch = patch_of(holder, name)
    if not is_tracing():
        raise OurFault(f"{patch.target} is replaced outside of the sandbox")
    if patch.alone and isinstance(holder, type) and not callable(value):
        value = _PerThreadAttribute(value, vars(holder)[name])
    elif patch.alone:
        value = _PerThread(value, getattr(holder, name, getattr(builtins, name, None)))
    with changed(_Replacement(holder, name, value)):
        yield


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables; those and the seeds that libraries set meanwhile are taken back."""
    with changed(_ProcessState(variables)):
        yield


@contextmanager
def silenced(*libraries: str) -> Iterator[None]:
    """What these libraries log below the level error is dropped, in the tracing thread."""
    with ExitStack() as undo:
        for library in libraries:
            undo.enter_context(changed(_Silence(library)))
        yield


@contextmanager
def names_restored(modules: Iterable[ModuleType]) -> Iterator[None]:
    """While the context lasts, a library that a job asks for may set names of these modules. All threads see them."""
    with changed(_ModuleNames(modules)):
        yield


@contextmanager
def changed(change: Change) -> Iterator[None]:
    """A change of others' state that is not one attribute, until the block ends."""
    _applied.append(change)  # first: an interruption may come between any two steps
    try:
        change.apply()
        yield
    finally:
        if change in _applied:
            change.undo()
            _applied.remove(change)


def _undo_all() -> None:
    """Undo what a block that was interrupted has left. An interruption in here waits until all is undone."""
    interruption: BaseException | None = None
    tries = 0
    while _applied:
        try:
            _applied[-1].undo()
            tries = _TRIES
        except BaseException as error:
            interruption, tries = error, tries + 1
        if tries >= _TRIES:
            _applied.pop()
            tries = 0
    if interruption is not None:
        raise interruption


@contextmanager
def locked() -> Iterator[None]:
    """The lock alone: :func:`replaced` works, and nothing is replaced yet. For a probe, which runs a real step."""
    global _tracing
    with _lock:
        if is_tracing():
            yield
            return
        try:
            _undo_all()
            _tracing = get_ident()
            yield
        finally:
            try:
                _undo_all()
            finally:
                _tracing = None


@contextmanager
def active() -> Iterator[None]:
    """The sandbox: others' code behaves as on a card, in this thread, until the block ends, however it ends.

    One trace runs at a time in a process; a thread may enter again. An error that Python dropped meanwhile is raised.
    """
    with locked():
        if any(isinstance(change, _Replacement) and change.holder is sys for change in _applied):
            yield
            return
        _dropped.clear()
        with ExitStack() as undo:
            for context in _for_every_trace():
                undo.enter_context(context)
            yield
        if _dropped:
            raise _dropped.pop()


def _for_every_trace() -> Iterator[Any]:
    """What is changed for every trace, as contexts."""
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    yield replaced(sys, "unraisablehook", functools.partial(_note_dropped, sys.unraisablehook))
    yield replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield changed(_Silence("transformers"))
    yield changed(_Silence("bitsandbytes"))  # it warns of each product of LLM.int8
    yield replaced(GlobalOptimManager, "get_instance", new_optimizer_manager)
    if not _kept:
        for change in _registrations():
            yield changed(change)


def _registrations() -> list[Change]:
    """The changes of PyTorch's dispatcher. They take some ten milliseconds to apply and to undo."""
    from .meta_kernels import NativeShapeFunctions

    return [_AutogradMetaKernels(), NativeShapeFunctions()]


def new_optimizer_manager() -> Any:
    """What ``GlobalOptimManager.get_instance()`` returns in a new process."""
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.__new__(GlobalOptimManager)
    manager.initialize()
    return manager


def _note_dropped(before: Callable, unraisable) -> None:
    """Remember an error that was raised where Python cannot raise it: in a callback of ours, or to end the thread."""
    callback = getattr(unraisable.object, "__module__", None) or ""
    if callback.startswith(__package__) or not isinstance(unraisable.exc_value, Exception):
        _dropped.append(unraisable.exc_value or unraisable.exc_type())
    else:
        before(unraisable)


@contextmanager
def importing_bitsandbytes() -> Iterator[None]:
    """While bitsandbytes is imported: its functions for the CPU are compiled when they are first called, not now, and
    nothing is downloaded or warned of."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    with (
        locked(),
        compiling_later(),
        replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        try:
            logger.setLevel(logging.ERROR)  # it warns of missing kernels for the CPU
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def compiling_later() -> Iterator[None]:
    """While a library is imported, what it compiles is compiled when it is first called."""
    with replaced(torch, "compile", functools.partial(_compile_later, torch.compile)):
        yield


def _compile_later(compile: Callable, function: Callable, **options: Any) -> Callable:
    """What ``torch.compile(function)`` returns, made at the first call."""
    compiled = functools.cache(lambda: compile(function, **options))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


def hold() -> None:
    """Keep the dispatcher's registrations, and return freed memory, for the life of this process, which does nothing
    but plan."""
    with _lock:
        if not _kept and not is_tracing():
            return_freed_memory()
            _kept.extend(_registrations())
            for change in _kept:
                change.apply()


def return_freed_memory() -> None:
    """Have large blocks come from the kernel and go back there, for the life of this process, which is ours alone.

    Left alone, glibc keeps them from the first on that is freed (mallopt(3), M_MMAP_THRESHOLD): buffers that are
    computed while a model is made left 0.6 to 1.1 GiB.
    """
    with suppress(AttributeError, OSError, TypeError):  # another system's C library
        ctypes.CDLL(None).mallopt(-3, 1 << 20)
