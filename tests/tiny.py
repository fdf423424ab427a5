"""Models small enough to be planned in a blink, and jobs that cannot be planned, for the tests of every interface."""

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
GRID = {
    "model_type": "qwen2_vl",
    "image_token_id": 500,
    "video_token_id": 501,
    "vision_start_token_id": 502,
    "text_config": {
        "model_type": "qwen2_vl_text",
        **TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    },
    "vision_config": {"model_type": "qwen2_vl_vision", "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4},
}
"""Sees: patches of an image of any size, whose grid the host reads."""
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 512,
    "n_positions": 512,
}
"""Has a table of positions, which no sequence exceeds."""
JOB = {"config": LLAMA, "method": "lora", "trainer": "pytorch", "sequence_length": 64}

BAD = {
    "unknown field": ({**JOB, "batchsize": 2}, "unknown field `batchsize`", "batch_size", "batchsize"),
    "unknown nested field": ({**JOB, "lora": {"rank": 8}}, "unknown field `lora.rank`", "r", "lora.rank"),
    "negative batch": ({**JOB, "batch_size": -1}, "`batch_size`", "-1", "batch_size"),
    "length of words": ({**JOB, "sequence_length": "long"}, "`sequence_length`", "long", "sequence_length"),
    "unknown method": ({**JOB, "method": "qlorra"}, "`method`", "qlora", "method"),
    "unknown model_type": ({**JOB, "config": {**LLAMA, "model_type": "lama"}}, "lama", "llama", "config"),
    "config without model_type": ({**JOB, "config": {"hidden_size": 64}}, "model_type", "config", "config"),
    "absurd layers": ({**JOB, "config": {**LLAMA, "num_hidden_layers": 10**18}}, "num_hidden_layers", "", "config"),
    "model and config": ({**JOB, "model": "llama-3.1-8b"}, "exactly one", "", None),
    "neither": ({"method": "lora"}, "exactly one", "", None),
    "too long": ({**JOB, "config": GPT2, "sequence_length": 1024}, "512", "512", "sequence_length"),
    "no such target": ({**JOB, "lora": {"target_modules": ["nope"]}}, "nope", "q_proj", "lora"),
    "unknown card": ({**JOB, "gpu": "a100-81gb"}, "a100-81gb", "a100-80gb", "gpu"),
    "full with lora": ({**JOB, "method": "full", "lora": {"r": 8}}, "method full", "", None),
}
"""By name: the job, what its message says, what its message or hint say too, and the field at fault."""

T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 512,
    "decoder_start_token_id": 0,
}
