"""What a plan costs, side by side with what it is measured against, in one run: ``python benchmarks/run.py``.

Writes the table between the marks in the README. References: ``accelerate``'s own imports and meta build of the same
model, as a process; and an endpoint of the same server that does nothing (``/health``). ``--jobs N``: how many
different jobs the server is asked (10,000 take some minutes).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vramplan.planning import pretrace
from vramplan.planning.cards import every_card

ROOT = Path(__file__).resolve().parents[1]
MODEL = "llama-3.1-8b"
QUESTION = {**pretrace.QUESTION, "gpu": "a100-80gb"}
REFERENCE = """
import accelerate.commands.estimate
from accelerate import init_empty_weights
from accelerate.utils import calculate_maximum_sizes
from transformers import AutoConfig, AutoModelForCausalLM
from vramplan.catalog.models import find_model
with init_empty_weights():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**find_model("%s").config))
print(calculate_maximum_sizes(model))
"""
UNTRACED = """
import json, statistics, sys, time
import vramplan.server.preload
from app import plan
from vramplan.job import read_job
question = json.loads(sys.argv[1])
def seconds(name):
    job = read_job({**question, "model": name}).resolved()
    order = plan.request_of(job, plan.config_of(job)[0], plan.card_of(job))
    start = time.perf_counter()
    plan.Here().trace("step", *order)
    return time.perf_counter() - start
names = sys.argv[2:]
runs = [[seconds(name) for name in names] for _ in range(4)][1:]
print(json.dumps([statistics.median(run) for run in zip(*runs)]))
"""
ANOTHER = """
import json, statistics, sys, time
from vramplan.job import read_job
from vramplan.memory.summary import read
from vramplan.planning.planned_job import weigh
from vramplan.planning.resolve import Here, card_of, config_of, keep, request_of
question = json.loads(sys.argv[1])
for name in sys.argv[2:]:
    job = read_job({**question, "model": name, "batch_size": 2}).resolved()
    order = request_of(job, config_of(job)[0], card_of(job))
    keep("general", order[0], Here().trace("general", *order))
    took = []
    for number in range(41):
        other = {**question, "model": name, "batch_size": 2 + number % 5, "sequence_length": 512 + 64 * number}
        start = time.perf_counter()
        read(weigh(read_job(other)).stream)
        took.append(time.perf_counter() - start)
    print(json.dumps(statistics.median(took[1:])))
"""


def process(*command: str, **environment: str) -> tuple[float, str]:
    """Seconds that a process took, by the wall, and what it said."""
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return time.perf_counter() - start, done.stdout


def cold() -> tuple[float, float]:
    """The command line on a job of the catalogue, and the reference: medians of seven, in turn."""
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vramplan", "estimate", MODEL, "-m", "qlora"]
        for _ in range(8):
            theirs.append(process(sys.executable, "-c", REFERENCE % MODEL)[0])
            ours.append(process(*command, VRAMPLAN_CACHE=folder)[0])
    return statistics.median(ours[1:]), statistics.median(theirs[1:])


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: bytes) -> bytes:
    """One request on a connection that stays open, a POST where it has a body: the status line of its answer."""
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nhost: x\r\naccept-encoding: gzip\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(re.search(rb"content-length: (\d+)", answer, re.I)[1]))
    return answer.split(b"\r\n", 1)[0]


async def storm(port: int, path: str, bodies: list[bytes], clients: int, seconds: float) -> tuple[float, float]:
    """Requests a second of so many clients on connections that stay open, and the time that 99 % of them took."""
    took: list[float] = []
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        turn = number
        while time.perf_counter() < end:
            body = bodies[turn % len(bodies)]
            turn += 1
            start = time.perf_counter()
            status = await ask(reader, writer, path, body)
            assert b" 200 " in status, status
            took.append(time.perf_counter() - start)
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    return len(took) / (time.perf_counter() - start), statistics.quantiles(took, n=100)[98]


async def each_once(port: int, bodies: list[bytes], clients: int, path: str = "/estimate") -> None:
    """Post each body once, from so many clients at a time."""
    waiting = iter(bodies)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in waiting:
            await ask(reader, writer, path, body)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))


def memory(pid: int) -> int:
    """Bytes of a process and of all that it started: each page counted once (PSS)."""
    total, tree = 0, [pid]
    while tree:
        one = tree.pop()
        told = Path(f"/proc/{one}/smaps_rollup").read_text()
        total += int(re.search(r"^Pss:\s+(\d+)", told, re.M)[1]) << 10
        tree += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return total


def server(jobs: int) -> dict[str, float]:
    """What a running server takes: seconds by row of the table."""

    def body(model: str, batch: int, length: int) -> bytes:
        job = {**QUESTION, "model": model, "batch_size": batch, "sequence_length": length}
        return json.dumps(job).encode()

    port = 8765
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "VRAMPLAN_CACHE": folder}
        serve = [sys.executable, "-m", "vramplan", "serve", "--port", str(port)]
        running = subprocess.Popen(
            serve, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            for _ in range(600):
                try:
                    asyncio.run(storm(port, "/health", [b""], 2, 0.2))
                    break
                except OSError:
                    time.sleep(0.1)
            models = ["llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "mistral-7b", "qwen2.5-7b"]
            warm = [body(model, batch, 1024) for model in models for batch in range(2, 8)]
            asyncio.run(each_once(port, warm, 1))
            time.sleep(30)  # what is traced ahead
            empty, planned = [], []
            for _ in range(3):
                empty.append(asyncio.run(storm(port, "/health", [b""], 32, 4)))
                planned.append(asyncio.run(storm(port, "/estimate", warm, 32, 4)))
            out = {}
            for turn, reserve in (("traced", 0), ("searched", 1 << 20), ("remembered", 1 << 20)):
                rows = [{**QUESTION, "model": MODEL, "gpu": card.key, "reserve": reserve} for card in every_card()]
                start = time.perf_counter()
                for target, step in (("batch_size", 1), ("sequence_length", 8)):
                    bodies = [json.dumps({**row, "multiple_of": step}).encode() for row in rows]
                    asyncio.run(each_once(port, bodies, 2, f"/solve?for={target}"))
                out[turn] = time.perf_counter() - start
            asyncio.run(each_once(port, warm, 4))
            out["before"] = memory(running.pid)
            many = [body(models[n % len(models)], 2 + n // 5 % 40, 256 + 16 * (n // 200)) for n in range(jobs)]
            start = time.perf_counter()
            asyncio.run(each_once(port, many, 4))
            out |= {"jobs": jobs, "each": (time.perf_counter() - start) / jobs, "after": memory(running.pid)}
        finally:
            running.terminate()
            running.wait()
    out["empty"], out["empty_p99"] = map(statistics.median, zip(*empty, strict=True))
    out["planned"], out["planned_p99"] = map(statistics.median, zip(*planned, strict=True))
    return out


def main() -> None:
    """Measure everything, and write the table into the README."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=10_000)
    asked = parser.parse_args()
    rows = []

    def row(what: str, figure: str, reference: str, ratio: float | None) -> None:
        rows.append(f"| {what} | {figure} | {reference} | {'' if ratio is None else f'{ratio:.2f}'} |")
        print(rows[-1], flush=True)

    ours, theirs = cold()
    row(
        f"`vramplan estimate {MODEL} -m qlora`, a whole process",
        f"{ours:.2f} s", f"accelerate's imports and meta build: {theirs:.2f} s", ours / theirs,
    )  # fmt: skip
    names = ["llama-3.2-1b", "llama-3.1-70b", "llama-3.1-405b"]
    with tempfile.TemporaryDirectory() as folder:
        told = process(sys.executable, "-c", UNTRACED, json.dumps(QUESTION), *names, VRAMPLAN_CACHE=folder)[1]
    small, deep, deepest = json.loads(told.splitlines()[-1])
    row("QLoRA of 1B that nobody traced, after imports", f"{small:.2f} s", "", None)
    row("the same of 70B", f"{deep:.2f} s", "of 1B", deep / small)
    row("the same of 405B", f"{deepest:.2f} s", "of 1B", deepest / small)
    names = ["llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b"]
    with tempfile.TemporaryDirectory() as folder:
        told = process(sys.executable, "-c", ANOTHER, json.dumps(QUESTION), *names, VRAMPLAN_CACHE=folder)[1]
    for name, seconds in zip(names, told.split(), strict=True):
        row(f"another batch and length of {name}, traced", f"{1000 * float(seconds):.1f} ms", "", None)
    told = server(asked.jobs)
    row(
        "warm `POST /estimate`, 32 clients", f"{told['planned']:.0f} a second",
        f"`/health`: {told['empty']:.0f} a second", told["planned"] / told["empty"],
    )  # fmt: skip
    row(
        "99 % of them within", f"{1000 * told['planned_p99']:.0f} ms",
        f"`/health`: {1000 * told['empty_p99']:.0f} ms", told["planned_p99"] / told["empty_p99"],
    )  # fmt: skip
    row(
        f"{told['jobs']} different jobs, four clients", f"{1000 * told['each']:.1f} ms each", "", None,
    )  # fmt: skip
    row(
        "the server and its workers after them", f"{told['after'] / 2**20:.0f} MiB",
        f"before: {told['before'] / 2**20:.0f} MiB", told["after"] / told["before"],
    )  # fmt: skip
    row(
        f"largest batch and length of {MODEL} on each of {len(every_card())} cards, asked again",
        f"{1000 * told['remembered']:.0f} ms", f"asked the first time: {told['searched']:.1f} s",
        told["remembered"] / told["searched"],
    )  # fmt: skip
    readme = ROOT / "README.md"
    table = "\n".join(["| what | takes | beside | ratio |", "| --- | --: | --- | --: |", *rows])
    text = re.sub(r"(<!-- speed -->\n).*?(<!-- end -->)", rf"\1{table}\n\2", readme.read_text(), flags=re.S)
    readme.write_text(text)


if __name__ == "__main__":
    main()
