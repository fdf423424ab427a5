"""The facts of a GPU that change what PyTorch allocates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...memory.kernel_facts import KernelFacts


@dataclass(frozen=True)
class Card:
    """The facts of a GPU that change what PyTorch allocates.

    ``capability`` is the CUDA compute capability, ``multiprocessors`` their number (or a symbol for it), ``cudnn`` the
    version of the cuDNN that PyTorch runs with (``torch.backends.cudnn.version()``). ``measured`` is what a probe of
    the card found other than what is stated here.
    """

    capability: tuple[int, int] = (9, 0)
    multiprocessors: int | torch.SymInt = 132
    measured: KernelFacts = KernelFacts()
    cudnn: int = 91900

    @property
    def cublas_workspace(self) -> int:
        """Bytes of cuBLAS's workspace, one per thread that multiplies (the loop's, and autograd's in backward).

        ``aten/src/ATen/cuda/CublasHandlePool.cpp``, ``parseChosenWorkspaceSize``: ``:4096:2:16:8`` is the default,
        ``:32768`` KiB from Hopper on. Measured on H100 and H200: 33554432 in forward and again in backward.
        """
        stated = 32 << 20 if self.capability >= (9, 0) else (4096 * 2 + 16 * 8) << 10
        return self.measured.size("cublas_workspace", stated)

    @property
    def cublaslt_workspace(self) -> int:
        """Bytes of the workspace of ``gemm_and_bias`` (cuBLASLt), shared with cuBLAS's.

        ``getCUDABlasLtWorkspaceSize``. Measured on an H100: the first linear with a bias takes 1 MiB more.
        """
        return self.measured.size("cublaslt_workspace", 1 << 20)

    @property
    def prefers_cudnn_attention(self) -> bool:
        """``check_prefer_cudnn_attention`` (transformers/cuda/sdp_utils.cpp): sm90 and sm100, cuDNN > 9.15.0."""
        return self.capability in ((9, 0), (10, 0), (10, 3)) and self.cudnn > 91500


MEASURABLE = (
    "cublas_workspace",
    "cublaslt_workspace",
    "run_cudnn_SDP_bprop",
    "mha_bwd",
    "_efficient_attention_backward",
    "gpu_reduce_kernel",
    "_foreach_norm",
)


"""The operators whose workspaces are asked of ``Card.measured``."""
