"""What CUDA does that the meta device does not show: one fact a function, with its source and its measurement.

A rule records a kernel's own temporaries as allocated and freed within the call, and a workspace that stays once.
"Measured" refers to allocation histories (``torch.cuda.memory._record_memory_history``) of an H100 and an H200 with
torch 2.11.0+cu130 and cuDNN 9.19, the stack of the measured rows.

Importing this package imports every file of rules, so that :data:`~vramplan.dryrun.cuda.registry.KERNELS` is complete.
"""

from . import (  # noqa: F401  (each registers its rules)
    as_if_cuda,
    attention,
    autograd_engine,
    bitsandbytes_ops,
    collectives,
    convolution,
    elementwise,
    indexing,
    matmul,
    normalization,
    reductions,
    softmax,
)
