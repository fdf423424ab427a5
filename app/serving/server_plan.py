"""The answer to a command that starts a server: the engine found, its model, its plan."""

from __future__ import annotations

from typing import Any, Protocol

from ..catalog.gpus import Gpu
from ..errors import PlanError
from ..form import to_job
from ..job import OwnGpu, read_job
from ..planning.cards import id_of
from ..planning.resolve import card_of
from . import llamacpp, sglang, vllm
from .command import Command, Flags, read, start_of, words_of
from .llamacpp_flags import FLAGS as LLAMA
from .named_model import config_named
from .sglang_flags import FLAGS as SGLANG
from .vllm_flags import FLAGS as VLLM


class Engine(Protocol):
    """A module that plans an engine's servers."""

    VERSION: str
    """The release whose rules it follows."""

    def plan(self, command: Command, config: dict, card: Gpu | OwnGpu) -> dict[str, Any]:
        """The fields of the answer that are the engine's. Raises :class:`PlanError`."""


ENGINES: dict[str, tuple[Flags, Engine]] = {
    "vllm": (VLLM, vllm),
    "sglang": (SGLANG, sglang),
    "llama.cpp": (LLAMA, llamacpp),
}
"""By name: the flags of an engine's command, and the module that plans it."""
FIELDS = ("command", "gpu", "config")


def answer(asked: Any) -> dict[str, Any]:
    """The plan of ``{"command", "gpu", "config"}``. Raises :class:`PlanError`."""
    if not isinstance(asked, dict) or "command" not in asked:
        raise PlanError("a server is asked for by its command", '{"command": "vllm serve …", "gpu": "h100"}', "command")
    unknown = sorted(set(asked) - set(FIELDS))
    if unknown:
        raise PlanError(f"{str(unknown[0])[:60]!r} is no field of a server", f"one of {', '.join(FIELDS)}", "command")
    card = _card(asked.get("gpu"))
    name, command = _command(asked["command"])
    engine, named = ENGINES[name][1], _named(command)
    config, source = config_named(named, asked.get("config"), command.given.get("revision"))
    return {
        "engine": {"name": name, "version": engine.VERSION},
        "model": {**source, "named": named},
        "gpu": id_of(card),
        **engine.plan(command, config, card),
        "ignored": list(command.free),
    }


def model_read(asked: Any) -> str | None:
    """The model whose config would be read for this question; None: there is none to read. Raises
    :class:`PlanError`."""
    if not isinstance(asked, dict) or asked.get("config") is not None or "command" not in asked:
        return None
    return _named(_command(asked["command"])[1])


def _command(text: Any) -> tuple[str, Command]:
    """The engine's name, and its command as read."""
    environment, words = words_of(text)
    for name, (flags, _) in ENGINES.items():
        if start := start_of(words, flags.starts):
            return name, read(words[start:], environment, flags)
    starts = ", ".join(" ".join(flags.starts[0]) for flags, _ in ENGINES.values())
    raise PlanError(
        "this command starts no server that is known here", f"paste one that begins with {starts}", "command"
    )


def _named(command: Command) -> str | None:
    """The model whose config a command means; a repository of GGUF files stands for what it was made from."""
    repository = command.given.get("hf-repo")
    if repository:
        return str(repository).partition(":")[0].removesuffix("-GGUF")
    return command.given.get("model") or command.given.get("model-path") or command.model


def _card(gpu: Any) -> Any:
    """The card that is named, an object of one's own, or text such as ``24GiB``. Raises :class:`PlanError`."""
    given = to_job([("gpu", gpu)]).get("gpu") if isinstance(gpu, str) else gpu
    job = read_job({"model": "gpt2", **({"gpu": given} if given is not None else {})})
    card = card_of(job)
    if not isinstance(card, OwnGpu) and card.compute_capability is None:
        raise PlanError(f"{card.name} runs ROCm, whose kernels are not modelled", "choose an NVIDIA card", "gpu")
    return card
