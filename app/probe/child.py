"""The process that measures: it runs one job on one card, under a cap, and ends.

``python -m vramplan.probe.child`` says ``{"ready": true}`` when its imports are done, reads one request as a line of
JSON, tells each phase as it begins, and leaves a :class:`~vramplan.probe.recording.Recording` at the request's ``out``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings

import torch

from ..dryrun import sandbox
from ..dryrun.build.loading import load
from ..dryrun.build.model import bare
from ..dryrun.images import images_of
from ..dryrun.steps import loop_of
from ..job import Job, read_job
from .extrapolate import with_layers
from .history import log_of
from .recorder import Recorder
from .recording import FAILED, OK, OUT_OF_MEMORY, Recording
from .weights import CardWeights

STEPS = 3
"""Steps that are run: the first, a steady one, and one more in which nothing may grow."""


class CudaMeter:
    """The card's counters and the allocator's history, of this process alone. Bytes."""

    device = "cuda"

    def __init__(self, cap: int | None = None):
        import pynvml

        torch.cuda.init()
        self.properties = torch.cuda.get_device_properties(0)
        if cap is not None:
            torch.cuda.set_per_process_memory_fraction(min(cap / self.properties.total_memory, 1.0), 0)
        pynvml.nvmlInit()
        self._nvml = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{self.properties.uuid}")
        self._before = pynvml.nvmlDeviceGetMemoryInfo(self._handle).used
        self._taken = self._given = 0
        self._snapshot: dict = {}

    def warm_up(self) -> None:
        """A small product, forth and back: the context, its kernels and library handles are there afterwards."""
        a = torch.ones(16, 16, device=self.device, dtype=torch.bfloat16, requires_grad=True)
        (a @ a).sum().backward()
        del a
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        self.reset_peaks()

    def record(self) -> None:
        """Begin the history; counts begin here."""
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python")
        self._taken, self._given = self._totals()

    def _totals(self) -> tuple[int, int]:
        stats = torch._C._cuda_memoryStats(0)["allocation"]["all"]
        return stats["allocated"], stats["freed"]

    def counts(self) -> tuple[int, int]:
        """Allocations and releases since the history began."""
        taken, given = self._totals()
        return taken - self._taken, given - self._given

    def read(self) -> tuple[int, int, int, int]:
        """Allocated, its peak, reserved, its peak; the card has done all that it was asked to."""
        torch.cuda.synchronize()
        return (
            torch.cuda.memory_allocated(),
            torch.cuda.max_memory_allocated(),
            torch.cuda.memory_reserved(),
            torch.cuda.max_memory_reserved(),
        )

    def reset_peaks(self) -> None:
        """Begin the peaks anew."""
        torch.cuda.reset_peak_memory_stats()

    def empty_cache(self) -> None:
        """Give back the blocks that the allocator holds unused."""
        torch.cuda.empty_cache()

    def process_bytes(self) -> int | None:
        """What nvidia-smi shows for this process; where the driver does not tell it, what the card has more in use."""
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return process.usedGpuMemory
        return None

    def device_bytes(self) -> int:
        """What all processes together hold on the card, the driver's own included."""
        free, total = torch.cuda.mem_get_info()
        return total - free

    def history(self) -> list[dict]:
        """The allocator's entries so far; recording ends."""
        self._snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(None)
        return self._snapshot["device_traces"][0]

    def save_snapshot(self, path: str) -> None:
        """As ``torch.cuda.memory._dump_snapshot`` writes it: pytorch.org/memory_viz opens it."""
        import pickle

        with open(path, "wb") as file:
            pickle.dump(self._snapshot, file)

    def facts(self) -> dict:
        """What of the card changes what PyTorch allocates, and who it is."""
        p = self.properties
        return {
            "name": p.name,
            "capability": [p.major, p.minor],
            "multiprocessors": p.multi_processor_count,
            "total_memory": p.total_memory,
            "driver": _text(self._nvml.nvmlSystemGetDriverVersion()),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else value


def measure(job: Job, task: str, meter, layers: int | None = None, steps: int = STEPS, tell=lambda *_: None):
    """Run ``job`` (resolved, with its config) on the meter's card and write down what happened.

    Out of memory is a finding, not an error; what else fails is told as ``failed``, with the stack's own words.
    """
    from ..planning.fingerprint import stack

    started = time.perf_counter()
    tell("start", 0)
    out = Recording(job.model_dump(mode="json"), layers, task, {}, {**stack(), "torch": torch.__version__})
    with sandbox.active():
        base, _ = bare(job.config, task, job.dtype, job.attention)
    if layers is not None:
        base = with_layers(base, layers)
    tell("warm-up", 0)
    meter.warm_up()
    warm = {"context_warm": meter.process_bytes(), "device_warm": meter.device_bytes()}
    recorder = Recorder(meter, job, tell)
    meter.record()
    try:
        _run(base, job, task, recorder, out, steps)
    except torch.OutOfMemoryError as error:
        out.outcome, out.reason = OUT_OF_MEMORY, _first_line(error).partition(" If reserved but")[0]
    except Exception as error:
        out.outcome, out.reason = FAILED, f"{type(error).__name__}: {_first_line(error)}"
    if out.outcome != OK and not recorder.phases and recorder._open is None:
        recorder.mark("load", 0)
    recorder.close()
    reserved = meter.read()[2]
    process = meter.process_bytes()
    recorder.stop_recording()
    out.phases = recorder.as_dict()
    out.trace_log = log_of(recorder.events, recorder.marks, recorder.places)
    out.card = {
        **meter.facts(),
        **warm,
        "context": None if process is None else process - reserved,
        "device_context": meter.device_bytes() - reserved,
    }
    out.seconds = round(time.perf_counter() - started, 2)
    return out


def _run(base, job: Job, task: str, recorder: Recorder, out: Recording, steps: int) -> None:
    recorder.knows(base)
    with sandbox.active():
        recorder.images, _ = images_of(base, job, task)
    model = load(base, job, task, recorder, CardWeights(recorder.device))
    del base
    gc.collect()
    recorder.empty_cache()
    out.placed = recorder.meter.read()[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    out.trainable_parameters = sum(p.numel() for p in trained)
    with recorder.watching(model):
        loop_of(job)(recorder, model, job, task, steps)
    out.optimizer_state = max(recorder.optimizer_state.values(), default=None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:400]


def main() -> None:
    """Read one request, measure it, and leave a recording."""
    sandbox.return_freed_memory()
    voice = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no part of what is told
    warnings.filterwarnings("ignore")

    def tell(phase: str, step: int) -> None:
        print(json.dumps({"phase": phase, "step": step}), file=voice)

    print(json.dumps({"ready": True}), file=voice)
    line = sys.stdin.readline()
    if not line:
        return
    request = json.loads(line)
    job = read_job(request["job"])
    torch.cuda.memory._set_allocator_settings(request["allocator"])
    tell("start", 0)
    meter = CudaMeter(request["cap"])
    out = measure(job, request["task"], meter, request["layers"], tell=tell)
    out.cap = request["cap"]
    if request.get("snapshot"):
        meter.save_snapshot(request["snapshot"])
    if request["calibrate"] and out.outcome == OK:
        from ..dryrun.cuda.card_facts import Card
        from .kernel_checks import measure_kernels

        facts = meter.facts()
        capability, multiprocessors = tuple(facts["capability"]), facts["multiprocessors"]
        out.card["kernels"] = measure_kernels(Card(capability, multiprocessors))
    out.save(request["out"])
    print(json.dumps({"done": True}), file=voice)


if __name__ == "__main__":
    main()
