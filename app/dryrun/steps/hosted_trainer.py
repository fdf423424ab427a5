"""Any ``transformers.Trainer`` as it is: made by its own constructor, run by its own ``train()``, watched from inside.

:class:`Watched` is mixed into the trainer's class. It says where phases begin, and what turned out to be a gradient or
a state, for the dry run and for the probe alike. :class:`OnMeta` is what a dry run adds: there is no card, so it hands
out the batch that the job states, and leaves out what takes time and no memory.

Source: https://github.com/huggingface/transformers/blob/v5.17.0/src/transformers/trainer.py ``_run_epoch``;
https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py ``SFTTrainer``.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from transformers.core_model_loading import revert_weight_conversion

from ...errors import PlanError
from ...job import Job
from ...memory.events import SETUP
from ...registry import load
from ...registry.optimizers import LEARNING_RATE, optimizer_of, refused
from ..inputs import base_of, make_batch
from ..observer import StepObserver
from ..parallel import strategy_of
from ..sandbox import names_restored
from ..symbols import number_of
from . import empty_triton
from .data_rows import PERIOD, dataset_of, repeated
from .host_rows import HostRows
from .offloading import streams_and_addresses
from .one_card import as_one_card
from .phases import begin_forward, label_grads_and_state
from .short_generation import few_tokens
from .trainer_arguments import arguments_of, common_arguments
from .trainer_models import made_here, reward_functions, reward_tokenizers, teacher_of

EVAL_BATCHES = 256
"""Batches that an evaluation runs at most; each is run."""
TILES = 1024
"""Tiles of words in which TRL's chunked head computes a loss, at most; each is run."""


class Enough(Exception):
    """All that was asked for has run."""


class Watched:
    """A Trainer that tells its ``observer`` where phases begin.

    ``steps`` steps are trained; with ``other`` a forward pass more runs, of
    :data:`~vramplan.dryrun.tracker.FORWARD_OTHER_CHECKPOINTING`.
    """

    observer: StepObserver
    job: Job
    task: str
    steps: int
    other: bool
    _begun: int | None = None

    def get_batch_samples(self, *args, **kwargs):
        """The batches of a step are fetched: its forward phase begins."""
        self._begin()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        """One batch: its forward phase begins, unless it began with the fetching; its gradients are told afterwards."""
        if self._begun is None:
            self._begin()
        self._begun = None
        loss = super().training_step(*args, **kwargs)
        label_grads_and_state(self.observer, self.trained)
        return loss

    def compute_loss(self, *args, **kwargs):
        """The forward pass. Behind it the backward phase begins; in an evaluation it is a phase within."""
        if not self.model.training:
            with self.observer.during("forward"):
                return super().compute_loss(*args, **kwargs)
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step >= self.steps:
            self.observer.close()  # before the pass is undone: what it keeps is what the table tells
            raise Enough
        self.observer.mark("backward", self.state.global_step + 1, "activation_gradients")
        return loss

    def _clip_grad_norm(self, model):
        self._begin_optimizer()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        self._begin_optimizer()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _begin(self) -> None:
        self._begun = self.state.global_step + 1
        if self._begun > self.steps and not self.other:
            raise Enough
        begin_forward(self.observer, self.model, self.job, self._begun, self.steps)

    def _begin_optimizer(self) -> None:
        if self.observer.phase == "backward":
            self.observer.mark("optimizer", self.state.global_step + 1, "optimizer_temporaries")

    @functools.cached_property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # --- phases within others, of the trainers that have them ---------------------------------------------------

    def _generate_and_score_completions(self, *args, **kwargs):
        with self.observer.during("score"):
            return super()._generate_and_score_completions(*args, **kwargs)

    def _generate_single_turn(self, *args, **kwargs):
        with self.observer.during("generate"):
            return super()._generate_single_turn(*args, **kwargs)

    def _generate(self, *args, **kwargs):
        with self.observer.during("generate"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args, **kwargs):
        with self.observer.during("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def _precompute_ref_logps(self, *args, **kwargs):
        with self.observer.during("precompute"):
            return super()._precompute_ref_logps(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """A phase of its own."""
        with self.observer.during("eval"):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        with self.observer.during("save"):
            return super()._save_checkpoint(*args, **kwargs)


class OnMeta(Watched):
    """A watched Trainer on the meta device."""

    def get_batch_samples(self, *args, **kwargs):
        """Beside the batches that are run lie those that are not."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        return _Fetched(samples, self._left_out(samples)), items

    def create_accelerator_and_postprocess(self) -> None:
        """accelerate refuses fp16 but for devices that it knows by name: while it is made there is one of those."""
        from accelerate.state import AcceleratorState, PartialState

        device = torch.device(self.observer.device)
        process, accelerator = PartialState._shared_state, AcceleratorState._shared_state  # the trace's own
        process["device"] = torch.device("cuda")
        super().create_accelerator_and_postprocess()
        process["device"] = accelerator["device"] = device
        self.accelerator.device_placement = self.observer.places is not None  # else what there is lies on the card
        self.accelerator.backward = self._observed(self.accelerator.backward)

    def _observed(self, backward: Callable) -> Callable:
        def run(*args, **kwargs):
            if self.observer.phase == "forward":  # a step that computes its loss itself
                self.observer.mark("backward", self.state.global_step + 1, "activation_gradients")
            self.observer.in_backward = True
            try:
                return backward(*args, **kwargs)
            finally:
                self.observer.in_backward = False

        return run

    def _move_model_to_device(self, model, device) -> None:
        """It lies there, unless there are several places."""
        if self.observer.places is not None:
            super()._move_model_to_device(model, device)

    def get_train_dataloader(self):
        """Batches that lie on the card when they are fetched: where the job states rows, those of the trainer's own
        loader and collator; else their sizes may be symbols, and no loader makes them."""
        if self.job.states_rows:
            return self._on_card(super().get_train_dataloader)
        rows = self.job.batch_size * max(1, self.args.n_gpu)
        job = self.job.model_copy(update={"batch_size": rows})
        return _Loader(lambda: make_batch(self.observer, self.model, job, self.task), 1 << 20)

    def get_eval_dataloader(self, eval_dataset=None):
        """The same for an evaluation."""
        if self.job.states_rows:
            return self._on_card(super().get_eval_dataloader, eval_dataset)
        size = self.args.per_device_eval_batch_size
        job = self.job.model_copy(update={"batch_size": size})
        count = -(-len(self.eval_dataset) // size)
        return _Loader(lambda: make_batch(self.observer, self.model, job, self.task), count, size)

    def _on_card(self, make, *args):
        """A loader that takes its batches to the card."""
        self.accelerator.device_placement = True
        try:
            return make(*args)
        finally:
            self.accelerator.device_placement = False

    def _left_out(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """The accumulated batches that are not run: they lie there as one, for all are fetched before the first."""
        more = self.job.gradient_accumulation_steps - len(samples)
        if not more:
            return {}
        tensors = {name: tensor for name, tensor in samples[0].items() if isinstance(tensor, torch.Tensor)}
        rest = {name: tensor.new_empty(more, *tensor.shape) for name, tensor in tensors.items()}
        self.observer.register_batch(rest, {})
        return rest

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        """The reference's probabilities of one batch, as of every batch of the data set; they are kept on the host."""
        rows = [dataset[number] for number in range(batch_size)]
        with self.observer.during("precompute"):
            batch = send_to_device(self.data_collator(rows), self.observer.device)
            found = self.compute_ref_log_probs(self.ref_model or self.model, batch)
            del batch, found
        names = ("ref_chosen_logps", "ref_rejected_logps") if "chosen_ids" in rows[0] else ("ref_logps", "ref_KL_logps")
        return repeated([{**dataset[number], **dict.fromkeys(names, 0.0)} for number in range(PERIOD)], len(dataset))

    def _save_checkpoint(self, model, trial) -> None:
        """What writing takes of the card: what a checkpoint holds apart and the model fused; the rest goes to files."""
        with self.observer.during("save"):
            written = revert_weight_conversion(base_of(model), base_of(model).state_dict())
            written = {name: tensor.contiguous() for name, tensor in written.items()}
            del written

    def floating_point_ops(self, inputs) -> int:
        """It counts all parameters for every batch, for the log."""
        return 0

    def get_decay_parameter_names(self, model) -> frozenset[str]:
        """It is asked for each parameter whether it is in here: a list takes minutes for many."""
        return frozenset(super().get_decay_parameter_names(model))


class _Fetched(list):
    """The batches of a step, and what lies beside them."""

    def __init__(self, samples: list, beside: dict):
        super().__init__(samples)
        self.beside = beside


class _Loader:
    """As much of a data loader as a trainer asks of it."""

    def __init__(self, make: Callable[[], dict], length: int, batch_size: int = 1):
        self.make, self.length, self.batch_size = make, length, batch_size
        self.dataset = range(length * batch_size)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict]:
        return (self.make() for _ in range(self.length))


class _StepEnds(transformers.TrainerCallback):
    """Where the optimiser has run, and where the step ends; ``builds``: the trainer has made models of its own;
    ``shards``: it has sharded the model."""

    def __init__(self, observer: StepObserver, builds: bool = False, shards: bool = False):
        self.observer, self.builds, self.shards = observer, builds, shards

    def on_train_begin(self, args, state, control, **kwargs):
        if self.builds or self.shards:  # what it made lies there before the first step
            self.observer.mark(SETUP, 0, "adapters")
        if self.shards:
            self.observer.empty_cache()

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        label_grads_and_state(self.observer, [p for p in model.parameters() if p.requires_grad], optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        self.observer.mark("end", state.global_step, "temporaries")


def run_hosted(observer: StepObserver, model, job: Job, task: str, steps: int, other: bool = False) -> None:
    """``steps`` steps of the trainer that the job names; then, with ``other``, one forward pass more."""
    observer.mark(SETUP, 0, "adapters")
    with contextlib.ExitStack() as undo:
        folder = undo.enter_context(tempfile.TemporaryDirectory())
        if observer.device == "meta":
            undo.enter_context(as_one_card(observer, job))
        try:
            _train(_Setting(observer, model, job, task, steps, other, folder, undo))
        except ImportError as error:
            raise _missing(job, error) from None
        observer.close()


def _train(setting: _Setting) -> None:
    """Make the trainer, and run its steps."""
    make = _trl_trainer if setting.job.trainer == "trl" else _trainer
    trainer = make(setting)
    trainer.remove_callback(transformers.PrinterCallback)
    _give_optimizer(trainer, setting.job.optimizer)
    with contextlib.suppress(Enough):
        trainer.train()


def _missing(job: Job, error: ImportError) -> PlanError:
    """A package that the job asks for is not installed."""
    if job.trainer_args.get("use_liger_kernel") and "liger" in str(error).lower():
        package = "liger-kernel"
        hint = f"pip install --no-deps {package}"
        return PlanError(f"use_liger_kernel needs the package {package}", hint, "trainer_args")
    return refused(job.optimizer, error)


class _Setting:
    """What a trainer is made of."""

    def __init__(self, observer: StepObserver, model, job: Job, task: str, steps: int, other: bool, folder, undo):
        self.observer, self.model, self.job, self.task = observer, model, job, task
        self.steps, self.other, self.undo = steps, other, undo
        self.on_meta = observer.device == "meta"
        batches = job.batches_run if self.on_meta else job.gradient_accumulation_steps
        self.rows = number_of(job.batch_size) * batches * (steps + other)
        self.common = common_arguments(job, steps + other, batches, folder)
        self.common["dataloader_pin_memory"] = not self.on_meta
        self.common |= strategy_of(job).trainer_arguments() if self.on_meta else {}
        if observer.device == "cpu":
            self.common["use_cpu"] = True

    def watched(self, trainer: type) -> type:
        """The trainer's class, watched."""
        names = {name: getattr(self, name) for name in ("observer", "job", "task", "steps", "other")}
        return type(trainer.__name__, (OnMeta if self.on_meta else Watched, trainer), names)


def _give_optimizer(trainer, name: str) -> None:
    """Hand over the optimiser that ``TrainingArguments.optim`` has no name for: made of all that is trained, in the
    model's order, or as a class."""
    row = optimizer_of(name)
    if row.named_by_transformers:
        return
    kind = load(row.constructor)
    if row.handed_over:
        trainer.optimizer = kind(trainer.trained, lr=LEARNING_RATE, **row.arguments)
    else:
        trainer.optimizer_cls_and_kwargs = kind, row.arguments


def _trainer(setting: _Setting):
    """``transformers.Trainer`` of the job."""
    job = setting.job
    arguments = arguments_of(job, transformers.TrainingArguments, setting.common | {"remove_unused_columns": False})
    _use_empty_triton(setting, arguments)
    given = _data_on_meta(job) if setting.on_meta else _data_on_host(setting)
    return setting.watched(transformers.Trainer)(
        model=setting.model,
        args=arguments,
        callbacks=[_StepEnds(setting.observer, shards=job.strategy != "single")],
        **given,
    )


def _data_on_meta(job: Job) -> dict[str, Any]:
    """No data: the loader makes the batches."""
    return {"train_dataset": range(1 << 20), "data_collator": list, **_evaluation(job, range)}


def _data_on_host(setting: _Setting) -> dict[str, Any]:
    """Rows of random data, in the shape of the job's batch."""
    rows = HostRows(setting.observer, setting.model, setting.job, setting.task, setting.rows)
    return {"train_dataset": rows, "data_collator": rows.collated, **_evaluation(setting.job, rows.first)}


def _trl_trainer(setting: _Setting):
    """TRL's trainer of the job's objective."""
    observer, job, model = setting.observer, setting.job, setting.model
    goal, base = job.goal, base_of(model)
    trainer, config = load(f"{goal.module}:{goal.trainer}"), load(f"{goal.module}:{goal.config}")
    _refuse_what_it_does_not_take(setting, trainer, base)
    arguments = arguments_of(job, config, setting.common | _sft_arguments(setting))
    _use_empty_triton(setting, arguments)
    if getattr(arguments, "activation_offloading", False) and setting.on_meta:
        setting.undo.enter_context(streams_and_addresses(observer))
    setting.undo.enter_context(made_here(trainer, observer, model, base))
    given = {"model": model}
    if base is not model:  # adapted already: the trainer asks for that, too
        given = {"model": base, "peft_config": model.peft_config[model.active_adapter]}
    if goal.teaches:
        given["teacher_model"] = teacher_of(observer, job, model, base)
    if goal.generates and setting.on_meta:
        setting.undo.enter_context(few_tokens(observer))
    if goal.rewards:
        given["reward_funcs"] = functions = reward_functions(observer, job)
        given["reward_processing_classes"] = reward_tokenizers(functions, tokenizer())
    return setting.watched(trainer)(
        **given,
        args=arguments,
        train_dataset=_rows(setting, setting.rows),
        processing_class=tokenizer(),
        callbacks=[_StepEnds(observer, goal.pairs, job.strategy != "single")],
        **_evaluation(job, functools.partial(_rows, setting)),
    )


def _rows(setting: _Setting, count: int):
    """A data set of so many rows. Where the loader makes the batches, the trainer reads no more than a row's fields:
    the row is short, for the job's sizes may be symbols."""
    job = setting.job
    if setting.on_meta and not job.states_rows:
        job = job.model_copy(update={"batch_size": 1, "sequence_length": 2})
    return dataset_of(job, count)


def _sft_arguments(setting: _Setting) -> dict[str, Any]:
    """What SFT's config is told of the job beside: rows are prepared; on a card they are padded to the job's length."""
    job = setting.job
    if job.goal.pairs:
        return {}
    told: dict[str, Any] = {"packing": job.packed, "dataset_kwargs": {"skip_prepare_dataset": True}}
    if job.attention_mask == "padded" or not setting.on_meta:
        told |= {"max_length": number_of(job.sequence_length), "pad_to_multiple_of": number_of(job.sequence_length)}
    return told


def _use_empty_triton(setting: _Setting, arguments: Any) -> None:
    """Liger's kernels are imported when they are asked for, and set in the modules of the model and of its loss."""
    if getattr(arguments, "use_liger_kernel", False) and setting.on_meta:
        modules = {sys.modules[type(module).__module__] for module in setting.model.modules()}
        setting.undo.enter_context(names_restored([torch.nn.functional, transformers.loss.loss_utils, *modules]))
        setting.undo.enter_context(empty_triton.installed())


def _evaluation(job: Job, rows: Callable[[int], Any]) -> dict[str, Any]:
    """What a trainer that evaluates is given: as many rows as the job says, else two batches; its metrics."""
    given = job.trainer_args
    if given.get("eval_strategy", "no") == "no":
        return {}
    size = given.get("per_device_eval_batch_size", 8)
    count = given.get("eval_rows", 2 * size)
    if count > size * EVAL_BATCHES:
        raise PlanError(
            f"an evaluation of more than {EVAL_BATCHES} batches is not planned",
            "set trainer_args.eval_rows to fewer, or a larger per_device_eval_batch_size",
            "trainer_args",
        )
    metrics = {"compute_metrics": lambda predictions: {}} if given.get("compute_metrics") else {}
    return {"eval_dataset": rows(count), **metrics}


def _refuse_what_it_does_not_take(setting: _Setting, trainer: type, base) -> None:
    """TRL's trainers of language models write into ``model.generation_config``; rows on a card hold no images."""
    if setting.job.goal.task is None and getattr(base, "generation_config", None) is None:
        raise PlanError(
            f"{trainer.__name__} takes models that generate, and {type(base).__name__} has no generation_config",
            "set trainer to transformers",
            "trainer",
        )
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE

    words = getattr(base.config.get_text_config(), "vocab_size", 0)
    tiles = -(-words // VOCAB_CHUNK_SIZE)
    if setting.on_meta and tiles > TILES:
        raise PlanError(
            f"{trainer.__name__} computes the loss of {words} words in {tiles} tiles; at most {TILES} are planned",
            "set trainer to transformers, or check vocab_size",
            "trainer",
        )
    if setting.observer.images is not None and not setting.on_meta:
        raise PlanError(f"{trainer.__name__}'s rows hold no images here", "measure it with another trainer", "trainer")


TURNS = "{% for turn in messages %}{% generation %}{{ turn['content'] }} {% endgeneration %}{% endfor %}"
"""A chat's template, which adds nothing to what is said."""


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of a few words: TRL's trainers ask for one, the rows are tokens already."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(100)} | {"<pad>": 100, "<unk>": 101, "<eos>": 102}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TURNS
    )
