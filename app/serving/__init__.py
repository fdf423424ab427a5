"""What an engine takes of a card when it serves a model, read off the command that starts it.

A file an engine: :mod:`vllm`, :mod:`sglang`. ``command`` reads a pasted command by the engine's table of flags,
``rank_weights`` splits a model over ranks, ``kv_cache`` is the arithmetic of paged caches. Nothing here imports torch:
the model is looked at in a tracing process (``app/dryrun/served_model.py``).
"""
