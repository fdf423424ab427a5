"""Import torch and its libraries and trace one small job: the fork server does so once, for all processes it forks."""

import gc

from ..catalog.gpus import find_gpu
from ..dryrun import sandbox, steps
from ..dryrun.steps import merge_and_save  # noqa: F401
from ..job import read_job
from ..planning.resolve import kernels_of
from ..planning.tracer import InProcessTracer, TraceRequest
from ..registry import load
from ..registry.trainers import TRAINERS

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
JOB = read_job({"config": CONFIG, "method": "qlora", "batch_size": 2, "sequence_length": 16}).resolved()

sandbox.hold()
for trainer in TRAINERS.values():
    load(trainer.loop, steps.__name__)
InProcessTracer().trace("general", TraceRequest("", JOB, CONFIG, kernels_of(find_gpu("h100-80gb"))))
gc.collect()
gc.freeze()
