"""Plan each job of standard input in a process of its own and say what it took: a line a job, in order.

The parent is what a server's traces are forked from (``app.warmed``); a child is cold but for that. ``python alone.py
SECONDS BYTES``: a child that takes longer is killed, one that asks for more address space is refused it.
"""

import json
import os
import resource
import select
import sys
import time

import torch

import app.batch
import app.service
import app.warmed  # noqa: F401

KEPT = ("model", "peak", "warnings")


def child(job, into: int, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        answer = app.batch.plan(job)
        out = {key: answer[key] for key in KEPT}
    except app.batch.PlanError as error:
        out = {"error": error.as_dict() | {"type": type(error).__name__}}
    os.write(into, json.dumps(out).encode())


def alone(job, seconds: float, limit: int) -> dict:
    """The answer, cut short, or the error; ``seconds`` by the wall, ``cpu`` seconds and ``rss`` bytes."""
    reader, writer = os.pipe()
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        try:
            child(job, writer, limit)
        finally:
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.setrecursionlimit(20_000)  # json.loads: hostile jobs are nested deeply
    for line in sys.stdin:
        job = json.loads(line)
        sys.setrecursionlimit(1000)
        print(json.dumps(alone(job, float(sys.argv[1]), int(sys.argv[2]))), flush=True)
        sys.setrecursionlimit(20_000)
