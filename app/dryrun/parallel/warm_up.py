"""What ``from_pretrained`` asks a card for before it loads."""

from __future__ import annotations

from typing import Any

import torch
from transformers import modeling_utils

from ..tracker import MemoryTracker


def warm_up(tracker: MemoryTracker, model: torch.nn.Module, devices: dict[str, Any], card: int, quantizer: Any) -> None:
    """Record one allocation of all the bytes that will lie on ``card``, freed at once: the weights come to lie in it.

    ``devices``: where each of the bare ``model``'s tensors will lie; of no interest is what lies on no card.

    Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/modeling_utils.py#L4991
    ``caching_allocator_warmup``.
    """
    here = {name: device for name, device in devices.items() if device == torch.device("cuda", card)}
    size = sum(modeling_utils.get_total_byte_count(model, here, quantizer).values())
    if size:
        tracker.record_temporary([(int(size // 2) * 2, "weights")], "", "caching_allocator_warmup")
