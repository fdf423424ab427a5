"""Profiles on disk: found again, safe under many processes, bounded, and rebuilt when damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from app import plan
from app.job import read_job
from app.memory.breakdown import Reading
from app.memory.profile import Profile
from app.service import estimate
from app.store import Store
from tests.tiny import LLAMA

JOB = {"config": LLAMA, "method": "lora", "sequence_length": 32, "gpu": "rtx-4090"}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "profiles.db")


def test_what_is_kept_is_found_again(store):
    assert store.get("a") == []
    store.put("a", b"one")
    store.put("a", b"two")
    store.put("a", b"one")
    store.put("b", b"three")
    again = Store(store.path)
    assert sorted(again.get("a")) == [b"one", b"two"] and again.get("b") == [b"three"]


def test_what_was_not_asked_for_longest_goes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("app.store.time.time", lambda: now[0])
    store = Store(tmp_path / "profiles.db", limit=10_000)
    for name in "abc":
        now[0] += 10_000
        store.put(name, name.encode() * 3000)
    now[0] += 10_000
    assert store.get("a")
    store.put("d", b"d" * 3000)
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]


@pytest.mark.parametrize("damage", [b"", b"no database at all", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_begun_anew(store, damage):
    store.put("a", b"one")
    del store._local.base, store._local.process
    for name in os.listdir(store.path.parent):
        (store.path.parent / name).unlink()
    store.path.write_bytes(damage)
    store.get("a")
    store.put("a", b"two")
    store.put("a", b"two")
    assert Store(store.path).get("a") == [b"two"]


def test_a_place_that_cannot_be_written_holds_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "profiles.db")
    store.put("a", b"one")
    assert store.get("a") == []


def test_many_processes_write_one_file(store):
    code = """
import sys
from pathlib import Path
from app.store import Store
store = Store(Path(sys.argv[1]))
for number in range(60):
    store.put("all", f"{sys.argv[2]} {number}".encode())
    store.get("all")
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(store.path), str(who)]) for who in range(4)]
    assert [process.wait(120) for process in running] == [0] * 4
    assert len(store.get("all")) == 240


def fresh(monkeypatch, store):
    """Nothing is known but what the store holds."""
    monkeypatch.setattr(plan, "_shelf", plan._Shelf())
    plan._shelf.own = store
    for cached in ("_stream", "_reading", "_verdict", "_finish"):
        getattr(__import__("app.weigh", fromlist=[cached]), cached).cache_clear()


def test_a_stored_job_is_answered_without_a_trace_and_without_torch(store, monkeypatch):
    fresh(monkeypatch, store)
    first = estimate(JOB)
    fresh(monkeypatch, store)
    monkeypatch.setattr(plan.Here, "trace", lambda *_: pytest.fail("it was traced again"))
    assert estimate(JOB) == first
    code = """
import json, sys
from pathlib import Path
from app import plan
from app.store import Store
plan._shelf.own = Store(Path(sys.argv[1]))
from app.service import estimate
print(json.dumps(estimate(json.loads(sys.argv[2]))))
assert not {"torch", "transformers", "numba", "fastapi"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.path), json.dumps(JOB)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == json.loads(json.dumps(first))


def test_a_damaged_entry_is_traced_again(store, monkeypatch):
    fresh(monkeypatch, store)
    first = estimate(JOB)
    import sqlite3

    with sqlite3.connect(store.path) as base:
        base.execute("update entries set data = substr(data, 1, length(data) / 2)")
    base.close()
    fresh(monkeypatch, store)
    assert estimate(JOB) == first


def test_another_engine_s_entries_are_not_found(store, monkeypatch):
    fresh(monkeypatch, store)
    estimate(JOB)
    fresh(monkeypatch, store)
    monkeypatch.setattr(plan, "engine", lambda: "another")
    traced = []
    real = plan.Here.trace
    monkeypatch.setattr(plan.Here, "trace", lambda self, part, *order: traced.append(part) or real(self, part, *order))
    estimate(JOB)
    assert "step" in traced


def test_profiles_and_readings_are_bytes_and_back(store, monkeypatch):
    fresh(monkeypatch, store)
    estimate(JOB)
    job = read_job(JOB).resolved()
    config, card = plan.config_of(job)[0], plan.card_of(job)
    profile = plan.profile_of(job, config, card)
    assert Profile.load(profile.dump()).dump() == profile.dump()
    from app.weigh import weigh

    reading = weigh(read_job(JOB)).reading
    assert Reading.load(reading.dump()) == reading
    for bad in (b"", b"nothing", reading.dump()[:100]):
        with pytest.raises(ValueError):
            Reading.load(bad)
