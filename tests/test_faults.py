"""Whose fault an error is, and what becomes of one that is ours: exit code 2 or HTTP 500, and a report to attach."""

from __future__ import annotations

import json
import logging
import sys
import types
from contextlib import suppress

import pytest
import torch
from fastapi.testclient import TestClient
from tiny import JOB, LLAMA
from vramplan.cli import entry as cli
from vramplan.dryrun import diagnose, repeat_layers
from vramplan.dryrun.cuda import host_reads
from vramplan.dryrun.cuda.as_if_cuda import as_if_cuda
from vramplan.dryrun.cuda.card_facts import Card
from vramplan.dryrun.cuda.host_reads import HOST_READS, HostRead
from vramplan.dryrun.cuda.registry import KERNELS
from vramplan.dryrun.tracker import MemoryTracker
from vramplan.errors import OurFault, PlanError, Unanswered
from vramplan.job import read_job
from vramplan.memory.profile import Profile
from vramplan.memory.sizes import ShapePoint
from vramplan.planning import fault_reports, profile_cache
from vramplan.planning.resolve import card_of, config_of
from vramplan.planning.tracer import InProcessTracer, request_of
from vramplan.server import app as web
from vramplan.server.runner import RequestRunner
from vramplan.usecases import plan

aten = torch.ops.aten
BUG = "a bug of vramplan's own"


def broken(*_):
    raise KeyError(BUG)


def request(**fields):
    """A job of a model that no other test has, so that nothing of it is stored."""
    job = read_job({**JOB, **fields}).resolved()
    return request_of(job, config_of(job)[0], card_of(job))


@pytest.fixture
def bug(monkeypatch, tmp_path):
    """A kernel rule that fails, a cache folder of its own, and no job that is known already."""
    monkeypatch.setitem(KERNELS, aten.mm.default, broken)
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
    monkeypatch.setattr(profile_cache, "_profiles", profile_cache.ProfileCache())  # nothing is known of any job
    return tmp_path


def test_an_error_of_a_kernel_rule_is_ours(bug):
    with pytest.raises(OurFault, match=f"KeyError: .*{BUG}") as told:
        plan({**JOB, "batch_size": 41})
    assert "GPU" not in told.value.hint and "fault of vramplan" in told.value.hint
    report = json.loads(fault_reports.path_of(told.value).read_text())
    assert report["job"] == {**JOB, "batch_size": 41} and report["traced"]["config"] == LLAMA
    assert BUG in "".join(report["traceback"]) and report["versions"]["torch"]
    assert str(bug) not in told.value.message + told.value.hint


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("error", [KeyError, TypeError])
def test_a_fault_of_a_rule_that_the_program_gets_over_is_told_at_the_end(error, monkeypatch):
    """Of a TypeError Python makes another one, of the operator."""

    def fails(*_):
        raise error(BUG)

    monkeypatch.setitem(KERNELS, aten.mm.default, fails)
    tracker, matrix = MemoryTracker(Card()), torch.empty(2, 2, device="meta")
    with tracker, suppress(Exception):
        matrix @ matrix
    with pytest.raises(OurFault, match=f"{error.__name__}.*{BUG}"):
        tracker.close()


def test_so_many_reports_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
    faults = [OurFault(f"number {number}") for number in range(fault_reports.KEPT + 3)]
    for fault in faults:
        fault_reports.write(fault, JOB)
    assert len([*fault_reports.folder().iterdir()]) == fault_reports.KEPT
    assert fault_reports.path_of(faults[-1]).exists()


def test_the_command_line_names_the_file_to_attach(bug, monkeypatch, tmp_path, capsys):
    path = tmp_path / "job.json"
    path.write_text(json.dumps({**JOB, "batch_size": 42}))
    monkeypatch.setattr(sys, "argv", ["vramplan", "estimate", "--job", str(path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    (report,) = fault_reports.folder().iterdir()
    told = capsys.readouterr().err
    assert end.value.code == 2 and BUG in told and f"attach {report}" in told and "Traceback" not in told


def test_a_visitor_is_told_the_number_of_the_report_alone(bug, monkeypatch, caplog):
    monkeypatch.setattr(RequestRunner, "__init__", _in_process(RequestRunner.__init__))
    with TestClient(web.create_app()) as client:
        answer = client.post("/estimate", json={**JOB, "batch_size": 43})
    (report,) = fault_reports.folder().iterdir()
    error = answer.json()["error"]
    assert answer.status_code == 500 and report.stem in error["hint"] and report.stem in caplog.text
    assert str(bug) not in answer.text and "Traceback" not in answer.text


def _in_process(init):
    class Here:
        slots, waiting = 1, 0

        def trace(self, part, request, handle):
            try:
                return InProcessTracer().trace(part, request)
            except Unanswered as given_up:
                raise given_up.error from None

        def __getattr__(self, name):
            return lambda *_, **__: None

    return lambda self, local_files, pool=None: init(self, local_files, Here())


def test_a_fault_stays_one_through_a_worker():
    from vramplan.server.trace_pool import _error_of, _sent

    sent = json.loads(json.dumps(_sent(OurFault(KeyError(BUG)))))
    heard = _error_of(*sent)
    assert type(heard) is OurFault and BUG in heard.message and BUG in "".join(heard.report["traceback"])
    refused = _error_of(*_sent(PlanError("no", "try", "model")))
    assert type(refused) is PlanError and refused.as_dict() == {"message": "no", "hint": "try", "field": "model"}


def test_what_the_stack_refuses_is_the_stack_s():
    """By its own Python, by an operator that a rule runs with the program's arguments, and as a card would."""
    heads = {**LLAMA, "num_key_value_heads": 3}
    for job in ({**JOB, "config": heads}, {**JOB, "config": {**LLAMA, "num_attention_heads": 5}}):
        with pytest.raises(PlanError) as told:
            plan(job)
        assert type(told.value) is PlanError, told.value


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    "run, ours",
    [
        (lambda: torch.empty(2, 3, device="meta") @ torch.empty(2, 3, device="meta"), False),
        (
            lambda: torch.empty(2, device="meta", dtype=torch.float16).masked_fill(
                torch.ones(2, device="meta").bool(), 1e9
            ),
            False,
        ),
        (lambda: torch.empty(4, 5, device="meta").sum(7), False),
        (
            lambda: torch.nn.functional.scaled_dot_product_attention(
                *(torch.empty(1, n, 4, 8, device="meta") for n in (4, 3, 3))
            ),
            False,
        ),
        (lambda: KERNELS[aten.mm.default](None, aten.mm.default, (), {}, ""), False),
        (lambda: KERNELS[aten.masked_fill.Scalar](None, None, (), {}, ""), True),
    ],
)
def test_the_frame_that_raised_tells(run, ours):
    with pytest.raises(Exception) as told, as_if_cuda(Card()), MemoryTracker(Card()):
        run()
    assert diagnose.is_ours(told.value) is ours, told.value


def test_errors_that_are_meant_are_not_ours():
    for error in (PlanError("no"), MemoryError(), RecursionError(), RuntimeError("can't allocate memory")):
        try:
            raise error
        except Exception as caught:
            assert not diagnose.is_ours(caught)
    assert diagnose.is_ours(OurFault("yes"))


def test_a_fold_that_fails_by_a_bug_is_no_slow_plan(monkeypatch, caplog):
    """Under the tests it fails; for a user it is told in the log, counted, and the whole model is run."""
    deep = {**JOB, "config": {**LLAMA, "num_hidden_layers": 12, "vocab_size": 72}}
    right = events_of(InProcessTracer().trace("step", request(**deep)))
    monkeypatch.setattr(
        repeat_layers, "_shorten_depths", eval(compile("lambda *_: {}['x']", diagnose.__file__, "eval"))
    )
    with pytest.raises(Unanswered, match="KeyError"):
        InProcessTracer().trace("step", request(**deep))
    monkeypatch.delenv("VRAMPLAN_STRICT")
    monkeypatch.setattr(repeat_layers, "_shorten_depths", _fails_when_short(repeat_layers._shorten_depths))
    before = diagnose.survived.total()
    with caplog.at_level(logging.WARNING, "vramplan"):
        assert events_of(InProcessTracer().trace("step", request(**deep))) == right
    assert diagnose.survived.total() > before and "fault of vramplan's own" in caplog.text


def events_of(data: bytes) -> list:
    trace_log = Profile.load(data).template.at(ShapePoint(1, 64, 132)).trace_log()
    return [(event >= 0, trace_log.allocations[event if event >= 0 else ~event][:4]) for event in trace_log.events]


def _fails_when_short(fails):
    return lambda short, groups, kept: fails() if groups else None


def test_every_rule_of_a_host_read_names_a_function_that_there_is():
    import transformers.generation.utils  # noqa: F401

    host_reads._checked.clear()
    host_reads.check()
    assert {read.module for read in HOST_READS} <= sys.modules.keys() and host_reads._checked == {*HOST_READS}


def test_a_rule_that_matches_nothing_where_it_should_raises(monkeypatch):
    gone = HostRead("StopCheckOfOld.__call__", "transformers.generation.utils", ">=5,<6", "generated")
    monkeypatch.setattr(host_reads, "HOST_READS", (gone,))
    with pytest.raises(OurFault, match="has no StopCheckOfOld.__call__"):
        host_reads.check()


def test_a_rule_is_found_for_a_function_within_a_function():
    module = types.ModuleType("a_module")
    exec("def outer():\n    def inner(): pass\n    return inner", vars(module))
    assert host_reads._has(module, "outer.<locals>.inner") and not host_reads._has(module, "outer.<locals>.other")


GENERATION = {"method": "inference", "new_tokens": 4}


def test_a_generation_that_does_not_end_is_ours(monkeypatch):
    """As where the function that asks for the end is answered "not yet" for ever."""
    stop = next(read for read in HOST_READS if read.answer == "generated")
    monkeypatch.setitem(host_reads._RULES, (stop.module, stop.function), stop._replace(answer=False))
    with pytest.raises(Unanswered, match="past its new tokens"):
        InProcessTracer().trace("step", request(**GENERATION))


def test_a_read_within_generate_that_no_rule_knows_is_not_answered(monkeypatch):
    stop = next(read for read in HOST_READS if read.answer == "generated")
    monkeypatch.delitem(host_reads._RULES, (stop.module, stop.function))
    with pytest.raises((Unanswered, PlanError)):
        InProcessTracer().trace("step", request(**GENERATION))
