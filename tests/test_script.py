"""``vramplan run``: a script of one's own takes what the same job takes; what goes wrong is one sentence."""

import json
import textwrap

import pytest
from tiny import LLAMA
from typer.testing import CliRunner
from vramplan.cli.entry import app
from vramplan.errors import PlanError
from vramplan.script.run import run_script
from vramplan.usecases import plan

pytestmark = pytest.mark.traces

HEAD = """
    import sys
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.from_pretrained(sys.argv[1])
"""
LOOP = """
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = {name: torch.randint(1, 100, (2, 32)).to("cuda") for name in ("input_ids", "attention_mask", "labels")}
    while True:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(loss.item(), torch.cuda.memory_allocated() > 0)
"""
TRAINER = """
    from transformers import Trainer, TrainingArguments, default_data_collator
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    row = {"input_ids": [5] * 32, "attention_mask": [1] * 32, "labels": [5] * 32}
    arguments = TrainingArguments(
        sys.argv[2], per_device_train_batch_size=2, bf16=True, optim="adamw_torch", report_to=[], save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=[row] * 64, data_collator=default_data_collator).train()
"""
QLORA = """
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], quantization_config=four, dtype=torch.bfloat16, device_map={"": 0}
    )
    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "<pad>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    rows = [{"input_ids": [5] * 32, "labels": [5] * 32} for _ in range(64)]
    arguments = SFTConfig(
        sys.argv[2], per_device_train_batch_size=2, max_length=32, report_to=[], save_strategy="no",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    ).train()
"""
AMP = """
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to("cuda").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters())
    rows = torch.utils.data.TensorDataset(*(torch.randint(1, 100, (64, 32)) for _ in range(3)))
    for values in torch.utils.data.DataLoader(rows, batch_size=2, num_workers=2, pin_memory=True):
        ids, mask, labels = (value.to(0, non_blocking=True) for value in values)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
"""
JOB = {"config": LLAMA, "gpu": "h100", "batch_size": 2, "sequence_length": 32, "optimizer": "adamw_torch"}
FULL = {"method": "full", "gradient_checkpointing": "off"}
SAME = {
    "loop": (LOOP, {**JOB, **FULL, "trainer": "pytorch"}),
    "trainer": (TRAINER, {**JOB, **FULL, "trainer": "transformers"}),
    "autocast": (
        AMP,
        {
            **JOB,
            "method": "full",
            "trainer": "pytorch",
            "dtype": "float32",
            "mixed_precision": "bf16",
            "gradient_checkpointing": "non_reentrant",
        },
    ),
    "qlora": (
        QLORA,
        {
            **JOB,
            "method": "qlora",
            "trainer": "trl",
            "optimizer": "adamw_torch_fused",
            "gradient_checkpointing": "non_reentrant",
            "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"},
        },
    ),
}


@pytest.fixture
def write(tmp_path):
    """Write a script, and the folder of a model beside it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))

    def script(body: str) -> tuple[str, list[str]]:
        path = tmp_path / "train.py"
        path.write_text(textwrap.dedent(HEAD) + textwrap.dedent(body))
        return str(path), [str(tmp_path / "model"), str(tmp_path / "out")]

    return script


@pytest.mark.parametrize(
    "name", ["loop", *(pytest.param(name, marks=pytest.mark.slow) for name in SAME if name != "loop")]
)
def test_a_script_takes_what_the_same_job_takes(write, name):
    body, job = SAME[name]
    answer, planned = run_script(*write(body), gpu="h100"), plan(job)
    assert answer["peak"]["allocated"] == planned["peak"]["allocated"]
    assert answer["parts"]["optimizer_state"] == planned["parts"]["optimizer_state"]
    assert sum(answer["parts"].values()) == answer["peak"]["allocated"]
    script = answer["script"]
    assert script["steps"] == 3 and sum(row["bytes"] for row in script["lines"]) <= answer["peak"]["allocated"]
    if name == "loop":
        texts = {row["text"] for row in script["lines"]}
        assert {"loss = model(**batch).loss", "optimizer.step()"} <= texts
        assert [row["value"] for row in script["reads"]] == [1.0]


WRONG = {
    "raises": ("raise ValueError('no such thing')", "raised ValueError: no such thing at .*train.py:6"),
    "two cards": ("torch.zeros(1, device='cuda:1')", "cuda:1 at .*train.py:6"),
    "compiles": ("torch.compile(torch.nn.Linear(1, 1))", "torch.compile at .*train.py:6"),
    "ranks": ("torch.distributed.init_process_group('nccl')", "torch.distributed at .*train.py:6"),
    "leaves": ("sys.exit('not today')", "ended itself with 'not today'"),
    "does nothing": ("print(config)", "called no model on the card"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_is_one_sentence(write, name):
    body, words = WRONG[name]
    with pytest.raises(PlanError, match=words):
        run_script(*write(body))


def test_a_script_that_does_not_end_is_stopped(write):
    with pytest.raises(PlanError, match="too few steps of its optimiser in 2 s"):
        run_script(*write("while True: pass"), seconds=2)


def test_no_script_and_many_processes_are_refused(write, monkeypatch):
    with pytest.raises(PlanError, match="there is no script"):
        run_script("nowhere.py", [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PlanError, match="several processes"):
        run_script(*write("pass"))


def test_the_command_tells_it(write, monkeypatch):
    answer = {**plan({**JOB, **FULL, "trainer": "pytorch"}), "script": SCRIPT}
    asked = {}
    monkeypatch.setattr("vramplan.cli.run_command.run_script", lambda *given: asked.update(given=given) or answer)
    said = CliRunner().invoke(app, ["run", "--gpu", "h100", "train.py", "--lr", "1", "--json"])
    assert said.exit_code == 0 and asked["given"][:3] == ("train.py", ["--lr", "1", "--json"], "h100")
    assert "train.py fits an H100" in said.stdout and "loss.backward()" in said.stdout and "print(loss)" in said.stdout


SCRIPT = {
    "path": "/a/train.py",
    "steps": 3,
    "lines": [{"line": "/a/train.py:6", "text": "loss.backward()", "kind": "gradients", "bytes": 1 << 20}],
    "reads": [{"line": "/a/train.py:9", "text": "print(loss)", "value": 1.0}],
}
