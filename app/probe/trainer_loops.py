"""The real ``Trainer`` and ``SFTTrainer``, with a mark where each phase begins; they change nothing else."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers

from ..dryrun.inputs import lengths, make_batch
from ..dryrun.steps.phases import label_grads_and_state
from ..errors import PlanError
from ..job import Job
from ..registry.optimizers import OPTIMIZERS


class _Marked:
    """Tells the recorder of a Trainer's phases: a batch is fetched, the loss is there, gradients are clipped."""

    recorder = None

    def get_batch_samples(self, *args, **kwargs):
        self._forward = self.state.global_step + 1
        self.recorder.mark("forward", self._forward)
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        if self._forward is None:
            self.recorder.mark("forward", self.state.global_step + 1)
        self._forward = None
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.recorder.mark("backward", self.state.global_step + 1)
        return loss

    def _clip_grad_norm(self, model):
        self.recorder.mark("optimizer", self.state.global_step + 1)
        return super()._clip_grad_norm(model)


class _StepEnds(transformers.TrainerCallback):
    def __init__(self, recorder):
        self.recorder = recorder

    def on_step_end(self, args, state, control, **kwargs):
        self.recorder.mark("end", state.global_step)


class _Rows(torch.utils.data.Dataset):
    """``count`` rows of random data on the host, shaped as the job's batches of ``size`` sequences.

    A sequence's images may be many rows of a tensor: they stay together, and a batch is rows one after the other, or
    side by side along ``dim`` 1 where they are packed.
    """

    def __init__(self, count: int, size: int, batch: dict[str, torch.Tensor], dim: int):
        self.count, self.size, self.batch, self.dim = count, size, batch, dim

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor.chunk(self.size, self.dim)[index % self.size] for name, tensor in self.batch.items()}

    def collated(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([row[name] for row in rows], self.dim) for name in rows[0]}


class _OnHost:
    device = "cpu"

    def __init__(self, recorder):
        self.register_batch = recorder.register_batch
        self.images, self.values = recorder.images, recorder.values


def run_trainer(recorder, model, job: Job, task: str, steps: int) -> None:
    """``trainer: transformers``: ``steps`` steps, of two accumulated batches at most."""
    recorder.mark("load", 0)
    batch = make_batch(_OnHost(recorder), model, job, task)
    _run(recorder, model, job, batch, steps, _trainer)


def run_sft_trainer(recorder, model, job: Job, task: str, steps: int) -> None:
    """``trainer: trl``, likewise."""
    if recorder.images is not None:
        raise PlanError("SFTTrainer's rows hold no images here", "measure it with another trainer", "trainer")
    recorder.mark("load", 0)
    batch = make_batch(_OnHost(recorder), model, job, task)
    batch = {name: batch[name] for name in ("input_ids", "labels")}  # its collator makes the rest
    _run(recorder, model, job, batch, steps, _sft_trainer)


def _run(recorder, model, job: Job, batch: dict[str, torch.Tensor], steps: int, make) -> None:
    """Train for so many steps on ``batch``, with the Trainer that ``make`` constructs."""
    named = OPTIMIZERS[job.optimizer].named_by_transformers
    own = None if named else OPTIMIZERS[job.optimizer].make([p for p in model.parameters() if p.requires_grad])
    rows = _Rows(job.batch_size * job.gradient_accumulation_steps * steps, job.batch_size, batch, int(job.packed))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(recorder, model, job, rows, _arguments(job, folder, steps, recorder.device), own)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    recorder.close()
    label_grads_and_state(recorder, [], trainer.optimizer)


def _arguments(job: Job, folder: str, steps: int, device: str) -> dict[str, Any]:
    """The arguments that ``TrainingArguments`` and ``SFTConfig`` have in common."""
    checkpointing = job.gradient_checkpointing != "off"
    kwargs = {"use_reentrant": job.gradient_checkpointing == "reentrant"} if checkpointing else None
    return {
        "output_dir": folder,
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "max_steps": steps,
        "bf16": job.mixed_precision == "bf16",
        "fp16": job.mixed_precision == "fp16",
        "optim": job.optimizer if OPTIMIZERS[job.optimizer].named_by_transformers else "adamw_torch",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": kwargs,
        "use_cpu": device == "cpu",
    }


def _trainer(recorder, model, job: Job, rows: _Rows, common: dict, own) -> transformers.Trainer:
    class Probed(_Marked, transformers.Trainer):
        pass

    Probed.recorder = recorder
    return Probed(
        model=model,
        args=transformers.TrainingArguments(**common, remove_unused_columns=False),
        train_dataset=rows,
        data_collator=rows.collated,
        callbacks=[_StepEnds(recorder)],
        optimizers=(own, None),
    )


def _sft_trainer(recorder, model, job: Job, rows: _Rows, common: dict, own) -> transformers.Trainer:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Probed(_Marked, SFTTrainer):
        pass

    Probed.recorder = recorder
    length = job.sequence_length
    data = [{name: tensor[0].tolist() for name, tensor in rows[i].items()} for i in range(len(rows))]
    if job.attention_mask == "padded":
        data = [{name: tokens[:-1] for name, tokens in row.items()} for row in data]
    if job.packed:
        data = [{**row, "seq_lengths": lengths(length)} for row in data]
    arguments = SFTConfig(
        **common,
        max_length=length,
        pad_to_multiple_of=length,
        packing=job.packed,
        dataset_kwargs={"skip_prepare_dataset": True},
        loss_type="nll",
    )
    return Probed(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=_tokenizer(),
        callbacks=[_StepEnds(recorder)],
        optimizers=(own, None),
    )


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of a few words: SFTTrainer asks for one, the rows are tokens already."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(100)} | {"<pad>": 100, "<unk>": 101, "<eos>": 102}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
