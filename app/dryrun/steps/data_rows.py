"""The rows that a trainer is fed: what its own preparation would leave of a text, as many tokens as the job says.

They go to the trainer's own collator. Fields are those that the trainers of trl 1.16 keep:
https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/dpo_trainer.py#L86 ``DataCollatorForPreference``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...errors import PlanError
from ...job import Job
from ...registry import load
from ..inputs import lengths
from ..known_values import LIMIT

Row = dict[str, Any]
WORD = "w1"
"""The word of which texts are made, and (:data:`TOKEN`) its number."""
TOKEN = 1


def _ids(count: int) -> list[int]:
    return [TOKEN] * count


PARTS = ("assistant_only_loss", "completion_only_loss")
"""Arguments that have SFT learn a part of each sequence: the second half is taken."""


def text(job: Job, number: int) -> Row:
    """SFT. Of padded rows the last token is the collator's; packed ones have the lengths of their documents."""
    count = job.sequence_length - (job.attention_mask == "padded")
    row: Row = {"input_ids": _ids(count), "labels": _ids(count)}
    given = job.trainer_args
    if given.get("packing") and given.get("packing_strategy", "bfd").startswith("bfd"):
        document = given.get("document_length", count)
        row["seq_lengths"] = [min(document, count - start) for start in range(0, count, document)]
    elif job.packed:
        row["seq_lengths"] = lengths(count)
    if any(given.get(name) for name in PARTS):
        row["labels"] = [-100] * (count // 2) + _ids(count - count // 2)
    if given.get("assistant_only_loss"):
        row["messages"] = [{"role": "assistant", "content": WORD}]  # the trainer asks whether rows are conversations
    return row


def preference(job: Job, number: int) -> Row:
    """DPO."""
    answers = {name: _ids(job.completion_length) for name in ("chosen_ids", "rejected_ids")}
    return {"prompt_ids": _ids(job.prompt_length), **answers}


def unpaired_preference(job: Job, number: int) -> Row:
    """KTO."""
    row: Row = {"prompt_ids": _ids(job.prompt_length), "completion_ids": _ids(job.completion_length)}
    if job.trainer_args.get("loss_type", "kto") == "kto":
        row["KL_completion_ids"] = _ids(job.completion_length)
    return {**row, "label": number % 2 == 0}


def two_texts(job: Job, number: int) -> Row:
    """Reward models."""
    whole = _ids(job.prompt_length + job.completion_length)
    margin = {"margin": 0.5} if job.trainer_args.get("margin") else {}
    return {"chosen_ids": whole, "rejected_ids": whole, **margin}


def tokenized_preference(job: Job, number: int) -> Row:
    """ORPO and CPO, as their ``tokenize_row`` leaves it."""
    row: Row = {"prompt": WORD, "chosen": WORD, "rejected": WORD}
    row |= {"prompt_input_ids": _ids(job.prompt_length), "prompt_attention_mask": _ids(job.prompt_length)}
    for name in ("chosen", "rejected"):
        row[f"{name}_input_ids"] = row[f"{name}_attention_mask"] = _ids(job.prompt_length + job.completion_length)
        row[f"{name}_labels"] = [-100] * job.prompt_length + _ids(job.completion_length)
    return row


def prompt(job: Job, number: int) -> Row:
    """What generates its completions: GRPO, RLOO, distillation, online DPO."""
    return {"prompt": _words(job.prompt_length)}


def conversation(job: Job, number: int) -> Row:
    """GKD: a question and its answer, to which the template adds nothing."""
    turns = (("user", job.prompt_length), ("assistant", job.completion_length))
    return {"messages": [{"role": role, "content": _words(count)} for role, count in turns]}


def _words(count: int) -> str:
    return " ".join([WORD] * count)


PERIOD = 2
"""Rows after which a data set begins anew: KTO's labels alternate."""


@functools.cache
def _prepared() -> type:
    from datasets import Dataset

    class Prepared(Dataset):
        """Rows that are tokens already, the few that differ, over and over.

        What would tokenise, pack, filter or shuffle them leaves them as they are.
        """

        count = 0

        def _same(self, *args, **kwargs):
            return self

        map = filter = shuffle = select_columns = _same

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, key):
            return super().__getitem__(key % self.num_rows if isinstance(key, int) else key)

        def __getitems__(self, keys):
            return [self[key] for key in keys]

        def __iter__(self):
            return (self[number] for number in range(self.count))

    return Prepared


def repeated(rows: list[Row], count: int):
    """A data set of ``count`` rows: these, over and over."""
    found = _prepared().from_list(rows)
    found.count = count
    return found


def dataset_of(job: Job, count: int):
    """A data set of so many rows of the job. Raises :class:`PlanError` where a batch has more than can be followed."""
    if job.batch_size * job.sequence_length > LIMIT:
        raise PlanError(
            f"a batch of more than {LIMIT} tokens is not planned with trainer_args or an objective",
            "set a smaller batch_size, or shorter sequences",
            "batch_size",
        )
    make: Callable[[Job, int], Row] = load(job.goal.rows, __package__)
    return repeated([make(job, number) for number in range(PERIOD)], count)
