"""Plan jobs, each in a process of its own, and say what it took: ``python alone.py SECONDS BYTES [LANES]``.

A line of standard input is a list of jobs of one model, its answer a line with a list, in order. The parent is what a
server's traces are forked from (``vramplan.server.preload``), the allocator's rules compiled; a job is cold but for
that and, where a line has several, for the model's classes: they are imported once and counted for each. A process that
takes longer than ``SECONDS`` by the wall is killed, one that asks for more address space is refused it.
"""

import gc
import json
import os
import resource
import select
import sys
import tempfile
import time
from contextlib import suppress

import torch
from vramplan import usecases
from vramplan.dryrun.build.model import base_of
from vramplan.planning import estimate  # noqa: F401
from vramplan.server import preload as warmed

KEPT = ("model", "peak", "warnings")


def forked(say, seconds: float) -> dict:
    """What ``say()`` says in a forked process; ``seconds`` by the wall, ``cpu`` seconds and ``rss`` bytes."""
    reader, writer = os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        with suppress(BaseException), open(writer, "wb") as out:
            out.write(json.dumps(say()).encode())
        os._exit(0)
    os.close(writer)
    data = b""
    while True:
        if not select.select([reader], [], [], max(0.0, start + seconds - time.monotonic()))[0]:
            os.kill(pid, 9)
            break
        chunk = os.read(reader, 1 << 20)
        if not chunk:
            break
        data += chunk
    os.close(reader)
    _, status, usage = os.wait4(pid, 0)
    took = {"seconds": time.monotonic() - start, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss << 10}
    return took | (json.loads(data) if data else {"died": status})


def planned(job, limit: int) -> dict:
    """The answer, cut short, or the error."""
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        answer = usecases.plan(job)
        return {key: answer[key] for key in KEPT}
    except usecases.PlanError as error:
        return {"error": error.as_dict() | {"type": type(error).__name__}}


def family(jobs: list, seconds: float, limit: int) -> list[dict]:
    """The answers to the jobs of one model."""
    shared = 0.0
    if len(jobs) > 1:
        start = time.process_time()
        with suppress(usecases.PlanError):
            base_of(jobs[0]["config"], None, "bfloat16", None)
        gc.collect()
        gc.freeze()
        shared = time.process_time() - start
    answers = [forked(lambda: planned(job, limit), seconds) for job in jobs]
    return [answer | {"cpu": answer["cpu"] + shared} for answer in answers]


def lane(lines: list[str], seconds: float, limit: int, out) -> None:
    for line in lines:
        sys.setrecursionlimit(20_000)  # json.loads: hostile jobs are nested deeply
        jobs = json.loads(line)
        sys.setrecursionlimit(1000)
        said = forked(lambda: {"answers": family(jobs, seconds, limit)}, 2 * seconds * len(jobs))
        sys.setrecursionlimit(20_000)
        out.write(json.dumps(said.get("answers", [said] * len(jobs))) + "\n")
        out.flush()


def main(seconds: float, limit: int, lanes: int) -> None:
    torch.set_num_threads(1)
    usecases.plan({"config": warmed.CONFIG, "sequence_length": 16})
    gc.collect()
    gc.freeze()
    lines = sys.stdin.readlines()
    said = [tempfile.TemporaryFile("w+") for _ in range(lanes)]
    pids = []
    for number, out in enumerate(said):
        pid = os.fork()
        if not pid:
            lane(lines[number::lanes], seconds, limit, out)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    for out in said:
        out.seek(0)
    answers = [out.readlines() for out in said]
    for number in range(len(lines)):
        print(answers[number % lanes][number // lanes], end="")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
