"""The folders of data that the package brings along, wherever it was installed."""

from pathlib import Path

PACKAGE = Path(__file__).parent
"""The folder of the package: ``app`` in the repository, ``vramplan`` where it is installed."""
CATALOG = PACKAGE / "catalog"


def folder(name: str) -> Path:
    """The folder ``templates`` or ``static``: inside the installed package, beside ``app`` in the repository."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name
