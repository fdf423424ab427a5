"""What a job trains for with TRL: of each objective TRL's trainer, its config class, and the rows that it is fed.

Names are those of TRL's trainers, in lower case. ``rows`` of a row is relative to ``dryrun.steps``. How to add one:
``docs/add-an-objective.md``.

Source: https://github.com/huggingface/trl/blob/v1.16.0/trl/__init__.py#L103 ``DPOTrainer``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal


@dataclass(frozen=True)
class Objective:
    """One objective: ``module`` has the classes ``trainer`` and ``config``.

    ``rows`` makes a row of its data set. ``pairs``: a row has a prompt and completions, of the job's ``prompt_length``
    and ``completion_length``; else it is a sequence of ``sequence_length`` tokens. ``generates``: a step generates its
    completions, ``generations`` of a prompt unless the job says ``num_generations``; a batch is whole groups of them.
    ``rewards``: functions or models score the completions. ``teaches``: it learns from a teacher, a model of its own.
    ``task``: the Auto class that it trains, None: the job's own. ``refusal``: why it is not planned.
    """

    trainer: str = ""
    config: str = ""
    rows: str = ""
    module: str = "trl"
    pairs: bool = True
    generates: bool = False
    generations: int = 1
    rewards: bool = False
    teaches: bool = False
    task: str | None = None
    refusal: str | None = None


def _of(name: str, rows: str, module: str = "trl", **others: Any) -> Objective:
    return Objective(f"{name}Trainer", f"{name}Config", f".data_rows:{rows}", module, **others)


OBJECTIVES: dict[str, Objective] = {
    "sft": _of("SFT", "text", pairs=False),
    "dpo": _of("DPO", "preference"),
    "kto": _of("KTO", "unpaired_preference"),
    "reward": _of("Reward", "two_texts", task="sequence-classification"),
    "orpo": _of("ORPO", "tokenized_preference", "trl.experimental.orpo"),
    "cpo": _of("CPO", "tokenized_preference", "trl.experimental.cpo"),
    "grpo": _of("GRPO", "prompt", generates=True, generations=8, rewards=True),
    "rloo": _of("RLOO", "prompt", generates=True, generations=2, rewards=True),
    "gkd": _of("GKD", "conversation", "trl.experimental.gkd", generates=True, teaches=True),
    "distillation": _of("Distillation", "prompt", generates=True, teaches=True),
    "online_dpo": _of("OnlineDPO", "prompt", "trl.experimental.online_dpo", generates=True, rewards=True),
}
"""By the name that a job gives it."""

if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]
