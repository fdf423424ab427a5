"""The recorder of a script: which tensors lie on the card, where steps begin, what the script reads of a value.

On the meta device lie both what is on the dry card and the weights that a script has on the host, which nobody needs.
What operators make of tensors of the host stays on the host.
"""

from __future__ import annotations

import linecache
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from ..dryrun.cuda import host_reads
from ..dryrun.cuda.card_facts import Card
from ..dryrun.host_copies import ANSWERS, answer_to, is_kept_on_host
from ..dryrun.known_values import KnownValues
from ..dryrun.places import tensors_in
from ..dryrun.steps.phases import label_grads_and_state
from ..dryrun.tracker import MemoryTracker, canonical_fqn
from ..memory.allocator.caching import round_size

aten = torch.ops.aten
ROUTING = "balanced"


class EnoughSteps(BaseException):
    """All steps that were asked for have run. A script's ``except Exception`` lets it through."""


class Line(NamedTuple):
    """A line of a program: its ``file`` and ``number``."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"

    @property
    def text(self) -> str:
        """The line itself, without indentation."""
        return linecache.getline(self.file, self.number).strip()


class ScriptTracker(MemoryTracker):
    """A tracker of the program at the path ``script``, which trains ``steps`` steps.

    ``lines`` has the script's line for each allocation, ``reads`` the value that was stated for each line that read
    one. ``finished`` counts the steps of optimisers.
    """

    def __init__(self, card: Card, script: str, steps: int):
        super().__init__(card)
        self.script, self.steps = script, steps
        self.values = KnownValues(ROUTING)
        self.lines: list[Line] = []
        self.reads: dict[Line, Any] = {}
        self.finished = 0
        self.models: list[weakref.ref[torch.nn.Module]] = []
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._on_host = 0
        self._hosted: dict[int, weakref.ref] = {}
        self.mark("load", 0, "inputs")

    # --- the card and the host ------------------------------------------------------------------------------

    def is_on_card(self, tensor: torch.Tensor) -> bool:
        """Whether a meta tensor lies on the dry card."""
        return tensor.untyped_storage()._cdata not in self._hosted

    def _keep_on_host(self, out: Any) -> Any:
        for tensor in tensors_in((out,)):
            if tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                number = storage._cdata
                self._hosted[number] = weakref.ref(storage, lambda _, number=number: self._hosted.pop(number, None))
        return out

    @contextmanager
    def making_on_host(self) -> Iterator[None]:
        """While the context lasts, tensors that are made on the meta device are the host's."""
        self._on_host += 1
        try:
            yield
        finally:
            self._on_host -= 1

    def place(self, tensor: torch.Tensor, kind: str = "weights", fqn: str | None = None) -> None:
        """Take a tensor of the host to the card: it lies there from now on."""
        self._hosted.pop(tensor.untyped_storage()._cdata, None)
        self.register_existing(tensor, self.current_fqn if fqn is None else fqn, kind)

    @property
    def allocated(self) -> int:
        """Bytes allocated now, as ``torch.cuda.memory_allocated()`` counts them."""
        return self._peaks()[0]

    @property
    def most_allocated(self) -> int:
        """The most bytes that were allocated at once."""
        return self._peaks()[1]

    def _peaks(self) -> tuple[int, int]:
        now = most = 0
        sizes = [round_size(int(entry.size)) for entry in self.trace_log.allocations]
        for event in self.trace_log.events:
            now += sizes[event] if event >= 0 else -sizes[~event]
            most = max(most, now)
        return now, most

    def _append(self, size: int, fqn: str, kind: str, op: str) -> int:
        """An allocation, with the line of the script that asks for it."""
        self.lines.append(self.line())
        return super()._append(size, fqn, kind, op)

    def line(self) -> Line:
        """The line of the script that runs; where none of its own runs, the nearest one outside of torch."""
        frame = sys._getframe(1)
        nearest = None
        while frame is not None:
            file = frame.f_code.co_filename
            if file == self.script:
                return Line(file, frame.f_lineno)
            if nearest is None and "/torch/" not in file and not file.startswith(_OURS):
                nearest = Line(file, frame.f_lineno)
            frame = frame.f_back
        return nearest or Line(self.script, 0)

    # --- steps ----------------------------------------------------------------------------------------------

    def called(self, module: torch.nn.Module, call, *args, **kwargs):
        """Call a module: what runs in it is attributed to it; of a model that is called for training, a step begins."""
        fqn = self._names.get(module)
        if not self._stack:
            if fqn is None and next(module.parameters(), None) is not None:
                fqn = self._adopt(module)
            if fqn is not None and not self.in_backward:
                self._begin()
        if fqn is None:
            return call(module, *args, **kwargs)
        self._stack.append(fqn)
        try:
            return call(module, *args, **kwargs)
        finally:
            self._stack.pop()

    def _adopt(self, model: torch.nn.Module) -> str:
        """Know a model that is called the first time: the first one's modules have its names, another's a prefix."""
        prefix = f"{type(model).__name__}." if any(self.models) else ""
        self.models.append(weakref.ref(model))
        adapted = hasattr(model, "peft_config")
        for name, module in model.named_modules():
            fqn = prefix + canonical_fqn(name)
            self._names.setdefault(module, fqn)
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.reclassify(parameter, "adapters" if adapted and parameter.requires_grad else "weights", fqn)
            for buffer in module._buffers.values():
                if buffer is not None:
                    self.reclassify(buffer, "buffers", fqn)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.heads |= {prefix} if head is None else {prefix, self._names.get(head, "")}
        return self._names[model]

    def _begin(self) -> None:
        """A model is called. For training, a step's forward pass begins; without gradients it is an evaluation."""
        if torch.is_grad_enabled():
            if self.phase != "forward":
                self._end_step()
                if self.finished >= self.steps:
                    raise EnoughSteps
                self.mark("forward", self.finished + 1, "activations")
        elif self.phase in ("load", "optimizer", "end"):
            self._end_step()
            if self.finished >= self.steps:
                raise EnoughSteps
            self.mark("eval", self.finished, "activations")

    def _end_step(self) -> None:
        if self.phase == "optimizer":
            self.finished = self.step
            self.mark("end", self.step, "temporaries")

    def backward(self, run):
        """Run a backward pass."""
        if self.in_backward:
            return run()
        self.mark("backward", self.step, "activation_gradients")
        self.in_backward = True
        try:
            return run()
        finally:
            self.in_backward = False

    def before_optimizer(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """An optimiser begins its step."""
        self._label(optimizer)
        if self.phase != "optimizer":
            self.mark("optimizer", self.step, "optimizer_temporaries")

    def after_optimizer(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """An optimiser has made its step."""
        self._label(optimizer)

    def _label(self, optimizer: torch.optim.Optimizer) -> None:
        with torch._C.DisableTorchFunction():
            label_grads_and_state(self, _parameters(optimizer), optimizer)

    def finish(self) -> None:
        """The script has ended."""
        self._end_step()
        self.close()

    # --- the dispatcher -------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            tensors = [leaf for leaf in tensors_in((*args, *(kwargs or {}).values())) if leaf.device.type == "meta"]
            on_host = not any(map(self.is_on_card, tensors)) if tensors else self._on_host
            if on_host and (tensors or _makes_meta(kwargs)):
                return self._without_values(func, args, kwargs or {})
            if func is aten.copy_.default and is_kept_on_host(args):
                return args[0]
            return super().__torch_dispatch__(func, types, args, kwargs)

    def _without_values(self, func, args, kwargs):
        """What an operator makes of tensors of the host that have no values: as little as they."""
        if func is aten._local_scalar_dense.default:
            return self._stated(args[0])
        if func is aten.equal.default:
            return self._note(True)
        if func is aten.copy_.default and args[0].device.type == "cpu":
            return args[0]
        if func is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            kwargs = {**kwargs, "device": "meta"}
        if any(leaf.device.type == "cpu" and leaf.dim() for leaf in tensors_in((*args, *kwargs.values()))):
            if func._schema.is_mutable and args[0].device.type == "cpu":
                return args[0]
            args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return self._keep_on_host(func(*args, **kwargs))

    def _run(self, func, args, kwargs):
        if func is aten._to_copy.default and args[0].device.type == "meta" and str(kwargs.get("device")) == "cpu":
            self._note(1)
            return torch.ones((), dtype=kwargs.get("dtype") or args[0].dtype).expand(args[0].shape)
        if func is aten.equal.default:
            return self._note(True)
        return super()._run(func, args, kwargs)

    def _value(self, tensor: torch.Tensor):
        host_reads.check()
        frame = sys._getframe(2)
        while frame is not None:
            rule = host_reads.rule_for(frame)
            if rule is not None and rule.answer not in ("generated", "beams", "length"):
                return self._answer(rule.answer, frame, tensor)
            if rule is not None and rule.answer == "generated":
                return frame.f_locals["length"] >= _longest(frame)
            if frame.f_code.co_filename == self.script:
                break
            frame = frame.f_back
        return self._stated(tensor)

    def _stated(self, tensor: torch.Tensor):
        """The value that is stated of a tensor that has none."""
        return self._note(answer_to(_asked_by() if tensor.dtype == torch.bool else "", tensor))

    def _note(self, value):
        self.reads.setdefault(self.line(), value)
        return value


_OURS = __file__.rpartition("/script/")[0] + "/"


def _asked_by() -> str:
    """The qualified name of the nearest function of :data:`ANSWERS` that runs; empty: none does."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_qualname not in ANSWERS:
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_qualname


def _longest(frame: FrameType | None) -> int:
    """How many tokens the generation that runs may have, its prompt included."""
    while frame is not None and "generation_config" not in frame.f_locals:
        frame = frame.f_back
    return 0 if frame is None else frame.f_locals["generation_config"].max_length


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _makes_meta(kwargs: dict | None) -> bool:
    return kwargs is not None and str(kwargs.get("device")) == "meta"
