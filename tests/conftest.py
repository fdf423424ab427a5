"""Tests keep what they trace in a folder of their own, and trace what the catalogue has traced before."""

import os
import tempfile

_FOLDER = tempfile.TemporaryDirectory()
os.environ["VRAMPLAN_CACHE"] = _FOLDER.name
