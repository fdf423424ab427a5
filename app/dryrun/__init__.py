"""Torch on the meta device: a job and a config in, the memory events of its step out."""

from . import sandbox

# bitsandbytes has its functions for the CPU compiled while it is imported (backends/default/ops.py), for which torch
# imports its compiler: 42 MiB and a second. Nothing here dequantizes on a CPU.
with sandbox.importing_bitsandbytes():
    import bitsandbytes  # noqa: F401
