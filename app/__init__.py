"""vramplan: will it fit? The memory of one training step on a GPU, from config.json alone.

The way of a request, which is also the direction of the imports::

    cli, server/    how it is asked: a terminal, HTTP, a page
    api             how it is asked from Python
    render/         how an answer looks: words, terminal, HTML, pictures
    schema          the answer's fields, typed, as the API documents them
    usecases        what can be asked; whatever goes wrong leaves as a PlanError
    probe/          the same job on a real GPU, beside its plan
    script/         the user's own training script, on a card that is not there (needs torch)
    serving/        what an engine's server takes of a card, read off the command that starts it
    planning/       from a job to its profile, to verdicts on cards, to the largest job and to advice
    form            a job as flat text
    hub/            config.json from the Hub, at a pinned commit
    dryrun/         the user's own step on the meta device, every allocation recorded (needs torch)
    memory/         that step for every batch and length of its kind: allocator, peak, parts, verdict
    catalog/        GPUs and models as tables of facts
    job             the schema of a job
    registry/       what a job can name: optimisers, trainers, quantisers, strategies; no torch
    resources, progress, errors
                    the package's data; word of what is being done; the one error

Examples::

    >>> import vramplan
    >>> answer = vramplan.plan({"model": "llama-3.1-8b", "method": "qlora", "gpu": "rtx-4090"})
    >>> answer.fits[0].verdict
    'fits'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import advise, compare, plan, solve
    from .errors import PlanError
    from .job import Job
    from .schema import Answer

__version__ = "0.2.0"
__all__ = ["Answer", "Job", "PlanError", "advise", "compare", "plan", "solve"]
_HOME = {"Answer": "schema", "Job": "job", "PlanError": "errors"}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first asked for: importing the package costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_HOME.get(name, 'api')}", __name__), name)
    return value
