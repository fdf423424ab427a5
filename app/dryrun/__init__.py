"""Torch on the meta device: a Job and a config in, books out. What its libraries are told before they are imported."""

import ctypes
import logging
import os
from contextlib import suppress

import huggingface_hub.constants
import torch

# A stranger's config makes no requests: only vramplan.hub.client may reach the network, by the user's own setting, which stays in
# the environment.
huggingface_hub.constants.HF_HUB_OFFLINE = True
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing kernels for the CPU

# bitsandbytes has two of its functions for the CPU compiled while it is imported (backends/default/ops.py), for which
# torch imports its compiler: 42 MiB and a second. Nothing here dequantises on a CPU.
_compile, torch.compile = torch.compile, lambda function=None, **_: function or (lambda other: other)
import bitsandbytes  # noqa: E402, F401

torch.compile = _compile

# Blocks of a mebibyte and more come from the kernel and go back there. Left alone, glibc keeps them from the first on
# that is freed (mallopt(3), M_MMAP_THRESHOLD): buffers that are computed while a model is made left 0.6 to 1.1 GiB.
with suppress(AttributeError, OSError, TypeError):  # another system's C library
    ctypes.CDLL(None).mallopt(-3, 1 << 20)
