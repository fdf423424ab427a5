"""The Hub's own search for models."""

from __future__ import annotations

from huggingface_hub import HfApi

from .client import CONFIG_LIMIT, Bounds, offline

SEARCH_SECONDS = 3.0


def search(q: str, limit: int = 10, *, endpoint: str | None = None, token: str | None = None) -> list[str] | None:
    """The Hub's own search: ids of models, the most downloaded first; None when offline or without answer in 3 s."""
    if offline():
        return None
    if not q.strip() or limit < 1:
        return []
    api = HfApi(endpoint=endpoint, token=token, library_name="vramplan")
    bounds = Bounds("the Hub's search", SEARCH_SECONDS, CONFIG_LIMIT, tries=1)
    try:
        return bounds.run(lambda: [hit.id for hit in api.list_models(search=q.strip(), sort="downloads", limit=limit)])
    except Exception:  # a search box without suggestions is no failure
        return None
