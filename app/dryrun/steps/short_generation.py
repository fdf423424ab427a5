"""Generation inside a step: the first few tokens of a completion and the last few are run.

Those between do what they do, with a cache that is longer by a token each time: its own ``update`` fills it up to the
last ones. What a completion takes at most it takes at its end.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

from transformers import GenerationMixin

from ..observer import StepObserver
from ..sandbox import replaced

FEW = 3
"""Tokens that are run at either end."""


@contextlib.contextmanager
def few_tokens(observer: StepObserver) -> Iterator[None]:
    """While the context lasts, ``generate`` runs few tokens, where the cache is one that grows."""
    with replaced(GenerationMixin, "generate", _short(GenerationMixin.generate, observer)):
        yield


def _short(whole: Callable, observer: StepObserver) -> Callable:
    def generate(model, *args, generation_config=None, **kwargs):
        new = getattr(generation_config, "max_new_tokens", None)
        if args or new is None:
            return whole(model, *args, generation_config=generation_config, **kwargs)
        observer.length = kwargs["input_ids"].shape[1] + new
        grows = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if new <= 2 * FEW + 1 or not grows:
            return whole(model, *args, generation_config=generation_config, **kwargs)
        settings = copy.deepcopy(generation_config)
        settings.max_new_tokens, settings.return_dict_in_generate = FEW, True
        ids, mask = kwargs.pop("input_ids"), kwargs.pop("attention_mask")
        prompt = ids.shape[1]
        observer.length = prompt + FEW
        cache = whole(model, input_ids=ids, attention_mask=mask, generation_config=settings, **kwargs).past_key_values
        _lengthen(cache, new - 2 * FEW)
        ids, mask = (tensor.new_ones(ids.shape[0], prompt + new - FEW) for tensor in (ids, mask))
        observer.length = prompt + new
        settings.return_dict_in_generate = generation_config.return_dict_in_generate
        return whole(
            model, input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=settings, **kwargs
        )

    return generate


def _lengthen(cache, tokens: int) -> None:
    """Add ``tokens`` to every layer of the cache."""
    for layer in cache.layers:
        keys, values = (
            states.new_empty(*states.shape[:-2], tokens, states.shape[-1]) for states in (layer.keys, layer.values)
        )
        layer.update(keys, values)
        del keys, values
