"""Traces in processes of their own: one for all who ask, ended when nobody does, limited, and none hurts the server."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import forkserver

import anyio
import pytest
from vramplan.errors import Limited, OurFault, PlanError
from vramplan.job import read_job
from vramplan.memory.kernel_facts import KernelFacts
from vramplan.memory.profile import Profile
from vramplan.planning.resolve import card_of, config_of
from vramplan.planning.tracer import InProcessTracer, request_of
from vramplan.server.runner import RequestRunner
from vramplan.server.trace_pool import QUEUE_LIMIT, Abandoned, Busy, Ended, InFlightTrace, RequestHandle, TracePool
from vramplan.usecases import solve

from tests.tiny import LLAMA


def request_for(**changes):
    job = read_job(
        {"config": LLAMA, "method": "lora", "trainer": "pytorch", "sequence_length": 32, **changes}
    ).resolved()
    return request_of(job, config_of(job)[0], card_of(job))


SLOW = {"config": {**LLAMA, "num_hidden_layers": 500}, "method": "full", "trainer": "pytorch", "dtype": "float32"}
"""Hundreds of layers: seconds."""


@pytest.fixture(scope="module")
def pool():
    pool = TracePool(slots=1)
    pool.ready()
    yield pool
    pool.close()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came so far"
        time.sleep(0.005)


def test_a_trace_is_what_it_is_here(pool):
    job = request_for()
    theirs, mine = pool.trace("step", job, RequestHandle()), InProcessTracer().trace("step", job)
    assert theirs == mine and Profile.load(theirs).facts["class"] == "LlamaForCausalLM"
    with pytest.raises(PlanError, match="matches nothing|target") as refused:
        pool.trace("step", request_for(lora={"target_modules": ["no_such"]}), RequestHandle())
    assert refused.value.hint


def test_a_fault_of_ours_is_told_as_ours_with_the_traceback_of_the_worker(pool):
    """Here of a card whose kernels nobody knows: no job can ask for one."""
    with pytest.raises(OurFault, match="TypeError") as told:
        pool.trace("step", request_for()._replace(kernels=(None, 132, KernelFacts())), RequestHandle())
    assert "dryrun" in "".join(told.value.report["traceback"]) and told.value.report["traced"]["config"] == LLAMA
    assert pool.trace("step", request_for(), RequestHandle())


def test_many_ask_and_one_is_run(pool, monkeypatch):
    runs = []
    run = pool._run
    monkeypatch.setattr(pool, "_run", lambda *given: runs.append(1) or run(*given))
    handles = [RequestHandle() for _ in range(5)]
    with ThreadPoolExecutor(5) as threads:
        asked = [threads.submit(pool.trace, "step", request_for(**SLOW), handle) for handle in handles]
        until(lambda: all(t.in_flight and t.in_flight.waiting == 5 and t.in_flight.doing for t in handles))
        handles[0].left = True
        with pytest.raises(Abandoned):
            asked[0].result()
        assert len({one.result() for one in asked[1:]}) == 1
    assert len(runs) == 1 and not pool._in_flight


def test_a_trace_that_nobody_waits_for_is_ended_at_once(pool):
    handle = RequestHandle()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(pool.trace, "step", request_for(**SLOW, batch_size=3), handle)
        until(lambda: handle.in_flight and handle.in_flight.doing)
        handle.left = True
        with pytest.raises(Abandoned):
            asked.result()
    until(lambda: not pool._in_flight)
    assert pool.trace("step", request_for(), RequestHandle())


def children(of: int) -> list[int]:
    told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(of)], capture_output=True, text=True).stdout
    return [int(pid) for pid in told.split()]


def kill_at_work(handle: RequestHandle) -> InFlightTrace:
    """Kill the process that traces for a request, once it is at work; the trace it was running."""
    until(lambda: handle.in_flight and handle.in_flight.doing)
    in_flight = handle.in_flight
    in_flight.doing = ""
    for pid in children(forkserver._forkserver._forkserver_pid):
        os.kill(pid, signal.SIGKILL)
    return in_flight


@pytest.mark.parametrize("kills", [1, 2])
def test_a_killed_process_is_replaced_once_and_then_told_as_no_fault_of_the_job(pool, kills):
    handle, job = RequestHandle(), request_for(**SLOW, batch_size=4 + kills)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(pool.trace, "step", job, handle)
        for _ in range(kills):
            kill_at_work(handle)
        if kills == 1:
            assert Profile.load(asked.result()).facts["class"] == "LlamaForCausalLM"
        else:
            with pytest.raises(Ended, match="ended from outside, twice"):
                asked.result()
    assert pool.trace("step", request_for(), RequestHandle())


def test_a_killed_fork_server_is_replaced():
    pool = TracePool(slots=1)
    pool.ready()
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    assert pool.trace("step", request_for(), RequestHandle())
    pool.close()


def test_a_process_with_nothing_to_do_is_ended_and_a_dead_one_is_not_asked(monkeypatch):
    monkeypatch.setattr("vramplan.server.trace_pool.IDLE", 0.3)
    pool = TracePool(slots=1)
    pool.ready()
    (first,) = pool._workers
    os.kill(first._process.pid, signal.SIGKILL)
    until(lambda: not first.alive)
    assert pool.trace("step", request_for(), RequestHandle())
    (second,) = pool._workers
    assert second.requests_served == 1 and second.alive
    until(lambda: not pool._workers, 5)
    until(lambda: not second.alive)
    assert pool.trace("step", request_for(), RequestHandle())
    pool.close()


def test_limits_of_time_and_memory(pool):
    hasty = TracePool(slots=1, seconds=0.2)
    with pytest.raises(Limited, match="more than 0 s"):
        hasty.trace("step", request_for(**SLOW, batch_size=5), RequestHandle())
    hasty.close()
    poor = TracePool(slots=1, memory=1 << 20)
    with pytest.raises(Limited, match="MiB of this server's memory"):
        poor.trace("step", request_for(**SLOW, batch_size=6), RequestHandle())
    poor.close()


def test_a_full_queue_is_busy(pool, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(pool, "_run", lambda *_: gate.wait(60) and b"")
    with ThreadPoolExecutor(QUEUE_LIMIT + 1) as threads:
        asked = [
            threads.submit(pool.trace, "step", request_for(batch_size=n + 1), RequestHandle())
            for n in range(QUEUE_LIMIT + 1)
        ]
        until(lambda: pool.waiting == QUEUE_LIMIT)
        with pytest.raises(Busy):
            pool.trace("step", request_for(batch_size=QUEUE_LIMIT + 2), RequestHandle())
        gate.set()
        assert [one.result() for one in asked] == [b""] * (QUEUE_LIMIT + 1)


def test_abandoned_requests_hold_no_place_in_the_queue(pool, monkeypatch):
    gate, handles = threading.Event(), [RequestHandle() for _ in range(QUEUE_LIMIT + 1)]
    monkeypatch.setattr(pool, "_run", lambda *_: gate.wait(60) and b"")
    with ThreadPoolExecutor(QUEUE_LIMIT + 2) as threads:
        asked = [threads.submit(pool.trace, "step", request_for(batch_size=n + 1), t) for n, t in enumerate(handles)]
        until(lambda: pool.waiting == QUEUE_LIMIT)
        for handle in handles:
            handle.left = True
        assert all(isinstance(one.exception(), Abandoned) for one in asked)
        came = threads.submit(pool.trace, "step", request_for(batch_size=QUEUE_LIMIT + 2), RequestHandle())
        until(lambda: pool.waiting == 1)
        gate.set()
        assert came.result() == b""


def test_what_can_wait_is_run_when_nobody_waits(pool, monkeypatch):
    kept = {}
    monkeypatch.setattr(
        "vramplan.server.trace_pool.store_trace",
        lambda part, request, data: kept.setdefault(request.key, Profile.load(data)),
    )
    gate, started = threading.Event(), threading.Event()
    run = pool._run

    def first_held(*given):
        if not gate.is_set():
            started.set()
            gate.wait(60)
        return run(*given)

    monkeypatch.setattr(pool, "_run", first_held)
    job = request_for(batch_size=2)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(pool.trace, "step", job, RequestHandle())
        started.wait(60)
        pool.later("general", job)
        time.sleep(0.1)
        assert not kept
        gate.set()
        asked.result()
    until(lambda: kept)
    assert kept[job.key].covers_other_batches


def test_a_search_whose_client_leaves_finds_nothing():
    """Rather than that what was not traced any more does not fit: the answer would be remembered."""

    class Until(TracePool):
        def trace(self, *given):
            traced.append(given)
            if len(traced) > 1:
                raise Abandoned
            return InProcessTracer().trace(*given[:-1])

        later = trace

    traced = []
    runner = RequestRunner(local_files=False, pool=Until(slots=1))
    job = {
        "config": {**LLAMA, "hidden_size": 96, "vocab_size": 72},
        "method": "full",
        "trainer": "pytorch",
        "sequence_length": 32,
    }
    job |= {"gpu": {"name": "a card", "memory_bytes": 1 << 30}}
    with pytest.raises(Abandoned):
        anyio.run(runner.run, partial(solve, target="batch_size"), job)
    assert len(traced) == 2
