"""A pasted command, read by the table of flags of the engine that it starts."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import PlanError, near

LIMIT = 20_000
"""Characters of a command."""
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_SHELL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


@dataclass(frozen=True)
class Flags:
    """The documented flags of an engine's command.

    ``values`` take a word, ``lists`` as many as follow, ``switches`` none; ``short`` are other spellings. ``refused``:
    flags that change memory in a way that is not modelled, each with the sentence that says so.
    ``honoured``: those that the plan reads. All others cost nothing on the card.
    """

    starts: tuple[tuple[str, ...], ...]
    values: frozenset[str]
    switches: frozenset[str]
    lists: frozenset[str]
    short: Mapping[str, str]
    honoured: frozenset[str]
    refused: Mapping[str, str]

    @property
    def known(self) -> frozenset[str]:
        """Every flag, without its dashes."""
        return self.values | self.switches | self.lists


@dataclass(frozen=True)
class Command:
    """A command as read: the model, each flag's value (True for a switch, False for its ``--no-`` form), the
    environment before it, and the flags that cost nothing."""

    model: str | None
    given: dict[str, Any]
    environment: dict[str, str]
    free: tuple[str, ...] = field(default=())

    def number(self, flag: str, default: Any, kind: type = int) -> Any:
        """The value of ``flag`` as a number; ``2k`` and ``2K`` are 2000 and 2048, as vLLM reads them."""
        text = self.given.get(flag)
        if text is None:
            return default
        found = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgtKMGT]?)", str(text))
        if found is None:
            raise PlanError(f"--{flag} is {str(text)[:60]!r}, no number", f"write --{flag} and a number", "command")
        scale = {"": 1, **{c: 1000 ** (n + 1) for n, c in enumerate("kmgt")}}
        scale |= {c: 1024 ** (n + 1) for n, c in enumerate("KMGT")}
        value = float(found[1]) * scale[found[2]]
        if kind is int and value != int(value):
            raise PlanError(f"--{flag} is {text}, no whole number", f"write --{flag} and a whole number", "command")
        return kind(value)

    def settings(self, flag: str) -> dict[str, Any]:
        """The value of ``flag`` as a JSON object; none: empty."""
        text = self.given.get(flag)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except (TypeError, ValueError):
            value = None
        if not isinstance(value, dict):
            raise PlanError(f"--{flag} is {str(text)[:60]!r}, no JSON object", "quote it: '{\"method\": …}'", "command")
        return value


def words_of(text: str) -> tuple[dict[str, str], list[str]]:
    """The variables set before a command, and its words. Line ends behind a backslash join lines.

    Raises :class:`PlanError` for what a shell could not read, and for more than one command.
    """
    if not isinstance(text, str) or not text.strip():
        raise PlanError("there is no command", "paste what starts the server: vllm serve MODEL", "command")
    if len(text) > LIMIT:
        raise PlanError(f"a command of {len(text)} characters is too long", f"send at most {LIMIT}", "command")
    try:
        words = shlex.split(re.sub(r"\\\s*\n", " ", text.strip()), comments=True)
    except ValueError as error:
        raise PlanError(f"the command cannot be read: {error}", "check its quotes", "command") from None
    if words[:1] in (["$"], ["#"]):
        words = words[1:]
    if any(word in ("|", "||", "&&", ";", ">", "2>&1") for word in words):
        raise PlanError("these are several commands", "paste the one that starts the server", "command")
    words = words[:-1] if words[-1:] == ["&"] else words
    words = words[1:] if words[:1] == ["env"] else words
    count = next((n for n, word in enumerate(words) if not _SHELL.match(word)), len(words))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def start_of(words: list[str], starts: tuple[tuple[str, ...], ...]) -> int:
    """How many words are the engine's own name (``python3 -m sglang.launch_server``); 0: another program."""
    plain = [re.sub(r"^(.*/)?python[\d.]*$", "python", words[0]), *words[1:]] if words else []
    plain = [plain[0].rsplit("/", 1)[-1], *plain[1:]] if plain else []
    return max((len(start) for start in starts if tuple(plain[: len(start)]) == start), default=0)


def read(words: list[str], environment: dict[str, str], flags: Flags) -> Command:
    """The command of these words (without the engine's name). Raises :class:`PlanError`."""
    given: dict[str, Any] = {}
    model: str | None = None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or _NUMBER.fullmatch(word):
            if model is not None:
                raise PlanError(f"{word[:60]!r} follows no flag", "a flag begins with two dashes", "command")
            model = word
            continue
        name, equals, value = word.partition("=")
        flag, nested = _flag(name, flags)
        if flag in flags.refused:
            raise PlanError(f"--{flag}: {flags.refused[flag]}", "leave it out to plan the rest", "command")
        if nested:
            given.setdefault(f"{flag}.", {})[nested] = value if equals else _value(flag, rest)
        elif flag in flags.switches:
            given[flag] = not name.startswith("--no-") or flag.startswith("no-")
        elif flag in flags.lists:
            given[flag] = [value] if equals else [_value(flag, rest), *_following(rest)]
        else:
            given[flag] = value if equals else _value(flag, rest)
    free = tuple(sorted(flag for flag in given if flag.rstrip(".") not in flags.honoured))
    return Command(model, given, environment, free)


def _flag(name: str, flags: Flags) -> tuple[str, str]:
    """The flag's own name, and what follows its dot (``--compilation-config.level``)."""
    plain, _, nested = flags.short.get(name, name.lstrip("-").replace("_", "-")).partition(".")
    if plain in flags.known:
        return plain, nested
    if plain.startswith("no-") and plain[3:] in flags.switches:
        return plain[3:], ""
    begun = [flag for flag in flags.known if len(plain) > 1 and flag.startswith(plain)]  # argparse takes abbreviations
    if len(begun) == 1:
        return begun[0], nested
    raise PlanError(f"{name[:80]!r} is no flag of this command", near(plain, sorted(flags.known)), "command")


def _value(flag: str, rest: list[str]) -> str:
    if not rest or (rest[0].startswith("--") and not _NUMBER.fullmatch(rest[0])):
        raise PlanError(f"--{flag} has no value", f"write --{flag} and its value", "command")
    return rest.pop(0)


def _following(rest: list[str]) -> list[str]:
    """The further words of a list."""
    count = next((n for n, word in enumerate(rest) if word.startswith("-")), len(rest))
    taken, rest[:count] = rest[:count], []
    return taken
