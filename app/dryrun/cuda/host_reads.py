"""What to answer when the program reads a tensor's value on the host."""

from __future__ import annotations

HOST_READS: dict[str, bool | str] = {
    # transformers/masking_utils.py: "is every sequence one sequence?"
    "find_packed_sequence_indices": "single",
    # "does the mask hide nothing?"
    "_ignore_causal_mask_sdpa": "full",
    "_ignore_bidirectional_mask_sdpa": "full",
    "create_recurrent_attention_mask": "full",
    "flash_attention_mask": "full",
    "fast_all": "full",
    # transformers/modeling_utils.py: "does a sequence begin or end with padding?" Then it would only warn.
    "PreTrainedModel.warn_if_padding_and_no_attention_mask": False,
    # transformers/generation/utils.py: "is a special token negative, is the mask of the wrong kind?"
    "GenerationMixin._prepare_special_tokens": False,
    "GenerationMixin.generate": False,
    # torch/amp/grad_scaler.py: "is a gradient infinite?" Then the step would be left out.
    "GradScaler._maybe_opt_step": False,
    # "has every sequence ended?" Not before the length that was asked for: new tokens are a minimum too.
    "StopCheck.__call__": "generated",
    # transformers/modeling_rope_utils.py: the largest position, plus one
    "dynamic_rope_update.<locals>.longrope_frequency_update": "length",
}


"""Functions that read a tensor's value on the host, by qualified name, and what they are told: a value, or what the
job says of it."""
