"""The version of each library that this package's ``Source:`` links point at. ``tests/test_docs_sources.py`` reads it.

The measured rows are of torch 2.11.0. Where a fact differs between that and the installed torch, the text says so.
"""

from __future__ import annotations

PINNED_TAGS = {
    "pytorch/pytorch": "v2.11.0",
    "huggingface/transformers": "v5.17.0",
    "huggingface/peft": "v0.21.0",
    "huggingface/trl": "v1.16.0",
    "huggingface/accelerate": "v1.15.0",
    "bitsandbytes-foundation/bitsandbytes": "0.50.2",
    "deepspeedai/DeepSpeed": "v0.19.8",
    "vllm-project/vllm": "v0.33.0",
    "sgl-project/sglang": "v0.5.23",
    "ggml-org/llama.cpp": "007dbbf3fd17eefe9b47fee45f48f7ba5e62b714",
}
"""Repository on GitHub to the one tag that links name."""
