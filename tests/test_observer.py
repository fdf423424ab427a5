"""Every observer of a step has what the steps call."""

import inspect
import types

import pytest
from vramplan.dryrun.cuda.card_facts import Card
from vramplan.dryrun.observer import StepObserver
from vramplan.dryrun.tracker import MemoryTracker
from vramplan.job import Job
from vramplan.probe.recorder import Recorder

METER = types.SimpleNamespace(device="cpu")
JOB = Job(config={}, method="full", sequence_length=8)
METHODS = [name for name, value in vars(StepObserver).items() if inspect.isfunction(value) and name[0] != "_"]


@pytest.mark.parametrize("observer", [MemoryTracker(Card()), Recorder(METER, JOB, print)], ids=["tracker", "recorder"])
def test_an_observer_has_every_member_of_the_protocol(observer):
    for name in (*StepObserver.__annotations__, "images", "values"):
        assert hasattr(observer, name), name
    for name in METHODS:
        expected = inspect.signature(vars(StepObserver)[name]).parameters
        assert list(inspect.signature(getattr(type(observer), name)).parameters) == list(expected), name
