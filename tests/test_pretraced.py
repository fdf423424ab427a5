"""The jobs that were traced ahead (``make pretrace``): all there, of this engine, and equal to a fresh trace."""

import pytest

from app import plan, pretrace
from app.form import to_job
from app.job import read_job
from app.memory.breakdown import read
from app.memory.profile import Profile
from app.render.html import EXAMPLES, FIRST_VISIT

JOBS = pretrace.usual_jobs()
SAMPLE = [job for job in JOBS if job["model"] in ("llama-3.2-1b", "gpt2", "gemma-2-2b")]


def order_of(job):
    job = read_job(job).resolved()
    return plan.order_of(job, plan.config_of(job)[0], plan.card_of(job))


def place_of(order):
    return plan.place_of(order[1], plan.card_of(order[1]))


def stored(key: str) -> list[bytes]:
    return plan._pretraced.get(plan._digest(key))


def test_all_usual_jobs_are_there():
    """Not so after a change of the engine: then ``make pretrace``."""
    missing = []
    for job in JOBS:
        order = order_of(job)
        if not any(Profile.load(data).script.holds(*place_of(order)) for data in stored(order[0])):
            missing.append(f"{job['model']} {job['method']}")
    assert missing == [] and plan.PRETRACED.stat().st_size < 8 << 20


def test_what_the_page_shows_first_is_among_them():
    usual = [(order[0], place_of(order)) for order in map(order_of, JOBS)]
    for shown in (FIRST_VISIT, *EXAMPLES.values()):
        order = order_of(to_job(shown.items()))
        assert (order[0], place_of(order)) in usual


@pytest.mark.parametrize("job", SAMPLE, ids=lambda job: f"{job['model']}-{job['method']}")
def test_a_fresh_trace_is_what_is_stored(job):
    order = order_of(job)
    assert plan.Here().trace("general", *order) in stored(order[0])


def test_what_was_read_ahead_is_what_a_replay_shows(monkeypatch):
    """A command finds the reading there and imports no allocator."""
    for job in SAMPLE[:3]:
        order = order_of(job)
        point = place_of(order)
        profiles = [Profile.load(data) for data in stored(order[0])]
        profile = next(profile for profile in profiles if profile.script.holds(*point))
        settings = plan.settings_of(order[1])
        stream = profile.script.at(*point)
        with monkeypatch.context() as now:
            now.setattr(plan, "read", lambda *_: pytest.fail("not there"))
            found = plan.reading_of(stream, settings)
        assert found == read(stream, settings)
