"""Profiles on disk: found again, safe under many processes, bounded, and rebuilt when damaged."""

from __future__ import annotations

import gc
import json
import os
import random
import sqlite3
import subprocess
import sys
import weakref

import pytest
from vramplan.errors import Limited
from vramplan.job import read_job
from vramplan.memory.profile import Profile
from vramplan.memory.summary import MemorySummary
from vramplan.planning import fingerprint, planned_job, profile_cache, tracer
from vramplan.planning.estimate import estimate
from vramplan.planning.profile_store import Store
from vramplan.planning.resolve import card_of, config_of, shape_point_of

from tests.tiny import LLAMA

JOB = {"config": LLAMA, "method": "lora", "trainer": "pytorch", "sequence_length": 32, "gpu": "rtx-4090"}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "profiles.db")


def test_what_is_kept_is_found_again(store):
    assert store.get("a") == []
    store.put("a", b"one", 240)
    store.put("a", b"two", 240)
    store.put("a", b"one", 240)
    store.put("b", b"three", 240)
    again = Store(store.path)
    assert sorted(again.get("a")) == [b"one", b"two"] and again.get("b") == [b"three"]


def test_what_was_not_asked_for_longest_goes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("vramplan.planning.profile_store.time.time", lambda: now[0])
    store = Store(tmp_path / "profiles.db", limit=10_000)
    for name in "abc":
        now[0] += 10_000
        store.put(name, name.encode() * 3000, 240)
    now[0] += 10_000
    assert store.get("a")
    store.put("d", b"d" * 3000, 240)
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]


def test_of_one_kind_the_latest_stay(store):
    for number in range(9):
        store.put("a", b"%d" % number, 4)
    store.put("b", b"one", 4)
    assert sorted(store.get("a")) == [b"5", b"6", b"7", b"8"] and store.get("b") == [b"one"]


@pytest.mark.parametrize("damage", [b"", b"no database at all", b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_begun_anew(store, damage):
    store.put("a", b"one", 240)
    del store._local.base, store._local.process
    for name in os.listdir(store.path.parent):
        (store.path.parent / name).unlink()
    store.path.write_bytes(damage)
    store.get("a")
    store.put("a", b"two", 240)
    store.put("a", b"two", 240)
    assert Store(store.path).get("a") == [b"two"]


def filled(store) -> bytes:
    """A store of many entries, closed; the bytes of its file."""
    for number in range(40):
        store.put(f"kind {number}", os.urandom(600), 240)
    store._close()
    with sqlite3.connect(store.path) as base:
        base.execute("pragma wal_checkpoint(truncate)")
    base.close()
    return store.path.read_bytes()


def damages(whole: bytes):
    """The bytes of a file, damaged in every way that has a name, and at 100 places by chance (seeded)."""
    yield whole[: len(whole) // 2]
    yield whole[:100] + b"\0" * 3996 + whole[4096:]
    yield whole.replace(b"create table entries", b"create table entriex")
    yield whole.replace(b"digest", b"\xff\xfe\xfd\xfc\xfb\xfa")
    chance = random.Random(23)
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 20, 400))):
            damaged[chance.randrange(chance.choice((200, len(whole))))] = chance.randrange(256)
        yield bytes(damaged)


def test_whatever_is_damaged_no_wrong_byte_is_read_and_the_next_is_kept(store):
    """400 random bytes ended planning for good: UnicodeDecodeError."""
    whole = filled(store)
    right = {name: Store(store.path).get(name) for name in (f"kind {number}" for number in range(40))}
    for number, damaged in enumerate(damages(whole)):
        path = store.path.parent / f"{number}.db"
        path.write_bytes(damaged)
        hurt = Store(path)
        assert all(hurt.get(name) in ([], data) for name, data in right.items())
        hurt.put("new", b"one", 240)
        hurt.put("new", b"one", 240)
        hurt._close()
        assert Store(path).get("new") == [b"one"], number


def test_a_file_of_another_version_is_put_aside(store):
    with sqlite3.connect(store.path) as base:
        base.execute("create table entries (name text)")
    base.close()
    store.put("a", b"one", 240)
    assert store.get("a") == [b"one"] and (store.path.parent / "profiles.db.damaged").exists()


def test_an_entry_that_is_not_what_was_stored_counts_as_absent(store):
    store.put("a", b"one", 240)
    store.put("a", b"two", 240)
    with sqlite3.connect(store.path) as base:
        base.execute("update entries set data = ? where data = ?", (b"2wo", b"two"))
    base.close()
    assert store.get("a") == [b"one"]


def test_a_place_that_cannot_be_written_holds_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "profiles.db")
    store.put("a", b"one", 240)
    assert store.get("a") == []


def test_many_processes_write_one_file(store):
    code = """
import sys
from pathlib import Path
from vramplan.planning.profile_store import Store
store = Store(Path(sys.argv[1]))
for number in range(60):
    store.put("all", f"{sys.argv[2]} {number}".encode(), 240)
    store.get("all")
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(store.path), str(who)]) for who in range(4)]
    assert [process.wait(120) for process in running] == [0] * 4
    assert len(store.get("all")) == 240


def fresh(monkeypatch, store):
    """Nothing is known but what the store holds."""
    monkeypatch.setattr(profile_cache, "_profiles", profile_cache.ProfileCache())
    store.key = fingerprint.cache_key
    profile_cache._profiles.own = store
    for cached in (profile_cache.concrete_at, planned_job._summary, planned_job._verdict, planned_job._finish):
        cached.cache_clear()


def traces(monkeypatch) -> list[str]:
    """The parts that are traced from now on."""
    parts = []
    real = tracer.InProcessTracer.trace
    monkeypatch.setattr(
        tracer.InProcessTracer, "trace", lambda self, part, *order: parts.append(part) or real(self, part, *order)
    )
    return parts


@pytest.mark.traces
def test_what_is_remembered_of_a_job_keeps_no_profile(store, monkeypatch):
    """10,000 jobs on 59 cards are 4096 verdicts, each of a profile of up to two megabytes."""
    fresh(monkeypatch, store)
    estimate(JOB)
    profiles = [weakref.ref(one) for kind in profile_cache._profiles._kinds.values() for one in kind.values()]
    assert planned_job._verdict.cache_info().currsize > 10 and planned_job._summary.cache_info().currsize == 1
    profile_cache._profiles._kinds.clear()
    profile_cache.concrete_at.cache_clear()
    planned_job._finish.cache_clear()
    gc.collect()
    assert len(profiles) > 1 and not any(one() for one in profiles)


@pytest.mark.traces
def test_a_stored_job_is_answered_without_a_trace_and_without_torch(store, monkeypatch):
    fresh(monkeypatch, store)
    first = estimate(JOB)
    fresh(monkeypatch, store)
    monkeypatch.setattr(tracer.InProcessTracer, "trace", lambda *_: pytest.fail("it was traced again"))
    assert estimate(JOB) == first
    code = """
import json, sys
from pathlib import Path
from vramplan.planning import profile_cache
from vramplan.planning.fingerprint import cache_key
from vramplan.planning.profile_store import Store
profile_cache._profiles.own = Store(Path(sys.argv[1]), key=cache_key)
from vramplan.planning.estimate import estimate
print(json.dumps(estimate(json.loads(sys.argv[2]))))
assert not {"torch", "transformers", "numba", "fastapi"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.path), json.dumps(JOB)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == json.loads(json.dumps(first))


@pytest.mark.traces
def test_a_damaged_entry_is_traced_again(store, monkeypatch):
    fresh(monkeypatch, store)
    first = estimate(JOB)
    with sqlite3.connect(store.path) as base:
        base.execute("update entries set data = substr(data, 1, length(data) / 2)")
    base.close()
    fresh(monkeypatch, store)
    assert estimate(JOB) == first


@pytest.mark.traces
def test_another_engine_s_entries_are_not_found(store, monkeypatch):
    fresh(monkeypatch, store)
    estimate(JOB)
    fresh(monkeypatch, store)
    monkeypatch.setattr(fingerprint, "code_digest", lambda: "another")
    traced = traces(monkeypatch)
    estimate(JOB)
    assert "step" in traced


@pytest.mark.traces
def test_a_limit_of_this_machine_is_not_remembered(store, monkeypatch):
    """Rather than that nothing can be said of what follows this training, ever after."""
    fresh(monkeypatch, store)
    real = tracer.InProcessTracer.trace

    def limited(self, part, *order):
        if part == "finish":
            raise Limited("it takes too long here")
        return real(self, part, *order)

    with monkeypatch.context() as first:
        first.setattr(tracer.InProcessTracer, "trace", limited)
        assert estimate(JOB)["after"] is None
    fresh(monkeypatch, store)
    assert estimate(JOB)["after"] is not None


WINDOW = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 96}


def ask(length: int) -> str:
    """A length of one kind: what it is stored under."""
    job = read_job({"config": WINDOW, "method": "full", "trainer": "pytorch", "sequence_length": length}).resolved()
    card = card_of(job)
    assert profile_cache.profile_of(job, WINDOW, card).template.holds(shape_point_of(job, card))
    return tracer.request_of(job, WINDOW, card).key


@pytest.mark.traces
def test_a_region_of_its_own_is_not_taken_for_a_narrow_one(store, monkeypatch):
    """Lengths below a sliding window, and above: what holds for the former was said to hold for few of the latter."""
    fresh(monkeypatch, store)
    parts = traces(monkeypatch)
    for length in (40, 41, 42, 44, 48, 49, 50, 128, 129, 130, 131, 132, 133, 136, 140, 141):
        ask(length)
    assert parts[:4] == ["step"] * 4 and set(parts[4:]) == {"general"} and len(parts) < 12
    before = len(parts)
    for length in (43, 51, 52, 56, 134, 135, 137, 144, 152):
        ask(length)
    assert len(parts) == before


@pytest.mark.traces
def test_no_more_of_a_kind_are_in_memory_than_are_kept(store, monkeypatch):
    fresh(monkeypatch, store)
    monkeypatch.setattr(profile_cache, "POINT_PROFILES_BEFORE_GENERAL", 2)
    monkeypatch.setattr(profile_cache, "TRACES_PER_KIND", 3)
    parts = traces(monkeypatch)
    for length in (40, 41, 42, 44, 128, 129, 132):
        kind = ask(length)
    assert len(parts) > 3
    (here,) = profile_cache._profiles._kinds.values()
    assert len(here) == len(store.get(kind)) == 3
    assert sum(profile.covers_other_batches for profile in here.values()) == min(parts.count("general"), 3)


@pytest.mark.traces
def test_profiles_and_readings_are_bytes_and_back(store, monkeypatch):
    fresh(monkeypatch, store)
    estimate(JOB)
    job = read_job(JOB).resolved()
    config, card = config_of(job)[0], card_of(job)
    profile = profile_cache.profile_of(job, config, card)
    assert Profile.load(profile.dump()).dump() == profile.dump()
    from vramplan.planning.planned_job import plan_job

    summary = plan_job(read_job(JOB)).summary
    assert MemorySummary.load(summary.dump()) == summary
    for bad in (b"", b"nothing", summary.dump()[:100]):
        with pytest.raises(ValueError):
            MemorySummary.load(bad)
