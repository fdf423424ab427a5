"""The probe without a card: all is real but CUDA itself, whose counters and history are fed from planned books."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest
import torch
from rich.console import Console
from tiny import GRID, LLAMA
from transformers.models.llama import modeling_llama
from vramplan.catalog.gpus import find_gpu
from vramplan.dryrun.cuda.attention import attention_backend
from vramplan.dryrun.cuda.card_facts import Card
from vramplan.dryrun.steps import plain as step
from vramplan.errors import PlanError
from vramplan.job import read_job
from vramplan.memory.allocator.caching import CachingAllocator
from vramplan.memory.budget import HOPPER_CONTEXT
from vramplan.memory.events import EMPTY_CACHE, Allocation, Mark, TraceLog
from vramplan.memory.kernel_facts import KernelFacts
from vramplan.planning import calibration
from vramplan.probe import card
from vramplan.probe.card import CardState
from vramplan.probe.extrapolate import depths_for, extrapolate
from vramplan.probe.history import log_of
from vramplan.probe.kernel_checks import ATTENTION, OPERATIONS, _qkv, attention_choices, facts_of, planned_peak
from vramplan.probe.matching import compare, labelled
from vramplan.probe.measure import SPARE, Bench, calibrate, depth_of_plan, from_recording, gpu_of, measured, plan_for
from vramplan.probe.process import Child
from vramplan.probe.recording import FAILED, OUT_OF_MEMORY, Recording, read_recording
from vramplan.probe.report import Probed, answer_of, row_of
from vramplan.probe.suite import SUITES, suite
from vramplan.render import probed as probed_page

ROOT = Path(__file__).parents[1]
MEASURED = Path(__file__).parent / "measured"
REAL = MEASURED / "h100-llama-lora.recording.json.gz"
"""``vramplan probe llama-3.2-1b -m lora --save`` on an H100, 2026-11-25."""
H100 = find_gpu("h100")
GIB = 1 << 30


def job(**fields) -> dict:
    return {"config": LLAMA, "method": "lora", "trainer": "pytorch", "sequence_length": 64, **fields}


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "folder", lambda: tmp_path / "cards")


class FakeMeter:
    """A card's counters and history as the planned ``trace_log`` would have them, phase by phase.

    Figures that come from it equal the plan by construction. They show that the recorder and the report carry them
    through unchanged, and nothing about a real card: that is what :data:`REAL` and ``tests/measured`` are for.
    """

    device = "cpu"
    context = 700 << 20

    def __init__(self, trace_log: TraceLog, breaks_in: tuple[int, str] | None = None):
        self.trace_log, self.breaks_in = trace_log, breaks_in
        self.allocator = CachingAllocator()
        self.taken = self.given = self.at = 0

    def enter(self, phase: str, step: int) -> None:
        """Run the log to where ``phase`` begins."""
        if (step, phase) == self.breaks_in:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        for mark in self.trace_log.marks:
            if mark.at >= self.at and mark.name == phase and mark.step == step:
                self.run_to(mark.at)
                return

    def run_to(self, end: int) -> None:
        for event in self.trace_log.events[self.at : end]:
            if event >= 0:
                self.allocator.malloc(event, self.trace_log.allocations[event].size)
                self.taken += 1
            else:
                self.allocator.free(~event)
                self.given += 1
        self.at = max(self.at, end)

    def warm_up(self) -> None: ...

    def record(self) -> None: ...

    def empty_cache(self) -> None: ...

    def counts(self) -> tuple[int, int]:
        return self.taken, self.given

    def read(self) -> tuple[int, int, int, int]:
        a = self.allocator
        return a.allocated, a.peak_allocated, a.reserved, a.peak_reserved

    def reset_peaks(self) -> None:
        self.allocator.reset_peaks()

    def process_bytes(self) -> int:
        return self.allocator.reserved + self.context

    def device_bytes(self) -> int:
        return self.process_bytes()

    def facts(self) -> dict:
        return {
            "name": "NVIDIA H100 80GB HBM3",
            "capability": [9, 0],
            "multiprocessors": 132,
            "total_memory": H100.total_memory,
            "driver": "580.1",
            "cuda": "13.0",
            "cudnn": 91900,
        }

    def history(self) -> list[dict]:
        """As ``device_traces`` of a snapshot, with what happens on a card between the events."""
        out = []
        for event in self.trace_log.events:
            key = event if event >= 0 else ~event
            entry = {"addr": key, "size": self.trace_log.allocations[key].size, "frames": []}
            if event >= 0:
                out += [{**entry, "action": "alloc"}]
            else:
                out += [{**entry, "action": "free_requested"}, {**entry, "action": "free_completed"}]
        return [{"action": "segment_alloc", "addr": 0, "size": 2 << 20, "frames": []}, *out]


def measure(data: dict, monkeypatch, breaks_in=None, trace_log=None, layers=None):
    """A job planned, and really built and run on the CPU under the fake card."""
    from vramplan.probe import child

    planned = plan_for(data, H100, layers)
    meter = FakeMeter(trace_log or planned.trace_log, breaks_in)
    mark = child.Recorder.mark

    def marked(self, phase, step, kind=""):
        meter.enter(phase, step)
        mark(self, phase, step, kind)

    monkeypatch.setattr(child.Recorder, "mark", marked)
    return planned, child.measure(planned.job, planned.task, meter, layers, steps=2)


IMAGES = {
    "config": GRID,
    "method": "full",
    "trainer": "pytorch",
    "sequence_length": 64,
    "images": 2,
    "image_size": [112, 112],
}
JOBS = {
    "full": job(method="full", mixed_precision="bf16", dtype="float32"),
    "qlora": job(method="qlora", optimizer="adamw_8bit", gradient_accumulation_steps=3),
    "trainer": job(trainer="transformers", gradient_accumulation_steps=2),
    "trl": job(method="qlora", trainer="trl", lora={"target_modules": "all-linear"}),
    "inference": job(method="inference", new_tokens=4),
    "images": IMAGES,
    "images and trainer": {**IMAGES, "trainer": "transformers", "batch_size": 2},
}


@pytest.mark.parametrize("name", JOBS)
def test_the_real_job_runs_and_its_phases_are_the_plans(name, monkeypatch):
    """The same builders and steps, or the Trainers' own, run for real on the CPU: what is shown is that they begin the
    same phases in the same order as the dry run. That the figures agree shows the report alone (:class:`FakeMeter`)."""
    planned, recording = measure(JOBS[name], monkeypatch)
    assert (recording.outcome, recording.reason) == ("ok", "")
    steps = [(mark.step, mark.name) for mark in planned.trace_log.marks if mark.step > 0]
    assert [(phase["step"], phase["name"]) for phase in recording.steps] == steps
    answer = answer_of(Probed(planned, recording, compare(planned.trace_log, recording.trace_log)))
    rows = {row["figure"]: row for row in answer["figures"]}
    assert rows["allocated"]["difference"] == rows["reserved"]["difference"] == 0
    assert answer["match"]["share"] == 1 and not answer["match"]["differences"]
    trains = name != "inference"
    assert bool(recording.trainable_parameters) == bool(recording.optimizer_state) == trains


@pytest.mark.parametrize("mask", ("absent", "full", "padded", "packed"))
@pytest.mark.parametrize("trainer", ("pytorch", "transformers", "trl"))
def test_the_model_is_given_what_the_plan_gave_it(trainer, mask, monkeypatch):
    """Of the same shapes and dtypes, and a mask that hides something where the job's batch is padded."""
    given, hiding = [], []
    forward = modeling_llama.LlamaModel.forward

    @functools.wraps(forward)
    def watched(self, *args, **kwargs):
        told = {name: value for name, value in kwargs.items() if isinstance(value, (torch.Tensor, int))}
        shapes = {name: getattr(value, "shape", value) for name, value in told.items()}
        given.append((shapes, {name: value.dtype for name, value in told.items() if isinstance(value, torch.Tensor)}))
        if kwargs["input_ids"].device.type == "cpu":
            seen, places = kwargs.get("attention_mask"), kwargs.get("position_ids")
            hiding.append((seen is not None and not seen.all(), 0 if places is None else int((places == 0).sum())))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", watched)
    asked = job(trainer=trainer, attention_mask=mask, batch_size=3, sequence_length=31, gradient_checkpointing=False)
    _, recording = measure(asked, monkeypatch, layers=2)
    assert (recording.outcome, recording.reason) == ("ok", "")
    assert len(hiding) == 2 and given[0] == given[-1]
    assert {*hiding} == {(mask == "padded", 6 if mask == "packed" else 0)}


def test_a_shorter_model_that_does_not_run_is_refused():
    with pytest.raises(PlanError, match="does not run this job"):
        plan_for(job(sequence_length=64, attention="eager", config={**LLAMA, "head_dim": 3}), H100, layers=2)


def test_a_config_with_infinity_reaches_the_measuring_process_as_it_is():
    """Nemotron-H's ``time_step_limit``, say."""
    asked = read_job(job(config={**LLAMA, "limit": [0.0, float("inf")]}))
    assert read_job(json.loads(json.dumps(asked.model_dump(mode="json")))).config["limit"][1] == float("inf")


@pytest.mark.parametrize("optimizer", ["adamw_torch_forloop", "sgd_momentum"])
def test_an_optimiser_that_a_trainer_has_no_name_for_takes_the_parameters_in_their_order(optimizer):
    """Measured on an H200: the head comes after the last norm, not after the last weight that decays."""
    planned = plan_for(job(method="full", trainer="transformers", optimizer=optimizer), H100)
    states = [a.fqn for a in planned.trace_log.allocations if a.kind == "optimizer_state"]
    norms = [n for n, module in enumerate(states) if module == "model.norm"]
    assert norms and max(norms) < max(n for n, module in enumerate(states) if module == "lm_head")


def test_no_loss_is_taken_of_what_stands_for_an_image(monkeypatch):
    """Some models have no row of their head for it; whose loss would be taken of it breaks the card."""
    from vramplan.probe import child

    shown = {}
    monkeypatch.setattr(child, "loop_of", lambda _: lambda recorder, model, job, task, steps: shown.update(
        step.make_batch(recorder, model, job, task)))  # fmt: skip
    measure(JOBS["images"], monkeypatch)
    image = shown["input_ids"] == GRID["image_token_id"]
    assert image.sum() == 2 * 16 and (shown["labels"][image] == -100).all()
    assert torch.equal(shown["labels"][~image], shown["input_ids"][~image])


def test_a_shorter_model_is_built_and_measured(monkeypatch):
    """Which modules are built; its figures are the plan's by construction."""
    deep = job(config={**LLAMA, "num_hidden_layers": 6})
    planned, recording = measure(deep, monkeypatch, layers=2)
    assert recording.outcome == "ok" and recording.layers == 2
    whole = plan_for(deep, H100)
    assert planned.summary.peak.peak < whole.summary.peak.peak
    modules = {a.fqn for a in planned.trace_log.allocations}
    assert "model.layers.1" in modules and "model.layers.2" not in modules


def test_out_of_memory_is_a_finding_with_its_phase(monkeypatch):
    """How an error of the card is told; the meter raises it."""
    planned, recording = measure(job(), monkeypatch, breaks_in=(1, "backward"))
    assert recording.outcome == OUT_OF_MEMORY and "2.00 GiB" in recording.reason
    answer = answer_of(Probed(planned, recording, compare(planned.trace_log, recording.trace_log)))
    assert answer["broke_in"] == {"step": 1, "phase": "forward"}


def test_what_else_fails_is_told_in_the_stacks_words(monkeypatch):
    from vramplan.probe import child

    monkeypatch.setattr(child, "loop_of", lambda _: lambda *_: 1 / 0)
    _, recording = measure(job(), monkeypatch)
    assert recording.outcome == FAILED and recording.reason == "ZeroDivisionError: division by zero"


# --- both books ---------------------------------------------------------------------------------------------


def trace_log(*sizes: int, module: str = "layer", free=()) -> TraceLog:
    allocations = [Allocation(size, f"{module}.{i}", "activations", "forward", "mm") for i, size in enumerate(sizes)]
    events = []
    for i in range(len(sizes)):
        events += [i] + ([~i] if i in free else [])
    return TraceLog(allocations, events, [""] * len(events), [Mark(0, "load", 0), Mark(0, "forward", 1)])


def test_equal_books_match_whole():
    match = compare(trace_log(1024, 2048, 4096), trace_log(1024, 2048, 4096))
    assert match.share == 1 and match.pairs == {0: 0, 1: 1, 2: 2} and not match.differences


def test_another_size_in_the_same_place_is_named_with_its_bytes():
    match = compare(trace_log(1024, 1 << 20, 4096), trace_log(1024, 3 << 20, 4096))
    (found,) = match.differences
    assert (found.module, found.kind, found.phase) == ("layer.1", "activations", "forward")
    assert (found.planned, found.measured) == (1 << 20, 3 << 20)
    assert match.share == pytest.approx((1024 + 4096) / (1024 + 4096 + (3 << 20)))


def test_what_one_has_alone_is_named():
    plan, real = trace_log(1024, 2048), trace_log(1024, 2048, 8192)
    more = compare(plan, real)
    assert [(d.planned, d.measured) for d in more.differences] == [(0, 8192)] and more.measured_only == 1
    less = compare(real, plan)
    assert [(d.planned, d.measured) for d in less.differences] == [] and less.planned_only == 1


def test_what_the_plan_gave_back_before_is_no_match():
    match = compare(trace_log(1 << 20, 2048, free=(0,)), trace_log(1 << 20, 2048))
    assert match.share < 0.01 and match.differences[0].measured == 1 << 20


def test_kinds_and_modules_come_from_the_plan():
    real = trace_log(1024, 2048)
    real.allocations = [a._replace(fqn="", kind="temporaries") for a in real.allocations]
    real.marks = plan_marks = [Mark(0, "load", 0), Mark(0, "backward", 1)]
    plan = trace_log(1024, 2048)
    plan.marks = plan_marks
    named = labelled(plan, real, compare(plan, real))
    assert [(a.kind, a.fqn) for a in named.allocations] == [("activations", "layer.0"), ("activations", "layer.1")]


def test_a_history_is_read_with_its_places():
    site = "/home/someone/env/lib/python3.12/site-packages/"
    frames = [
        {"filename": site + "torch/nn/functional.py", "line": 1, "name": "linear"},
        {"filename": site + "peft/tuners/lora/layer.py", "line": 777, "name": "forward"},
    ]
    trace = [
        {"action": "segment_alloc", "addr": 7, "size": 2 << 20, "frames": []},
        {"action": "alloc", "addr": 7, "size": 100, "frames": []},
        {"action": "alloc", "addr": 9, "size": 200, "frames": frames},
        {"action": "free_requested", "addr": 7, "size": 100, "frames": []},
        {"action": "free_completed", "addr": 7, "size": 100, "frames": []},
        {"action": "alloc", "addr": 7, "size": 300, "frames": []},
        {"action": "free_completed", "addr": 12345, "size": 1, "frames": []},
    ]
    read = log_of(trace, [(0, "load", 0), (1, EMPTY_CACHE, 0), (1, "forward", 1)], [(1, "layers.0"), (2, "")])
    assert read.events == [0, 1, ~0, 2]
    assert [(a.size, a.fqn, a.phase) for a in read.allocations] == [
        (100, "", "load"),
        (200, "layers.0", "forward"),
        (300, "", "forward"),
    ]
    assert read.allocations[1].op == "peft/tuners/lora/layer.py:777 forward"
    assert [tuple(mark) for mark in read.marks] == [(0, "load", 0), (1, EMPTY_CACHE, 0), (1, "forward", 1)]


# --- a real recording ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> tuple[dict, Probed]:
    return from_recording(read_recording(REAL))


def test_a_real_run_is_the_plan(real):
    """A recording made on an H100, against the plan made here."""
    answer, _ = real
    rows = {row["figure"]: row for row in answer["figures"]}
    assert rows["allocated"]["difference"] == rows["reserved"]["difference"] == rows["placed"]["difference"] == 0
    assert abs(rows["process"]["percent"]) < 2
    names = [(phase["step"], phase["name"]) for phase in answer["phases"]]
    step = ["forward", "backward", "optimizer", "end"]
    assert names == [(0, "load"), *((number, name) for number in (1, 2) for name in step)]
    for phase in answer["phases"]:
        assert [phase[moment]["difference"] for moment in ("peak", "end", "reserved")] == [0, 0, 0], phase
        assert phase["step"] == 0 or abs(phase["process"]["percent"]) < 2, phase
    assert answer["match"]["share"] == 1 and answer["match"]["events"] > 4000


def test_a_later_step_that_is_higher_is_the_steady_one(real):
    """As in a plan, which repeats the steady step as long as that takes more of the card."""
    probed = real[1]
    steps = [
        {**phase, "peak_allocated": phase["peak_allocated"] + (phase["step"] == 3)} for phase in probed.recording.phases
    ]
    later = answer_of(replace(probed, recording=replace(probed.recording, phases=steps)))
    assert {phase["step"] for phase in later["phases"]} == {0, 1, 2}
    assert {phase["peak"]["difference"] for phase in later["phases"] if phase["step"] == 2} == {-1}


@pytest.mark.parametrize("width", (None, 80))
def test_a_suites_table_is_never_cut(real, width):
    """Written to a file it is as wide as it needs to be; in a terminal of 80 columns names take several lines."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=width is not None, color_system=None)
    name = "a job whose name is rather a long one, and then some"
    probed_page.suite([(name, real[0])], [("another", "out of memory " * 20)], console)
    text = out.getvalue()
    assert "…" not in text and "100.00 %" in text and text.count("+0.000 %") == 2
    assert (name in text) == (width is None) and text.count("memory") == 20


def test_a_recording_is_kept_whole(tmp_path, real):
    recording = real[1].recording
    recording.save(tmp_path / "again.json.gz")
    assert read_recording(tmp_path / "again.json.gz") == recording
    (tmp_path / "broken.gz").write_bytes(b"no")
    with pytest.raises(PlanError, match="no recording"):
        read_recording(tmp_path / "broken.gz")


def test_files_are_left_where_they_are_asked_for(tmp_path, real):
    from vramplan.probe.keep import Keep

    answer, probed = real
    keep = Keep(str(tmp_path / "all"), str(tmp_path / "both.png"), str(tmp_path / "rows.jsonl"))
    keep.all(answer, probed)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "all" / "probe.timelines.html").read_text()
    assert "<svg" in page and "100.000 %" in page and "http" not in page.split("<svg", 1)[0]
    assert read_recording(tmp_path / "all" / "probe.recording.json.gz") == probed.recording
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["measured"]["peak_allocated"] == 5653968896
    with pytest.raises(PlanError, match="no picture"):
        Keep(picture="both.txt")


def test_a_phase_that_only_one_has_stands_in_its_step():
    from vramplan.probe.chart import in_order

    plan, measured = [(0, "load", 0), (1, "forward", 0), (2, "forward", 0)], [(1, "forward", 0), (1, "end", 0)]
    assert in_order(plan, measured) == [(0, "load", 0), (1, "forward", 0), (1, "end", 0), (2, "forward", 0)]


def test_a_row_names_no_person_and_no_path(real):
    probed = real[1]
    probed.recording.job["config"]["_name_or_path"] = "/home/someone/model"
    text = json.dumps(row_of(probed, "mine"))
    assert "/home" not in text and "someone" not in text
    del probed.recording.job["config"]["_name_or_path"]


def test_the_command_line_compares_a_recording(tmp_path):
    done = run("probe", "--recording", str(REAL), "--report", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "off by 0.000 %" in done.stdout and "Nothing: every allocation alive there" in done.stdout
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 1


# --- the card -----------------------------------------------------------------------------------------------


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vramplan", *command], capture_output=True, text=True, cwd=ROOT, timeout=120, **options
    )


@pytest.mark.parametrize("what", (["qwen2.5-0.5b"], ["--suite", "quick"]))
def test_a_cpu_build_is_told_in_one_sentence(what):
    done = run("probe", *what, "--json")
    assert done.returncode == 2 and "is a CPU build: it cannot use a GPU" in json.loads(done.stdout)["error"]["message"]
    assert len(done.stderr.strip().splitlines()) == 2


@pytest.fixture
def cuda_build(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def nvml(monkeypatch, **functions):
    for name, value in {"nvmlInit": None, "nvmlShutdown": None, **functions}.items():
        answer = value if callable(value) else lambda *_, value=value: value
        monkeypatch.setattr(pynvml, name, answer)


def raising(code: int):
    def refuse(*_):
        raise pynvml.NVMLError(code)

    return refuse


def test_no_driver(monkeypatch, cuda_build):
    nvml(monkeypatch, nvmlInit=raising(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    with pytest.raises(PlanError, match="no NVIDIA driver answers here"):
        card.look()


def test_an_old_driver(monkeypatch, cuda_build):
    nvml(monkeypatch, nvmlSystemGetCudaDriverVersion_v2=12040)
    with pytest.raises(PlanError, match=r"too old: it serves CUDA 12\.4, torch was built for 13\.0"):
        card.look()


@pytest.mark.parametrize("count, visible", [(0, None), (1, "3"), (1, "")])
def test_no_card_is_visible(monkeypatch, cuda_build, count, visible):
    nvml(monkeypatch, nvmlSystemGetCudaDriverVersion_v2=13000, nvmlDeviceGetCount=count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(PlanError, match="no NVIDIA GPU is visible here"):
        card.look()


def test_rocm_is_not_modelled():
    with pytest.raises(PlanError, match="ROCm"):
        card._check_torch("2.13.0+rocm7", None, "7.0")


def test_the_card_is_found_in_the_catalogue():
    assert gpu_of("NVIDIA H100 80GB HBM3", 80 * GIB, (9, 0)) == H100
    assert gpu_of("NVIDIA GeForce RTX 4090", 24 * GIB, (8, 9)).key == "rtx-4090"
    unheard = gpu_of("NVIDIA Unheard 9000", 24 * GIB, (8, 9))
    assert unheard.name == "NVIDIA Unheard 9000" and find_gpu(unheard.like).compute_capability == (8, 9)


def test_a_server_probes_only_where_it_was_told_to():
    from fastapi.testclient import TestClient
    from vramplan.server import app as web

    with TestClient(web.create_app()) as client:
        refused = client.post("/probe", json=job())
        assert refused.status_code == 403 and "--allow-probe" in refused.json()["error"]["hint"]
    with TestClient(web.create_app(allow_probe=True)) as client:
        no_card = client.post("/probe", json=job())
        assert no_card.status_code == 422 and "is a CPU build" in no_card.json()["error"]["message"]
        assert client.post("/probe", json={"model": "/etc/passwd"}).json()["error"]["field"] == "model"
        assert "/probe" in client.get("/openapi.json").json()["paths"]


def test_the_answer_is_the_documented_one(real):
    from vramplan.schema import Probe

    assert Probe.model_validate(real[0]).match.share == 1


class FakeChild:
    """A process that has measured already."""

    def __init__(self, recording: Recording | None = None):
        self.recording, self.request, self.ended = recording, None, False

    def run(self, request, seconds, tell):
        self.request = request
        return self.recording

    def end(self):
        self.ended = True


def state(free: int, others: int = 0) -> CardState:
    return CardState("NVIDIA H100 80GB HBM3", (9, 0), "580.1", 80 * GIB, free, others, False)


def bench(free: int, child=None, **options) -> Bench:
    child = child or FakeChild()
    return Bench(start=lambda: child, look=lambda: state(free, options.pop("others", 0)), **options)


def test_a_full_card_is_left_alone():
    child = FakeChild()
    with pytest.raises(PlanError, match="has 1.0 GiB of 80.0 GiB free beside 2 other processes: too little to probe"):
        Bench(start=lambda: child, look=lambda: state(GIB, 2)).probe(job())
    assert child.request is None and child.ended


def test_a_card_for_one_process_alone():
    alone = CardState("NVIDIA H100 80GB HBM3", (9, 0), "580.1", 80 * GIB, 79 * GIB, 1, True)
    with pytest.raises(PlanError, match="is in use, and set to serve one process alone"):
        Bench(start=lambda: pytest.fail("started"), look=lambda: alone).probe(job())


def test_what_would_not_fit_is_asked_about_first():
    big = {"model": "llama-3.1-8b", "method": "full"}
    with pytest.raises(PlanError, match="it would run out of memory") as refused:
        bench(24 * GIB).probe(big)
    assert "--yes" in refused.value.hint
    questions = []
    with pytest.raises(PlanError):
        bench(24 * GIB, ask=lambda question: questions.append(question) or False).probe(big)
    assert len(questions) == 1 and "predicted are" in questions[0]


def test_the_cap_leaves_something_to_others_and_the_card_is_remembered(monkeypatch):
    _planned, recording = measure(job(), monkeypatch)
    child = FakeChild(recording)
    answer, _probed = measured(bench(24 * GIB, child), job())
    assert child.request["cap"] <= 24 * GIB - SPARE - (700 << 20) and child.request["calibrate"]
    facts = calibration.known("h100")
    assert facts.driver == "580.1" and facts.context == FakeMeter.context
    process = next(row for row in answer["figures"] if row["figure"] == "process")
    assert process["difference"] == HOPPER_CONTEXT - FakeMeter.context  # the plan is older than what was measured
    measured(bench(24 * GIB, child), job())
    assert not child.request["calibrate"]


def test_a_failure_on_the_card_is_no_measurement(monkeypatch):
    _, recording = measure(job(), monkeypatch)
    recording.outcome, recording.reason = FAILED, "RuntimeError: no kernel image"
    with pytest.raises(PlanError, match="the job failed on the card: RuntimeError: no kernel image"):
        bench(24 * GIB, FakeChild(recording)).probe(job())


SCRIPTS = {
    "killed": ("import os; {ready}; input(); {say}; os.kill(os.getpid(), 9)", "was killed (SIGKILL), in backward of"),
    "dies": ("{ready}; input(); raise SystemExit('no such device')", "failed, during start: no such device"),
    "breaks the card": (
        "import sys; {ready}; input(); sys.exit('''Traceback:\ntorch.AcceleratorError: CUDA error: device-side '''"
        "'''assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.''')",
        "failed, during start: torch.AcceleratorError: CUDA error: device-side assert triggered",
    ),
    "hangs": ("import time; {ready}; input(); {say}; time.sleep(60)", "was stopped after 1 s, in backward of step 2"),
    "never starts": ("raise SystemExit('no module named torch')", "failed, during start: no module named torch"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_process_that_does_not_live_to_tell(name):
    template, message = SCRIPTS[name]
    said = {"ready": '{"ready": true}', "say": '{"phase": "backward", "step": 2}'}
    template = template.format(**{key: f"print({text!r}, flush=True)" for key, text in said.items()})
    child = Child((sys.executable, "-c", template))
    with pytest.raises(PlanError) as told:
        child.run({}, 1)
    assert message in told.value.message
    assert child._process.poll() is not None


# --- layers, calibration, suites ----------------------------------------------------------------------------


def test_extrapolation_is_the_plan_where_they_agree_and_carries_what_they_do_not():
    assert depths_for(8) == (4, 8) and depths_for(2) == (2, 4)
    assert extrapolate((4, 8), (100, 180), (100, 180), 32, 660) == 660
    assert extrapolate((4, 8), (100, 180), (107, 187), 32, 660) == 667
    assert extrapolate((4, 8), (100, 180), (104, 188), 32, 660) == 660 + 8 + 24


def facts(card: str = "h100", date: str = "2026-11-25", context: int = 500, **found) -> calibration.Facts:
    return calibration.Facts(card, "580.1", "2.13.0+cu130", date, context, context, context, **found)


def test_the_context_of_a_probed_card_is_used_by_later_plans_and_said():
    from vramplan.planning.estimate import estimate

    before = estimate(job(gpu="h100"))
    row = {"name": "a product's peak", "planned": 1, "measured": 2}
    calibration.store(facts(unexplained=[row]), calibrated=True)
    calibration.store(facts(date="2026-11-26", context=600), calibrated=False)
    known = calibration.known("h100")
    assert (known.lowest, known.context, known.highest, known.unexplained) == (500, 600, 600, [row])
    after = estimate(job(gpu="h100"))
    assert after["peak"]["process"] == after["peak"]["reserved"] + 600 != before["peak"]["process"]
    assert any("measured by a probe of this card, 2026-11-26, driver 580.1" in text for text in after["warnings"])
    assert any("a product's peak was measured as 2, and is planned as 1" in text for text in after["warnings"])
    assert "probe" not in estimate(job(gpu="a100-80gb"))["fits"][0]["margin_source"]


WIDE = {**LLAMA, "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1}
"""With heads of 64."""


@pytest.mark.parametrize(
    "found, moves",
    [
        ({"sizes": (("cublas_workspace", 32 << 20, 8 << 20),)}, -2 * (24 << 20)),  # forward's thread, and backward's
        ({"sizes": (("run_cudnn_SDP_bprop", 1000, 9000),)}, None),
        ({"attention": (("bfloat16 heads of 64", "cudnn", "math"),)}, None),
        ({"attention": (("bfloat16 heads of 80", "cudnn", "math"),)}, 0),
        ({"attention": (("bfloat16 heads of 64", "flash", "math"),)}, 0),
    ],
)
def test_kernels_of_a_probed_card_change_later_plans_and_are_said(found, moves):
    """Workspaces, kernels' temporaries and the attention kernel that runs, each where the sources say otherwise."""
    from vramplan.planning.estimate import estimate

    one = {
        "config": WIDE,
        "method": "full",
        "trainer": "pytorch",
        "gpu": "h100",
        "batch_size": 8,
        "sequence_length": 256,
    }
    before, elsewhere = estimate(one), estimate({**one, "gpu": "h200"})
    calibration.store(facts(kernels=KernelFacts(**found)), calibrated=True)
    after = estimate(one)
    moved = after["peak"]["allocated"] - before["peak"]["allocated"]
    assert moved > 0 if moves is None else moved == moves
    (said,) = [text for text in after["warnings"] if "its kernels are planned as that probe found them" in text]
    assert "2026-11-25" in said and str(next(iter(found.values()))[0][0]) in said
    assert estimate({**one, "gpu": "h200"})["peak"] == elsewhere["peak"]


def recorded_kernels() -> dict:
    """What a probe found of an H100 with torch 2.11.0+cu130, 2026-11-25; it asked about five kinds of attention."""
    rows = {row["name"]: row["measured"] for row in read_recording(REAL).card["kernels"]}
    peaks = {name: rows[name] for name in OPERATIONS}
    assert sum(isinstance(value, str) for value in rows.values()) == 5
    chosen = {name: rows[f"attention of {name}"] for name, *_ in ATTENTION}
    stated = {name: stated_for(*case) for name, *case in ATTENTION}
    return {"attention": [(name, stated[name], chosen[name]) for name in stated if stated[name] != chosen[name]],
            "peaks": peaks}  # fmt: skip


def stated_for(dtype, heads: int, keys: int, size: int, masked: bool) -> str:
    query, key, value = _qkv("meta", dtype, heads, keys, size)
    mask = torch.zeros(1, 1, 512, 512, dtype=dtype, device="meta") if masked else None
    return attention_backend(Card(), query, key, value, mask, 0.0, not masked, heads != keys)


def test_a_real_cards_kernels_are_planned_as_it_ran_them(real):
    """No kernel of that H100 is otherwise than stated: what is planned for it stays as it is, but for the context."""
    from vramplan.planning.estimate import estimate

    found = recorded_kernels()
    assert facts_of(found, Card()) == (KernelFacts(), [])
    before = estimate(job(gpu="h100"))
    recording = replace(real[1].recording, card={**real[1].recording.card, "kernels": found})
    calibrate(H100, recording)
    known = calibration.known("h100")
    assert (known.kernels, known.unexplained, known.context) == (KernelFacts(), [], 794820608)
    after = estimate(job(gpu="h100"))
    assert after["phases"] == before["phases"] and after["timeline"] == before["timeline"]
    assert after["peak"]["process"] == after["peak"]["reserved"] + 794820608


AMPERE = Card((8, 0), 108)
FORTH_AND_BACK = "attention of bf16 heads of 64{}, forth and back: its peak"


@pytest.mark.parametrize(
    "card, name, operator",
    [
        (Card(), "the first product's peak", "cublas_workspace"),
        (Card(), "the first product with a bias's peak", "cublaslt_workspace"),
        (Card(), "a bias gradient over 4096 rows' peak", "gpu_reduce_kernel"),
        (Card(), "the norm of 8 gradients' peak", "_foreach_norm"),
        (Card(), FORTH_AND_BACK.format(""), "run_cudnn_SDP_bprop"),
        (AMPERE, FORTH_AND_BACK.format(""), "mha_bwd"),
        (AMPERE, FORTH_AND_BACK.format(" with a mask"), "_efficient_attention_backward"),
    ],
)
def test_what_an_operation_takes_more_is_its_workspace(card, name, operator):
    """From the peaks that a card would show to the fact that makes the plan of the operation that peak."""
    truth = Card(card.capability, card.multiprocessors, KernelFacts(sizes=((operator, 4, 5),)))
    peaks = {other: planned_peak(operation, truth)[0] for other, operation in OPERATIONS.items()}
    found, unexplained = facts_of({"attention": [], "peaks": peaks}, card)
    assert [size[0] for size in found.sizes] == [operator] and not unexplained
    assert peaks[name] != planned_peak(OPERATIONS[name], card)[0]
    again = Card(card.capability, card.multiprocessors, found)
    for other, operation in OPERATIONS.items():
        assert abs(planned_peak(operation, again)[0] - peaks[other]) <= 1024


def test_what_no_workspace_explains_is_named_only():
    measured = recorded_kernels()
    name = "the first product's peak"
    measured["peaks"] = {key: peak - (64 << 20) * (key == name) for key, peak in measured["peaks"].items()}
    facts, unexplained = facts_of(measured, Card())
    assert facts == KernelFacts() and [row["name"] for row in unexplained] == [name]


def test_a_device_is_asked_which_attention_it_runs():
    """On the CPU, which has no cuDNN; the question is the one that a card is asked."""
    asked, other = attention_choices(Card(), "cpu")
    assert asked == 1152 and ("bfloat16 heads of 64", "cudnn", "flash") in other
    facts = KernelFacts(tuple(other))
    assert attention_choices(Card(measured=facts), "cpu") == (1152, [])


def rows(of: str = "*") -> list[dict]:
    files = MEASURED.glob(f"{of}-probe.jsonl")
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def test_rows_of_probes_are_accepted():
    """What ``--report`` writes and somebody adds under tests/measured: a job, a stack, a card, figures; no path."""
    for row in rows():
        assert read_job(row["job"]).resolved() and row["stack"]["torch"] and row["gpu"]["driver"], row["id"]
        assert row["measured"]["peak_allocated"] > 0 and row["measured"]["peak_process"] > 0 and row["matched"] >= 0.99
        assert "/home" not in json.dumps(row) and "/root" not in json.dumps(row)


def test_extrapolation_against_the_whole_depth():
    """Three models measured at two depths and whole on an H100: at most 0.5 % off."""
    found = {(row["id"].partition(" @")[0], row["layers"]): row for row in rows("h100")}
    short = {name for name, layers in found if layers is not None}
    assert len(short) == 3
    for name in short:
        depths = sorted(layers for other, layers in found if other == name and layers)
        data = {**found[name, None]["job"], "gpu": None}
        planned = tuple(plan_for(data, H100, depth).summary.peak.peak for depth in depths)
        truth = tuple(found[name, depth]["measured"]["peak_allocated"] for depth in (*depths, None))
        whole = plan_for(data, H100)
        guess = extrapolate(tuple(depths), planned, truth[:2], depth_of_plan(whole), whole.summary.peak.peak)
        assert abs(guess / truth[2] - 1) <= 0.005, name


def test_suites_are_named():
    with pytest.raises(PlanError, match="no suite 'all'"):
        suite("all")
    assert len(SUITES["full"]) >= 30 and len({name for name, _ in SUITES["full"]}) == len(SUITES["full"])


@pytest.mark.slow
@pytest.mark.parametrize("name, one", SUITES["full"])
def test_every_job_of_the_suite_is_planned(name, one):
    assert plan_for(one, H100).summary.peak.peak > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card here")
def test_a_real_card():
    done = run("probe", "qwen2.5-0.5b", "-m", "lora", "--json")
    answer = json.loads(done.stdout)
    assert answer["match"]["share"] >= 0.99 and abs(answer["figures"][1]["percent"]) <= 1
