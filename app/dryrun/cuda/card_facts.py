"""The facts of a GPU that change what PyTorch allocates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...memory.kernel_facts import KernelFacts

MEASURABLE = (
    "cublas_workspace",
    "cublaslt_workspace",
    "run_cudnn_SDP_bprop",
    "mha_bwd",
    "_efficient_attention_backward",
    "gpu_reduce_kernel",
    "_foreach_norm",
)
"""The operators whose workspaces a probe may measure: their rules ask :attr:`Card.measured` for the size."""


@dataclass(frozen=True)
class Card:
    """The facts of a GPU that change what PyTorch allocates.

    ``capability``: the CUDA compute capability, (major, minor). ``multiprocessors``: how many it has, or a symbol for
    that number. ``cudnn``: the version of cuDNN that PyTorch runs with (``torch.backends.cudnn.version()``).
    ``measured``: where a probe of the card found something other than what these files state.
    """

    capability: tuple[int, int] = (9, 0)
    multiprocessors: int | torch.SymInt = 132
    measured: KernelFacts = KernelFacts()
    cudnn: int = 91900

    @property
    def cublas_workspace(self) -> int:
        """Bytes of the workspace of one cuBLAS handle on one stream.

        The default is ``:4096:2:16:8`` (KiB and counts), from Hopper on 32768 KiB. There is one for the main thread,
        and one for the autograd engine's thread in backward.

        Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/cuda/CublasHandlePool.cpp
        ``parseChosenWorkspaceSize``.
        Confirmed: H100 and H200, 33554432 bytes in forward and again in backward.
        """
        stated = 32 << 20 if self.capability >= (9, 0) else (4096 * 2 + 16 * 8) << 10
        return self.measured.size("cublas_workspace", stated)

    @property
    def cublaslt_workspace(self) -> int:
        """Bytes of cuBLASLt's workspace, which a product with a bias vector (``gemm_and_bias``) needs.

        Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/cuda/CublasHandlePool.cpp
        ``getCUDABlasLtWorkspaceSize``.
        Confirmed: H100, the first linear layer with a bias allocates 1 MiB more.
        """
        return self.measured.size("cublaslt_workspace", 1 << 20)

    @property
    def prefers_cudnn_attention(self) -> bool:
        """Whether PyTorch tries cuDNN's attention first: on sm90 and sm100, with cuDNN later than 9.15.0.

        Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp
        ``check_prefer_cudnn_attention``.
        """
        return self.capability in ((9, 0), (10, 0), (10, 3)) and self.cudnn > 91500
