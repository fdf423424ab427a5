"""What a job can name, one table a subject: optimisers, trainers, quantisers, strategies.

A row holds facts, and says as ``module:name`` where its code is. No table imports torch or the code that it names:
:func:`load` does when a job asks for it. So the form, the command line and a stored plan know every name without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(reference: str, package: str | None = None) -> Any:
    """The object that ``module:name`` names. A reference with leading dots is relative to ``package``."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module, package), name)
