"""Job and config in, books out: the whole dry run, with the facts and the table that come from the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..errors import PlanError
from ..job import Job, point_of
from ..memory.events import TraceColumns, TraceLog
from ..memory.kernel_facts import KernelFacts
from ..memory.profile import Profile
from ..memory.repeat import Expansion, NotRepeatable
from ..memory.sizes import SYMBOLS
from ..memory.table import Table, with_costs
from ..memory.template import TraceTemplate
from ..progress import say
from . import layer_weights as layers
from .build import prequantized as stored
from .build.model import base_of
from .build.model_config import equal_type
from .build.quantizers.bnb_linear import quantizable
from .cuda.card_facts import Card
from .diagnose import explain_stack_errors
from .images import images_of
from .known_values import Images, KnownValues
from .repeat_layers import folded_log
from .steps.dry_run import dry_run
from .symbols import Conditions, symbol, symbol_guards
from .token_loops import TOKENS_RUN
from .tracker import FORWARD_OTHER_CHECKPOINTING, DataDependent


def _base(job: Job, config: dict):
    """The job that is run, the bare model, its task, and what is to be said of how it came to be."""
    say("building the model")
    base, task = base_of(config, job.task, job.dtype, job.attention)
    said = list(_planned_as(config, base))
    settings = stored.quantization_config_of(config)
    with with_weight_facts(base):
        _check_length(job, base.config, task)
        if settings is not None:
            job, how = stored.as_loaded(job, settings, base)
            said.append(how)
    return job, base, task, said


def _planned_as(config: dict, base) -> Iterator[str]:
    """Where the class that is planned is not the one that the config names."""
    kind, named = config["model_type"], config.get("architectures")
    if base.config.model_type != kind and equal_type(kind, config) != kind:
        yield (
            f"transformers has no model_type {kind!r}: planned as its own {type(base).__name__}, the class that the "
            "config names; the code in the model's repository is not run and may differ"
        )
    elif isinstance(named, list) and named and type(base).__name__ not in named:
        yield (
            f"the config names {named[0]}; planned is {type(base).__name__}, which has the loss of this task: "
            "its parameters are counted"
        )


@contextmanager
def with_weight_facts(base):
    """A refusal of a model that could be built says what its weights are."""
    try:
        yield
    except PlanError as error:
        if error.weights is None:
            parameters = list(base.parameters())
            error.weights = {
                "parameters": sum(parameter.numel() for parameter in parameters),
                "bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
                "from": "the model's own class, as loaded",
            }
        raise


def trace(
    job: Job,
    config: dict,
    capability: tuple[int, int],
    multiprocessors: int,
    measured: KernelFacts = KernelFacts(),
    general: bool = False,
) -> Profile:
    """Run ``job`` (resolved) on the meta device as a card with these kernels would, and describe the model.

    The profile holds for the job's own batch and length on all cards with these kernels that do the same, however many
    multiprocessors they have; ``general``: for all batches and lengths for which the software does the same, which
    takes a few times as long. Raises :class:`PlanError`.
    """
    conditions = Conditions()
    card = Card(capability, symbol(SYMBOLS[2], multiprocessors, conditions), measured)
    job, base, task, said = _base(job, config)
    with with_weight_facts(base):
        images, shown = images_of(base, job, task)
    skip = job.quantization.skip_modules if job.quantization else ()
    linear = dict(quantizable(base, skip))
    rows = layers.weights_table(base, linear)
    facts = {
        "task": task,
        "class": type(base).__name__,
        "model_type": base.config.model_type,
        "parameters": sum(row.parameters for row in rows),
        "supports_checkpointing": bool(base.supports_gradient_checkpointing),
        "attention": base.config._attn_implementation or "eager",
    }
    warnings = [*said, *([shown] if shown else []), *_weight_warnings(job, facts["parameters"], linear)]
    symbols = _symbols(job, conditions) if general and images is None else {}
    if symbols:
        _check_length(job.model_copy(update=symbols), base.config, task)
    trace_log, values = with_values(
        lambda values: _trace_log(base, job, task, card, symbols if values is None else {}, values), job, images
    )
    if values is not None and values.depends_on_router:
        warnings.append(_ROUTED[job.expert_routing])
    warnings += _kernel_warnings(job, task, facts["attention"], trace_log)
    table = Table.of(with_costs(rows, trace_log, FORWARD_OTHER_CHECKPOINTING, job.gradient_checkpointing != "off"))
    trace_log = trace_log.before_phase(FORWARD_OTHER_CHECKPOINTING)
    facts["trainable_parameters"] = _trainable(trace_log, job)
    facts["optimizer_state"] = _state_bytes(trace_log)
    if not symbols or values is not None:
        conditions |= {f"{name} == {value}": None for name, value in zip(SYMBOLS, point_of(job))}
    return Profile(TraceTemplate.of(trace_log, conditions), facts, table, warnings, (*point_of(job), multiprocessors))


def with_values(
    run: Callable[[KnownValues | None], TraceLog | TraceColumns | Expansion], job: Job, images: Images | None
) -> tuple[TraceLog | TraceColumns | Expansion, KnownValues | None]:
    """``run`` with the values that the job states where it shows images or asks for some, else with none; and those."""
    if images is None:
        try:
            return run(None), None
        except DataDependent:
            pass
    values = KnownValues(job.expert_routing, images)
    return run(values), values


def _symbols(job: Job, conditions: Conditions) -> dict[str, torch.SymInt]:
    """The job's batch and length as symbols; what generates asks transformers, which wants the length as a number."""
    named = {"batch_size": job.batch_size, "sequence_length": job.sequence_length}
    if job.method == "inference" or job.sequence_length is None:
        named.pop("sequence_length")
        conditions[f"s == {job.sequence_length or 0}"] = None
    return {field: symbol(SYMBOLS[field == "sequence_length"], value, conditions) for field, value in named.items()}


_ROUTED = {
    "balanced": "what runs depends on which experts the router chooses: taken to be each as often as the others (job "
    "field expert_routing: balanced)",
    "same": "what runs depends on which experts the router chooses: taken to be the same ones for every token (job "
    "field expert_routing: same)",
}


def _trace_log(
    model,
    job: Job,
    task: str,
    card: Card,
    symbols: dict,
    values: KnownValues | None,
) -> TraceColumns:
    """The books of ``job`` on the bare ``model``, folded, with ``symbols`` for fields of the job if there are any, and
    of :data:`FORWARD_OTHER_CHECKPOINTING` where the model can; what the stack itself refuses is told as such. Raises :class:`DataDependent`
    where it takes ``values``."""
    names = (
        *(job.lora.target_modules or () if job.lora and job.lora.target_modules != "all-linear" else ()),
        *(job.lora.modules_to_save if job.lora else ()),
        *(job.quantization.skip_modules if job.quantization else ()),
    )

    other = job.method != "inference" and model.supports_gradient_checkpointing

    def trace_log(tokens: int) -> TraceColumns:
        def run(what: Job) -> Callable[[torch.nn.Module], TraceLog]:
            return lambda short: dry_run(short, what, task, card, 2, other, values, tokens)

        general = run(job.model_copy(update=symbols)) if symbols else None
        return folded_log(model, run(job), names, general).columns()

    with with_weight_facts(model), explain_stack_errors(model, job, values is not None), symbol_guards():
        try:
            return trace_log(TOKENS_RUN)
        except NotRepeatable:  # of a loop over tokens, not of the layers
            return trace_log(job.sequence_length or 1)


def _check_length(job: Job, configuration, task: str) -> None:
    text = configuration.get_text_config()
    speech = task == "speech-seq2seq"
    limit = getattr(text, "max_target_positions" if speech else "max_position_embeddings", None)
    if not isinstance(limit, int) or job.sequence_length is None or task == "image-classification":
        return
    length = job.sequence_length + (job.new_tokens or 0 if job.method == "inference" else 0)
    if 0 < limit < length:
        raise PlanError(
            f"a sequence of {length} tokens is longer than this model's {limit} positions",
            f"set sequence_length to at most {limit}",
            "sequence_length",
        )


def _trainable(trace_log: TraceColumns, job: Job) -> int:
    """How many parameters are trained: the gradients' elements, each of its parameter's dtype (fp32 for adapters
    unless the trainer casts them)."""
    if job.method == "inference":
        return 0
    if job.method == "full":
        return trace_log.total_size(trace_log.keys_of("weights", "place")) // getattr(torch, job.dtype).itemsize
    return trace_log.total_size(trace_log.keys_of("adapters", "place")) // 4


def _state_bytes(trace_log: TraceColumns) -> int:
    """The bytes of the tensors in ``optimizer.state`` on the card, summed as a script would sum them.

    bitsandbytes (optim/optimizer.py ``init_state``) gives every 8-bit state, beside an absmax of its own
    (``torch.zeros``), one code book of 1024 bytes that all parameters share: it counts once for each.
    """
    scales = trace_log.keys_of("optimizer_state", "zeros.default").size
    copies = trace_log.size[trace_log.keys_of("optimizer_state", "_to_copy.default")].tolist()
    shared = sum(trace_log.sizes[number] == 1024 for number in copies)
    return trace_log.total_size(trace_log.keys_of("optimizer_state")) + 1024 * max(scales - shared, 0)


def _kernel_warnings(job: Job, task: str, attention: str, trace_log: TraceColumns) -> list[str]:
    """What the kernels of this job do that a user may not expect, or that the number cannot know."""
    out = []
    ops = set(trace_log.ops)
    if attention == "eager" and job.attention is None:
        out.append(
            "this model's class has no sdpa attention: transformers runs eager attention, which keeps its scores"
        )
    if job.packed:
        out.append(
            "the batch is taken to be one row of all its tokens, each length two sequences, told apart by positions "
            "that start over: where attention is not flash_attention_2, transformers makes a mask of tokens × tokens "
            "of them"
        )
    if attention == "sdpa" and "_safe_softmax.default" in ops:
        out.append(
            "scaled_dot_product_attention falls back to PyTorch's math kernel, which keeps length × length scores: "
            "the fused kernels refuse these queries (float32 with grouped heads, bfloat16 or grouped heads on a card "
            "before sm80, or a strided mask). Autocast or activations in 16 bit avoid it from sm80 on"
        )
    if "run_conv_plan" in ops:
        out.append(
            "convolutions: cuDNN's workspace is that of its channels-last kernels; other choices take other amounts"
        )
    if job.quantizer is not None and job.quantizer.caveat is not None:
        out.append(job.quantizer.caveat)
    return out


def _weight_warnings(job: Job, total: int, linear: dict[str, torch.nn.Module]) -> list[str]:
    """What a quantised job of so many parameters would not expect: modules that bitsandbytes leaves as they are, all
    but the ``linear`` ones, and what is cast."""
    out = []
    if job.quantizer is not None:
        itemsize = getattr(torch, job.dtype).itemsize
        quantized = sum(module.weight.numel() for module in linear.values())
        left = (total - quantized) * itemsize
        if total and quantized / total < 0.5:
            out.append(
                f"{job.quantizer.library} quantises {100 * quantized / total:.1f} % of this model's parameters only: "
                f"{left / 2**30:.1f} GiB stay in {job.dtype} (fused experts and layers that are no nn.Linear). "
                "Budget for them in 16 bit, or choose a dense model"
            )
        if job.prepare_for_kbit_training and job.dtype != "float32":
            out.append(
                f"prepare_model_for_kbit_training casts what is not quantised to float32: "
                f"{2 * left / 2**30:.1f} GiB instead of {left / 2**30:.1f} GiB"
            )
    return out
