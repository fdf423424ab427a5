"""Whose training step a job runs: the defaults of each trainer, and where its loop is.

``loop`` runs the steps, on the meta device and on a real card (``app/dryrun/steps/``). It takes (observer, model, job,
task, steps). How to add one: ``docs/add-a-trainer.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class Trainer:
    """One trainer.

    ``loop`` is relative to ``dryrun.steps``.
    ``mixed_precision``, ``optimizer``, ``checkpoints`` and ``prepares_for_kbit_training`` are what it does where a job
    says nothing (:meth:`vramplan.job.Job.resolved`).
    """

    loop: str
    mixed_precision: Literal["no", "bf16", "fp16"]
    optimizer: str
    checkpoints: bool = False
    """Gradient checkpointing is on by default, for other methods than qlora too."""
    prepares_for_kbit_training: bool = True
    """``peft.prepare_model_for_kbit_training`` is called on a quantised model."""
    fetches_all_batches: bool = True
    """All accumulated batches of a step lie on the card before the first one runs."""
    hosted: bool = True
    """The trainer's own class runs, which switches checkpointing on, and takes arguments (``trainer_args``)."""
    has_objectives: bool = False
    """Its ``objective`` is one of :data:`~vramplan.registry.objectives.OBJECTIVES`; else it is the model's own loss."""
    masks_always: bool = False
    """Its collator makes an attention mask whether or not a job asks for one."""
    packs_with_bounds: bool = False
    """Its collator tells where each packed sequence begins (``cu_seq_lens_q``, ``seq_idx`` …)."""
    chunks_loss: bool = False
    """Logits are made tile by tile in the loss, never all at once."""


TRAINERS: dict[str, Trainer] = {
    "pytorch": Trainer(".plain:run_plain", "no", "adamw_torch", fetches_all_batches=False, hosted=False),
    "transformers": Trainer(".hosted_trainer:run_hosted", "bf16", "adamw_torch_fused"),
    "trl": Trainer(
        ".hosted_trainer:run_hosted",
        "bf16",
        "adamw_torch_fused",
        checkpoints=True,
        prepares_for_kbit_training=False,
        has_objectives=True,
        masks_always=True,
        packs_with_bounds=True,
        chunks_loss=True,
    ),
}
"""By the name that a job gives it: a plain loop, ``transformers.Trainer``, ``trl.SFTTrainer``."""

PLAIN = "pytorch"
"""A plain loop; what a job names that trains nothing."""


def default_trainer(task: str | None) -> str:
    """Whose step a job means that names no trainer, by its task."""
    return "trl" if task == "causal-lm" else "transformers"


if TYPE_CHECKING:
    TrainerName = str
else:
    TrainerName = Literal[tuple(TRAINERS)]
