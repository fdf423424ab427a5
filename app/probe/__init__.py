"""The probe: the same job on a real GPU, and plan and measurement side by side, allocation by allocation.

`card` looks at the card before anything runs; `child` is the process that measures (`weights`, `recorder`, `trainers`,
`history` are its parts); `recording` is what it leaves; `compare` holds it against the plan; `measure` is the use case.
"""

from importlib.util import find_spec

from ..errors import PlanError
from ..planning.fingerprint import LIBRARIES

PACKAGES = (*LIBRARIES, "rapidfuzz", "matplotlib")
"""The packages that a probe needs beside the core's."""


def check_packages() -> None:
    """Raise :class:`PlanError` where a package that a probe needs is not installed."""
    missing = ", ".join(name for name in PACKAGES if find_spec(name) is None)
    if missing:
        raise PlanError(f"a probe needs {missing}", 'pip install "vramplan[probe]"')
