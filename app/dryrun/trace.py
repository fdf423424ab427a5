"""The trace of a job: job and config in, a profile out.

A profile is the trace template, with the facts of the model and the table of its layers (:class:`Profile`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
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
from ..registry.strategies import STRATEGIES
from . import layer_weights as layers
from .build import prequantized as stored
from .build.model import base_of
from .build.model_config import equal_type
from .build.peft_config import casts_to_float32
from .build.quantizers import quantized_layers
from .cuda.card_facts import Card
from .diagnose import explain_stack_errors
from .images import images_of
from .known_values import Images, KnownValues
from .parallel import strategy_of
from .repeat_layers import copied, folded_log
from .steps.data_rows import PARTS
from .steps.dry_run import dry_run
from .steps.trainer_arguments import without_effect
from .steps.trainer_models import REFERENCE, REWARD
from .symbols import Conditions, number_of, symbol, symbol_guards
from .token_loops import TOKENS_RUN
from .tracker import FORWARD_OTHER_CHECKPOINTING, DataDependent


def _base(job: Job, config: dict):
    """The job that runs, the bare model, its task, and warnings about how the model was built.

    The job differs from the given one where the checkpoint is quantised already.
    """
    say("building the model")
    base, task = base_of(config, job.task, job.dtype, job.attention)
    warnings = list(_class_warnings(config, base))
    settings = stored.quantization_config_of(config)
    with with_weight_facts(base):
        warnings += _check_length(job, base, task)
        if settings is not None:
            job, how = stored.as_loaded(job, settings, base)
            warnings.append(how)
    return job, base, task, warnings


def _class_warnings(config: dict, base) -> Iterator[str]:
    """A warning where the class that is planned is not the one that the config names."""
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
    """A :class:`PlanError` that is raised in the context gets the number and bytes of the model's weights."""
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
    rank: int = 0,
) -> Profile:
    """The profile of one ``rank`` of a resolved ``job``, from a run on the meta device as a card of this kind would run
    it.

    The profile holds for the job's batch and length, and for any number of multiprocessors with which the program does
    the same. ``general``: also for all other batches and lengths with which it does the same. That takes a few times
    as long.

    Raises :class:`PlanError`.
    """
    conditions = Conditions()
    card = Card(capability, symbol(SYMBOLS[2], multiprocessors, conditions), measured)
    job, base, task, warnings = _base(job, config)
    with with_weight_facts(base):
        images, image_warning = images_of(base, job, task)
    linear = quantized_layers(base, job.quantization)
    rows = layers.weights_table(base, linear)
    facts = _facts(base, task, sum(row.parameters for row in rows))
    warnings += [*([image_warning] if image_warning else []), *_weight_warnings(job, facts["parameters"], linear)]
    if ignored := without_effect(job):
        warnings.append(f"these trainer_args change no memory of a step, and are left out: {', '.join(ignored)}")
    warnings += [_HALVES.format(name) for name in PARTS if job.trainer_args.get(name)]
    one_run = general and images is None and not job.knows_values and strategy_of(job).repeats_layers
    symbols = _symbols(job, conditions) if one_run else {}
    if symbols:
        _check_length(job.model_copy(update=symbols), base, task)
    trace_log, values = with_values(
        lambda values: _trace_log(base, job, task, card, symbols if values is None else {}, values, rank), job, images
    )
    if values is not None and values.depends_on_router:
        warnings.append(_ROUTED[job.expert_routing])
    warnings += _kernel_warnings(job, task, facts["attention"], trace_log)
    table = Table.of(with_costs(rows, trace_log, FORWARD_OTHER_CHECKPOINTING, job.gradient_checkpointing != "off"))
    trace_log = trace_log.before_phase(FORWARD_OTHER_CHECKPOINTING)
    facts |= _facts_of_ranks(base, job, trace_log.host)
    facts["trainable_parameters"] = _trainable(trace_log, job)
    facts["optimizer_state"] = _state_bytes(trace_log, job)
    warnings += strategy_of(job).caveats(facts["trainable_parameters"])
    if not symbols or values is not None:
        conditions |= {f"{name} == {value}": None for name, value in zip(SYMBOLS, point_of(job), strict=False)}
    return Profile(TraceTemplate.of(trace_log, conditions), facts, table, warnings, (*point_of(job), multiprocessors))


def _facts_of_ranks(base, job: Job, counted: dict[str, int]) -> dict:
    """How the ranks of a job on many cards differ, and what a node's memory holds; nothing for one card.

    ``counted``: what the rank that ran has there.
    """
    strategy, processes = strategy_of(job), job.gpu_count // job.nodes
    classes, host = strategy.rank_classes(base), strategy.host_bytes(base)
    ranks = {"rank_classes": [[row.name, row.first, row.last] for row in classes]} if classes else {}
    for name, size in counted.items():
        host[name] = max(host.get(name, 0), size if STRATEGIES[job.strategy].one_process else size * processes)
    return ranks | ({"host": host} if host else {})


def _facts(base, task: str, parameters: int) -> dict:
    """The facts of the bare model that an answer shows, before the run adds its own."""
    return {
        "task": task,
        "class": type(base).__name__,
        "model_type": base.config.model_type,
        "parameters": parameters,
        "supports_checkpointing": bool(base.supports_gradient_checkpointing),
        "attention": base.config._attn_implementation or "eager",
    }


def with_values(
    run: Callable[[KnownValues | None], TraceLog | TraceColumns | Expansion], job: Job, images: Images | None
) -> tuple[TraceLog | TraceColumns | Expansion, KnownValues | None]:
    """The result of ``run``, and the known values that it took, if any.

    With images, and with rows that the job states, it takes known values. Otherwise it runs without them first, and
    again with them where the program reads a value. That way most jobs do not pay for the twins of
    :class:`KnownValues`.
    """
    if images is None and not job.knows_values:
        try:
            return run(None), None
        except DataDependent:
            pass
    values = KnownValues(job.expert_routing, images)
    return run(values), values


def _symbols(job: Job, conditions: Conditions) -> dict[str, torch.SymInt]:
    """The job's batch and length as symbols. In generation, transformers needs the length as a number."""
    named = {"batch_size": job.batch_size, "sequence_length": job.sequence_length}
    if job.method == "inference" or job.sequence_length is None:
        named.pop("sequence_length")
        conditions[f"s == {job.sequence_length or 0}"] = None
    return {field: symbol(SYMBOLS[field == "sequence_length"], value, conditions) for field, value in named.items()}


_OFFSET = 2
"""Rows that a table of positions may have before the first one."""
_HALVES = "{}: half of the tokens of each sequence are taken to be learned"
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
    rank: int,
) -> TraceColumns:
    """The trace log of a ``rank`` of ``job`` on the bare ``model``, from few layers where they repeat.

    ``symbols``: fields of the job that are symbols. The log has the phase :data:`FORWARD_OTHER_CHECKPOINTING` as well,
    where the model can checkpoint.

    Raises :class:`DataDependent` where the program reads a value, and there are no ``values``; :class:`PlanError` where
    the software refuses the job.
    """
    names = (
        *(job.lora.target_modules or () if job.lora and job.lora.target_modules != "all-linear" else ()),
        *(job.lora.modules_to_save if job.lora else ()),
        *(job.quantization.skip_modules if job.quantization else ()),
    )

    trains, steps = job.method != "inference", strategy_of(job).steps
    generates = trains and job.trainer == "trl" and job.goal.generates
    whole = not strategy_of(job).repeats_layers
    other = trains and model.supports_gradient_checkpointing and not generates and not whole
    copies = ("", REFERENCE) if trains and job.states_rows and job.method == "full" else ("",)

    def trace_log(tokens: int) -> TraceColumns:
        def run(variant: Job) -> Callable[[torch.nn.Module], TraceLog]:
            return lambda short: dry_run(short, variant, task, card, steps, other, values, tokens, rank)

        if whole:
            return run(job)(copied(model)).columns()
        general = run(job.model_copy(update=symbols)) if symbols else None
        return folded_log(model, run(job), names, general, copies).columns()

    with with_weight_facts(model), explain_stack_errors(model, job, values is not None), symbol_guards():
        try:
            return trace_log(TOKENS_RUN)
        except NotRepeatable:  # of a loop over tokens, not of the layers
            return trace_log(job.sequence_length or 1)


def _check_length(job: Job, base, task: str) -> list[str]:
    """The warning that a sequence is longer than the positions that the model was made for; else none.

    Raises :class:`PlanError` where the model holds a table of that many positions, for it fails. Rotary embeddings and
    biases are computed for as many as there are.
    """
    text = base.config.get_text_config()
    speech = task == "speech-seq2seq"
    limit = getattr(text, "max_target_positions" if speech else "max_position_embeddings", None)
    field = "target_length" if speech else "sequence_length"
    tokens = job.target_length or job.sequence_length if speech else job.sequence_length
    if not isinstance(limit, int) or tokens is None or task == "image-classification":
        return []
    length = tokens + (job.new_tokens or 0 if job.method == "inference" else 0)
    most = _table_of_positions(base, limit)
    if most is not None and 0 < most < length:
        raise PlanError(
            f"a sequence of {length} tokens is longer than this model's {most} positions",
            f"set {field} to at most {most}",
            field,
        )
    if not 0 < limit < length:
        return []
    return [
        f"a sequence of {number_of(length)} tokens is longer than the {limit} positions that this model was made for: "
        "it runs, and what it answers may be of little use"
    ]


def _table_of_positions(base, limit: int) -> int | None:
    """The number of tokens that a model's own table of about ``limit`` positions serves; None: it has no such table.

    A table is an embedding beside that of the words, or a buffer, with a row for each position; where it has a row for
    padding, the positions begin after it.

    Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/models/opt/modeling_opt.py
    ``OPTLearnedPositionalEmbedding``; .../models/roberta/modeling_roberta.py ``create_position_ids_from_input_ids``.
    """
    words = None
    with suppress(NotImplementedError):  # a model of two towers
        words = base.get_input_embeddings()
    for module in base.modules():
        if isinstance(module, torch.nn.Embedding) and module is not words:
            if limit <= module.num_embeddings <= limit + _OFFSET:
                return limit if module.padding_idx is None else module.num_embeddings - module.padding_idx - 1
        elif any(
            buffer.dim() == 2 and buffer.shape[0] == limit for buffer in module._buffers.values() if buffer is not None
        ):
            return limit
    return None


def _trainable(trace_log: TraceColumns, job: Job) -> int:
    """How many parameters are trained, by the bytes of their tensors at load.

    In full training these are the weights. Otherwise they are the adapters, in fp32 when they are loaded, unless the
    job leaves them in its own dtype.
    """
    if job.method == "inference":
        return 0
    if job.method == "full":
        weights = trace_log.keys_of("weights", "place")
        own = [not fqn.startswith((REFERENCE, REWARD)) for fqn in trace_log.fqns]
        weights = weights[np.array(own, bool)[trace_log.fqn[weights]]]
        return trace_log.total_size(weights) // strategy_of(job).trained_itemsize
    itemsize = 4 if casts_to_float32(job) else getattr(torch, job.dtype).itemsize
    return trace_log.total_size(trace_log.keys_of("adapters", "place")) // itemsize


def _state_bytes(trace_log: TraceColumns, job: Job) -> int:
    """Bytes of the tensors in ``optimizer.state`` on the card.

    With bitsandbytes every 8-bit state has an absmax of its own (``torch.zeros``) and refers to one code book of 1024
    bytes, which all parameters share. Of a plain loop they are counted as a script that sums its tensors counts them,
    once for each; of a trainer once, as they lie there. So did the programs that measured the rows.

    Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/optim/optimizer.py#L492
    ``init_state``.
    """
    state = trace_log.total_size(trace_log.keys_of("optimizer_state"))
    if job.whose.hosted:
        return state
    zeros = trace_log.size[trace_log.keys_of("optimizer_state", "zeros.default")].tolist()
    scales = sum(trace_log.sizes[number] > 4 for number in zeros)  # a step is one number
    copies = trace_log.size[trace_log.keys_of("optimizer_state", "_to_copy.default")].tolist()
    shared = sum(trace_log.sizes[number] == 1024 for number in copies)
    return state + 1024 * max(scales - shared, 0)


def _kernel_warnings(job: Job, task: str, attention: str, trace_log: TraceColumns) -> list[str]:
    """Warnings about kernels: what a user may not expect, and what the plan cannot know."""
    warnings = []
    ops = set(trace_log.ops)
    if attention == "eager" and job.attention is None:
        warnings.append(
            "this model's class has no sdpa attention: transformers runs eager attention, which keeps its scores"
        )
    if job.packed:
        warnings.append(
            "the batch is taken to be one row of all its tokens, each length two sequences, told apart by positions "
            "that start over: where attention is not flash_attention_2, transformers makes a mask of tokens × tokens "
            "of them"
        )
    if attention == "sdpa" and "_safe_softmax.default" in ops:
        warnings.append(
            "scaled_dot_product_attention falls back to PyTorch's math kernel, which keeps length × length scores: "
            "the fused kernels refuse these queries (float32 with grouped heads, bfloat16 or grouped heads on a card "
            "before sm80, or a strided mask). Autocast or activations in 16 bit avoid it from sm80 on"
        )
    if "run_conv_plan" in ops:
        warnings.append(
            "convolutions: cuDNN's workspace is that of its channels-last kernels; other choices take other amounts"
        )
    if job.quantizer is not None and job.quantizer.caveat is not None:
        warnings.append(job.quantizer.caveat)
    return warnings


def _weight_warnings(job: Job, total: int, linear: dict[str, torch.nn.Module]) -> list[str]:
    """Warnings about a quantised model of ``total`` parameters: what is not quantised, and what is cast to fp32.

    ``linear``: the modules that are quantised, by fqn.
    """
    warnings = []
    if job.quantizer is not None:
        itemsize = getattr(torch, job.dtype).itemsize
        quantized = sum(module.weight.numel() for module in linear.values())
        left = (total - quantized) * itemsize
        if total and quantized / total < 0.5:
            warnings.append(
                f"{job.quantizer.library} quantises {100 * quantized / total:.1f} % of this model's parameters only: "
                f"{left / 2**30:.1f} GiB stay in {job.dtype} (fused experts and layers that are no nn.Linear). "
                "Budget for them in 16 bit, or choose a dense model"
            )
        if job.prepare_for_kbit_training and job.dtype != "float32":
            warnings.append(
                f"prepare_model_for_kbit_training casts what is not quantised to float32: "
                f"{2 * left / 2**30:.1f} GiB instead of {left / 2**30:.1f} GiB"
            )
    return warnings
