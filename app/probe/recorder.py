"""What the dry run tells its tracker, told to a card: where phases begin, which module runs, what the counters say."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass

import torch

from ..dryrun.sandbox import locked, replaced
from ..dryrun.tracker import canonical_fqn
from ..job import Job

HISTORY_STEPS = 2
"""Steps whose allocations are kept, one by one: the first, and a steady one. Later steps are measured only."""


IGNORED = -100
"""The label of a token that no loss is taken of, as collators give it to the tokens of an image (``cross_entropy``)."""


@dataclass(frozen=True)
class Figures:
    """One phase of one step as the card's counters have it. Bytes; ``process`` is NVML's, None where it tells none."""

    step: int
    name: str
    allocated_start: int
    allocated_end: int
    peak_allocated: int
    reserved: int
    peak_reserved: int
    process: int | None


class _Autocast:
    def __init__(self, device: str, dtype: torch.dtype):
        self.on = lambda: torch.autocast(device, dtype)


class Recorder:
    """The :class:`~vramplan.dryrun.observer.StepObserver` of a real run; it keeps the card's figures of each phase.

    ``marks`` are (events so far, phase, step), ``places`` (allocations so far, module path): together with the
    allocator's own history they are the trace log of the run.
    """

    def __init__(self, meter, job: Job, tell):
        self.meter = meter
        self.device = meter.device
        self.tell = tell
        self.autocast = None
        if job.mixed_precision != "no":
            dtype = torch.bfloat16 if job.mixed_precision == "bf16" else torch.float16
            self.autocast = _Autocast(self.device, dtype)
        self.padded = job.attention_mask == "padded"
        self.in_backward = False
        self.images = self.values = None
        self.length = self.shifted = self.labelled = 0
        self.forwards_left: int | None = None
        self.phases: list[Figures] = []
        self.marks: list[tuple[int, str, int]] = []
        self.places: list[tuple[int, str]] = []
        self.events = None
        self.optimizer_state: dict[int, int] = {}
        self._open: tuple[int, str, int] | None = None
        self._vocabulary = 30000

    # --- phases and places ------------------------------------------------------------------------------------

    def mark(self, phase: str, step: int, kind: str = "") -> None:
        """A phase ends, another begins."""
        self.close()
        if step > HISTORY_STEPS:
            self.stop_recording()
        taken, given = self.meter.counts()
        self.marks.append((taken + given, phase, step))
        self._open = (step, phase, self.meter.read()[0])
        self.meter.reset_peaks()
        self.tell(phase, step)

    @property
    def phase(self) -> str:
        """The phase that is open."""
        return self._open[1] if self._open is not None else ""

    @contextlib.contextmanager
    def during(self, phase: str, kind: str = "activations"):
        """A phase within another one, which goes on afterwards."""
        step, before, _ = self._open or (0, "load", 0)
        self.mark(phase, step)
        try:
            yield
        finally:
            self.mark(before, step)

    def register_model(self, model: torch.nn.Module, prefix: str) -> None:
        """Move one more model to the card. The plan knows whose allocations they are."""
        model.to(self.device)

    def close(self) -> None:
        """Write down the phase that is open."""
        if self._open is None:
            return
        step, name, start = self._open
        self._open = None
        allocated, peak, reserved, peak_reserved = self.meter.read()
        self.phases.append(
            Figures(step, name, start, allocated, peak, reserved, peak_reserved, self.meter.process_bytes())
        )

    def stop_recording(self) -> None:
        """Take the allocator's history, once."""
        if self.events is None:
            taken, given = self.meter.counts()
            self.marks.append((taken + given, "after", HISTORY_STEPS + 1))
            self.events = self.meter.history()

    def empty_cache(self) -> None:
        """Give back what the allocator holds unused, and mark it in the log."""
        taken, given = self.meter.counts()
        self.marks.append((taken + given, "empty_cache", 0))
        self.meter.empty_cache()

    @contextlib.contextmanager
    def watching(self, model: torch.nn.Module):
        """Know which module of ``model`` runs, by the number of allocations made when it begins and ends."""
        paths = {id(module): canonical_fqn(name) for name, module in model.named_modules()}
        original = torch.nn.Module.__call__
        stack, counts, places = [""], self.meter.counts, self.places

        def call(module, *args, **kwargs):
            path = paths.get(id(module))
            if path is None or self.events is not None:
                return original(module, *args, **kwargs)
            places.append((counts()[0], path))
            stack.append(path)
            try:
                return original(module, *args, **kwargs)
            finally:
                stack.pop()
                places.append((counts()[0], stack[-1]))

        with locked(), replaced(torch.nn.Module, "__call__", call):
            yield self

    # --- what a dry run would enter ---------------------------------------------------------------------------

    def knows(self, model: torch.nn.Module) -> None:
        """Token ids are drawn from the model's vocabulary."""
        text = model.config.get_text_config()
        self._vocabulary = min(getattr(text, "vocab_size", None) or 1000, 30000)

    def register_batch(self, batch: dict[str, torch.Tensor], stated: dict[str, torch.Tensor]) -> None:
        """Fill a batch in place: random ids and pixels, labels that the model knows, the job's mask; where there are
        images, all that is ``stated``, and labels of the text alone."""
        for name, tensor in batch.items():
            if tensor.is_floating_point():
                tensor.normal_()
            elif self.images is not None and name in stated:
                tensor.copy_(stated[name])
            elif self.images is not None and name == "labels":
                ids = stated["input_ids"]
                tensor.copy_(ids.masked_fill(ids == self.images.token, IGNORED))
            elif name == "attention_mask":
                tensor.fill_(1)
                if self.padded:
                    tensor[:, tensor.shape[1] // 2 :] = 0
            elif tensor.dim() == 1:
                tensor.zero_()  # classes
            elif name == "labels" and batch.get("input_ids") is not None and tensor.shape == batch["input_ids"].shape:
                tensor.copy_(batch["input_ids"])
            else:
                tensor.random_(min(5, self._vocabulary - 1), self._vocabulary)

    def reclassify(self, tensor: torch.Tensor, kind: str, fqn: str | None = None) -> None:
        """What an allocation is for, the plan knows; the optimiser's state is summed, step by step."""
        if kind == "optimizer_state":
            step = self.marks[-1][2]
            self.optimizer_state[step] = self.optimizer_state.get(step, 0) + tensor.untyped_storage().nbytes()

    def inherit_owner(self, tensor: torch.Tensor, owned: torch.Tensor) -> None:
        """Whom a gradient belongs to, the plan knows."""

    def as_dict(self) -> list[dict]:
        """The figures of the phases, in order."""
        return [asdict(phase) for phase in self.phases]
