"""Generation: a prompt is read, then tokens are made one by one."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from ...errors import PlanError
from ...job import Job
from ..inputs import base_of, make_batch
from ..observer import StepObserver

TASKS = ("causal-lm", "image-text-to-text", "seq2seq-lm")
"""Tasks whose models generate text of text."""
PROMPT = 64
"""A pass over more tokens than these reads a prompt: ``prefill``. Others are ``decode``."""
FIELD = "generation_args"
"""The field that an error names."""
SHOWN = 2
"""Of the passes that decode, so many at either end are phases. Those between differ by a cache that grows."""


def run_generate(observer: StepObserver, model: torch.nn.Module, job: Job, task: str, *_: int) -> None:
    """The :class:`~vramplan.dryrun.steps.Loop` of ``method: inference``: ``model.generate`` with its cache, greedily
    unless the job's ``generation_args`` say otherwise.

    The prompt has ``sequence_length`` tokens, and exactly ``new_tokens`` follow. Raises :class:`PlanError`.
    """
    if task not in TASKS:
        raise PlanError(f"generation is planned for {', '.join(TASKS)}, not for {task}", "name another task", "task")
    arguments = _arguments(job)
    model.config.use_cache = True
    observer.mark("load", 0, "inputs")
    batch = make_batch(observer, model, job, task)
    prompt = 1 if task == "seq2seq-lm" else job.sequence_length
    observer.length = prompt + job.new_tokens
    chunk = arguments.get("prefill_chunk_size") or prompt
    observer.forwards_left = 2 * (job.new_tokens + 1) + -(-prompt // chunk)  # guidance runs two for a token
    observer.mark("generate", 1, "activations")
    with (
        torch.no_grad(),
        observer.autocast.on() if observer.autocast else contextlib.nullcontext(),
        _passes_as_phases(observer, base_of(model), job.new_tokens),
    ):
        out = model.generate(
            **batch,
            max_new_tokens=job.new_tokens,
            min_new_tokens=job.new_tokens,
            pad_token_id=0,
            **{"do_sample": False, **arguments},
        )
    observer.mark("end", 1, "temporaries")
    observer.close()
    del out


@contextlib.contextmanager
def _passes_as_phases(observer: StepObserver, model: torch.nn.Module, tokens: int) -> Iterator[None]:
    """While the context lasts, a forward pass of ``model`` is a phase within the generation of ``tokens``."""
    open_phases: list[contextlib.ExitStack] = []
    decoded = 0

    def begin(module, args, kwargs):
        nonlocal decoded
        reads = _tokens(args, kwargs) > PROMPT
        decoded += not reads
        open_phases.append(contextlib.ExitStack())
        if reads or decoded <= SHOWN or decoded >= tokens - SHOWN:
            open_phases[-1].enter_context(observer.during("prefill" if reads else "decode"))

    def end(module, args, output):
        open_phases.pop().close()

    hooks = (
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(args: tuple, kwargs: dict[str, Any]) -> int:
    """How many tokens of each sequence a pass over these arguments is given."""
    given = (*(kwargs.get(name) for name in ("decoder_input_ids", "input_ids", "inputs_embeds")), *args)
    return next((tensor.shape[1] for tensor in given if isinstance(tensor, torch.Tensor)), 0)


_SAID = "the job's field new_tokens says it"
_COMPILED = "a compiled pass is not modelled"
REFUSED = {
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), _SAID),
    **dict.fromkeys(("max_time", "stop_strings", "streamer"), "when it ends is not known"),
    **dict.fromkeys(("compile_config", "custom_generate"), _COMPILED),
    "assistant_model": "the candidates that it accepts are not known",
    "prompt_lookup_num_tokens": "the candidates that it accepts are not known",
    "assistant_early_exit": "the candidates that it accepts are not known",
    "cache_config": "caches of other layouts are not modelled",
}
"""Arguments of ``generate()`` that are not planned, and why not."""
CACHES = (None, "dynamic", "dynamic_full", "static")
"""The values of ``cache_implementation`` that are planned."""


def _arguments(job: Job) -> dict[str, Any]:
    """The job's ``generation_args``. Raises :class:`PlanError` for what is not planned."""
    given = job.generation_args
    known = [*transformers.GenerationConfig().to_dict(), *REFUSED]
    for name in given:
        if name in REFUSED:
            raise PlanError(f"generation with {name} is not modelled: {REFUSED[name]}", f"leave {name} out", FIELD)
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else "see transformers.GenerationConfig"
            raise PlanError(f"generate() has no argument {name!r}", hint, FIELD)
    cache = given.get("cache_implementation")
    if cache not in CACHES:
        raise PlanError(f"a cache of kind {cache!r} is not modelled", f"planned are {', '.join(CACHES[1:])}", FIELD)
    if cache == "static" and not given.get("disable_compile"):
        hint = "set disable_compile to true"
        raise PlanError(f"with a static cache generate() compiles its passes, on a card: {_COMPILED}", hint, FIELD)
    return given
