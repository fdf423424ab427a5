"""vramplan: will it fit? The memory of one training step on a GPU, from config.json alone.

The way of a request, which is also the direction of the imports::

    cli, web        how it is asked: a terminal, HTTP, a page
    render/         how an answer looks: words, terminal, HTML, CSV
    answer          the answer's fields, typed, as the HTTP API documents them
    batch           many jobs, one answer or one error each
    form            a job as flat text
    service         the use case that all begins with: a job in, a plain answer out
    solver          the largest job that fits, the smallest card, the largest model
    advice          the changes of a job that make it fit, planned
    compare         jobs side by side
    weigh, cards    a job held against cards; what room a card has
    plan            a job's profile, kept by everything that shapes it
    hub             config.json from the Hub, at a pinned commit
    dryrun/         the user's own step on the meta device, every allocation written down (needs torch)
    memory/         that step for every batch and length of its kind, read back: allocator, peak, parts, verdict
    catalog/        GPUs and models as tables of facts
    job, errors     the one schema of a job; the one error that a user is told
"""


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("vramplan")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
