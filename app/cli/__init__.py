"""``vramplan``: the command line.

``estimate`` exits with 0 where the job fits its card (or names none), 1 where it does not, 2 where nobody can say.
Nothing here imports torch; the dry run does, when there is a job to run.
"""

from .entry import main

__all__ = ["main"]
