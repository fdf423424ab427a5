"""The jobs that were traced ahead (``make pretrace``): all there, of this engine, and equal to a fresh trace."""

import pytest
from vramplan.form import to_job
from vramplan.job import read_job
from vramplan.memory.profile import Profile
from vramplan.memory.summary import summarize
from vramplan.planning import pretrace, profile_cache, resolve, tracer
from vramplan.render.html import EXAMPLES, FIRST_VISIT

JOBS = pretrace.usual_jobs()
SAMPLE = [job for job in JOBS if job["model"] in ("llama-3.2-1b", "gpt2")]


def request_of(job):
    job = read_job(job).resolved()
    return tracer.request_of(job, resolve.config_of(job)[0], resolve.card_of(job))


def shape_point_of(order):
    return resolve.shape_point_of(order.job, resolve.card_of(order.job))


def stored(key: str) -> list[bytes]:
    return profile_cache.shipped(key)


def test_all_usual_jobs_are_there():
    """Not so after a change of the engine: then ``make pretrace``."""
    missing = []
    for job in JOBS:
        order = request_of(job)
        if not any(Profile.load(data).template.holds(shape_point_of(order)) for data in stored(order.key)):
            missing.append(f"{job['model']} {job['method']}")
    assert missing == [] and profile_cache.SHIPPED.stat().st_size < 8 << 20


def test_what_the_page_shows_first_is_among_them():
    usual = [(order.key, shape_point_of(order)) for order in map(request_of, JOBS)]
    for shown in (FIRST_VISIT, *EXAMPLES.values()):
        order = request_of(to_job(shown.items()))
        assert (order.key, shape_point_of(order)) in usual


@pytest.mark.parametrize("job", SAMPLE, ids=lambda job: f"{job['model']}-{job['method']}")
def test_a_fresh_trace_is_what_is_stored(job):
    order = request_of(job)
    assert tracer.InProcessTracer().trace("general", order) in stored(order.key)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job['model']}-{job['method']}")
def test_every_fresh_trace_is_what_is_stored(job):
    """The file is keyed by the job and by a format alone: that it is still what the code traces is tested here."""
    test_a_fresh_trace_is_what_is_stored(job)


def test_what_was_read_ahead_is_what_a_replay_shows(monkeypatch):
    """A command finds the reading there and imports no allocator."""
    for job in SAMPLE[:3]:
        order = request_of(job)
        point = shape_point_of(order)
        profiles = [Profile.load(data) for data in stored(order.key)]
        profile = next(profile for profile in profiles if profile.template.holds(point))
        settings = resolve.allocator_config_of(order.job)
        concrete = profile.template.at(point)
        with monkeypatch.context() as now:
            now.setattr(profile_cache, "summarize", lambda *_: pytest.fail("not there"))
            found = profile_cache.summary_of(concrete, settings)
        assert found == summarize(concrete, settings)
