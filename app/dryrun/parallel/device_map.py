"""``device_map``: one process, its model spread over cards, the host and the disk by accelerate.

The map is transformers' own, from the sizes of the model and the memory of the cards; what moves when, is what
accelerate's hooks do. Each card is a class of its own, and a dry run records one of them.

Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/integrations/accelerate.py
``_get_device_map`` and ``accelerate_dispatch``, which ``from_pretrained`` calls before and after it loads the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import accelerate.utils.memory
import accelerate.utils.modeling
import torch
import transformers
from torch.utils.checkpoint import _CheckpointFrame
from transformers.integrations import accelerate as dispatching
from transformers.quantizers.auto import AutoHfQuantizer

from ...errors import PlanError
from ...job import Job
from ...memory.events import SETUP
from ..build.loading import MetaWeights
from ..places import HOST, Place, Places
from ..sandbox import replaced, silenced
from ..tracker import MemoryTracker
from . import RankClass, RankStrategy
from .warm_up import warm_up

DISK = "disk"
UNLIMITED = 1 << 50
"""Bytes that the host is taken to have, where the job does not say."""


class DeviceMap(RankStrategy):
    """``from_pretrained(device_map=…, max_memory=…)``; ``rank`` is the card. Raises :class:`PlanError`."""

    repeats_layers = False  # they lie on different cards

    @contextmanager
    def environment(self, tracker: MemoryTracker) -> Iterator[None]:
        """Cards, and a host beside them."""
        for name, given in (("max_memory", self.job.max_memory), ("device_map", self.job.device_map)):
            _check_cards(name, given, self.job.gpu_count)
        with silenced("accelerate"), Places(tracker, self.rank, self.job.gpu_count), ExitStack() as undo:
            for holder, name, value in _replacements(self.job, tracker):
                undo.enter_context(replaced(holder, name, value))
            yield

    def weights(self, model: torch.nn.Module, tracker: MemoryTracker) -> MetaWeights:
        """The weights where the map says. The loader asks each card first for all that will lie there, in one piece."""
        found, bare, quantizer = self._map_of(model)
        devices = {
            name: torch.device("cuda", place) if isinstance(place, int) else HOST for name, place in found.items()
        }
        asked = dispatching.expand_device_map(devices, list(bare.state_dict()))
        with tracker.places.at(self.rank):
            warm_up(tracker, bare, asked, self.rank, quantizer)
        return _Mapped(tracker.places, found)

    def _map_of(self, model: torch.nn.Module) -> tuple[dict[str, Any], torch.nn.Module, Any]:
        """Where each module lies: a card's number, ``cpu`` or ``disk``; the model that the map was made for, quantised
        and without weights, and its quantiser. Raises :class:`PlanError`."""
        named = self.job.device_map or "auto"
        try:
            given = dispatching.check_and_set_device_map(_with_numbers(named) if isinstance(named, dict) else named)
            quantizer = _quantizer_of(self.job)
            bare = _again(model)
            if quantizer is not None:
                quantizer.preprocess_model(model=bare, dtype=bare.dtype, device_map=given, checkpoint_files=[])
            memory = None if self.job.max_memory is None else _with_numbers(self.job.max_memory)
            with silenced("accelerate"), replaced(dispatching, "accelerate_max_memory", self._max_memory):
                found = dispatching._get_device_map(bare, given, memory, quantizer)
            if quantizer is not None:
                _refuse_outside(found)
            self._refuse_offloaded_training(found)
        except (ValueError, ImportError) as error:
            raise PlanError(
                str(error).strip().splitlines()[0], "see from_pretrained's device_map", "device_map"
            ) from None
        return {name: _number(place) for name, place in found.items()}, bare, quantizer

    def _refuse_offloaded_training(self, found: dict[str, Any]) -> None:
        """Refuse to train a model of which some is on the host: its parameters have no values between its passes."""
        if self.job.method != "inference" and {HOST, DISK} & set(map(str, found.values())):
            raise PlanError(
                "the cards do not hold the model: what device_map leaves to the host or the disk is fetched for a "
                "forward pass only, and is not trained",
                "raise max_memory, take more cards, or set strategy to fsdp2 or zero3 with offload",
                "max_memory",
            )

    def _max_memory(self, given: dict | None = None) -> dict:
        """What accelerate takes the cards and the host to have: more than any model, where the job does not say."""
        every = [*range(self.job.gpu_count), HOST]
        return dict.fromkeys(every, UNLIMITED) if given is None else accelerate.utils.modeling.get_max_memory(given)

    def wrap(self, model: torch.nn.Module, tracker: MemoryTracker) -> torch.nn.Module:
        """The model as it is: hooks that fetch a layer empty the cache in every step, so the load ends here."""
        tracker.mark(SETUP, 0, "adapters")
        return model

    def rank_classes(self, model: torch.nn.Module) -> list[RankClass]:
        """A class a card that something lies on: the batch lies on the first."""
        used = {0, *(place for place in self._map_of(model)[0].values() if isinstance(place, int))}
        return [RankClass(f"card {card}", card, card) for card in sorted(used)]


class _Mapped(MetaWeights):
    """Weights that lie where a map says."""

    def __init__(self, places: Places, found: dict[str, Any]):
        self.places, self.map = places, found
        self.places.home = self._place

    def allocate(self, model: torch.nn.Module, observer: MemoryTracker) -> None:
        """Every parameter and buffer at its place, then accelerate's hooks."""
        super().allocate(model, observer)
        if len(set(self.map.values())) > 1 or DISK in self.map.values():
            with observer.watching(model):
                self._dispatch(model)

    def adapted(self, model: torch.nn.Module, job: Job, task: str, observer: MemoryTracker) -> torch.nn.Module:
        """The model with adapters, each of which lies where its layer lies. While they are made no card has a name."""
        cards, self.places.cards = self.places.cards, 0
        try:
            return super().adapted(model, job, task, observer)
        finally:
            self.places.cards = cards

    def _dispatch(self, model: torch.nn.Module) -> None:
        """accelerate's hooks. What lies on the disk is fetched as what lies on the host: to the card, layer by layer.

        Its map has numbers of cards; a device of that number exists only where there are cards.
        """
        cards = [place for place in self.map.values() if isinstance(place, int)]
        devices = {
            name: torch.device("cuda", place) if isinstance(place, int) else HOST for name, place in self.map.items()
        }
        unchecked = getattr(model, "_no_placement_params", None) is not None
        with dispatching.skip_device_map_check() if unchecked else nullcontext():
            accelerate.dispatch_model(
                model,
                devices,
                main_device=torch.device("cuda", min(cards)) if cards else HOST,
                skip_keys=model._skip_keys_device_placement,
            )
        model.hf_device_map = dict(self.map)

    def _place(self, fqn: str) -> Place:
        """Where a module lies; what is of none, as the batch, on the first card."""
        return dispatching.expand_device_map(self.map, [fqn])[fqn] if fqn else 0


def _again(model: torch.nn.Module) -> torch.nn.Module:
    """One more model of the same config, without weights."""
    with torch.device("meta"):
        again = type(model)(copy.deepcopy(model.config)).to(model.dtype)
    again.tie_weights()
    return again


def _replacements(job: Job, tracker: MemoryTracker) -> Iterator[tuple[Any, str, Any]]:
    """What transformers and accelerate find replaced: holder, name and value."""
    yield _CheckpointFrame, "check_recomputed_tensors_match", lambda frame, number: None
    yield torch._C, "_group_tensors_by_device_and_dtype", _grouped
    yield torch.cuda, "device_count", lambda: job.gpu_count
    yield torch.cuda, "get_device_capability", lambda device=None: tracker.card.capability
    yield accelerate.utils.modeling, "clear_device_cache", lambda *args, **kwargs: tracker.empty_cache()


def _grouped(lists: list[list], with_indices: bool = False) -> dict[tuple, tuple[list[list], list[int]]]:
    """Lists of tensors by device and dtype of those in the first, as PyTorch groups them in C++ by the device that a
    tensor has there: one for all, of which kernels for several tensors at once (``_foreach``) would take all.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/ForeachUtils.h
    ``_group_tensors_by_first_tensors_device_and_dtype``.
    """
    groups: dict[tuple, tuple[list[list], list[int]]] = {}
    for index, first in enumerate(lists[0]):
        columns, indices = groups.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for column, tensors in zip(columns, lists, strict=True):
            if tensors:
                column.append(tensors[index])
        if with_indices:
            indices.append(index)
    return groups


def _quantizer_of(job: Job) -> Any:
    """transformers' quantiser for the job's quantisation, which knows what a layer will weigh."""
    if job.quantization is None:
        return None
    if job.quantization.type == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=job.quantization.type,
            bnb_4bit_use_double_quant=job.quantization.double_quant,
        )
    return AutoHfQuantizer.from_config(config, pre_quantized=False)


def _refuse_outside(found: dict[str, Any]) -> None:
    """bitsandbytes quantises nothing that is kept on the host."""
    if {HOST, DISK} & set(map(str, found.values())):
        raise PlanError(
            "Some modules are dispatched on the CPU or the disk: the cards do not hold the quantised model, and "
            "bitsandbytes keeps no quantised layer there",
            "raise max_memory, take more cards, or leave quantization out",
            "max_memory",
        )


def _check_cards(name: str, given: Any, cards: int) -> None:
    """Refuse a card that there is not."""
    named = given.keys() if name == "max_memory" and given else given.values() if isinstance(given, dict) else ()
    for place in map(_number, named):
        if place not in (HOST, DISK) and not (isinstance(place, int) and 0 <= place < cards):
            raise PlanError(f"{name} names {place!r}: there are {cards} cards, from 0 on, cpu and disk", "", name)


def _number(place: Any) -> Any:
    """A card's number, however it is named."""
    if isinstance(place, torch.device):
        return HOST if place.type == HOST else place.index or 0
    text = str(place).removeprefix("cuda:")
    return int(text) if text.isdigit() else place


def _with_numbers(given: dict[str, Any]) -> dict[Any, Any]:
    """A mapping as from_pretrained takes it: JSON has no numbers as keys."""
    return {_number(key): value for key, value in given.items()}
