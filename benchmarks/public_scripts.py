"""Public training scripts, unmodified, by ``vramplan run`` and on a card: the table of docs/run.md.

``prepare FOLDER`` makes what they need offline: a small model with a tokenizer, and data sets. ``plan FOLDER SOURCES``
runs each by ``vramplan run``, ``card FOLDER SOURCES OUT`` on this machine's card, each in a process of its own, three
steps of its optimiser; ``OUT`` gets a line of JSON a script. ``SOURCES`` has the repositories, a folder each:
nanoGPT, trl, peft.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STEPS = 3
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
TRL = "--max_steps 20 --per_device_train_batch_size 4 --report_to none --save_strategy no --output_dir out"


def scripts(folder: Path) -> dict[str, tuple[str, str]]:
    """By name: the script's path below the sources, and its arguments."""
    model, data = folder / "model", folder / "data"
    common = f"--model_name_or_path {model} {TRL}"
    lora = "--use_peft --lora_r 16 --lora_target_modules all-linear"
    four = "--load_in_4bit --use_bnb_nested_quant"
    nano = (
        "--dataset=words --batch_size=8 --block_size=512 --n_layer=8 --n_head=8 --n_embd=512 --compile=False "
        f"--max_iters=20 --eval_iters=1 --out_dir={folder}/nano"
    )
    peft = (
        f"--base_model {model} --data_path {data}/alpaca --output_dir {folder}/peft --batch_size 4 --num_epochs 1 "
        "--cutoff_len 256 --init_lora_weights gaussian"
    )
    return {
        "TRL sft.py, full": ("trl/trl/scripts/sft.py", f"--dataset_name {data}/sft --max_length 512 {common}"),
        "TRL sft.py, LoRA": ("trl/trl/scripts/sft.py", f"--dataset_name {data}/sft --max_length 512 {common} {lora}"),
        "TRL sft.py, QLoRA": (
            "trl/trl/scripts/sft.py",
            f"--dataset_name {data}/sft --max_length 512 {common} {lora} {four}",
        ),
        "TRL sft.py, packed": (
            "trl/trl/scripts/sft.py",
            f"--dataset_name {data}/sft --max_length 512 --packing --packing_strategy wrapped {common}",
        ),
        "TRL dpo.py, full": ("trl/trl/scripts/dpo.py", f"--dataset_name {data}/pairs --max_length 512 {common}"),
        "TRL dpo.py, LoRA": ("trl/trl/scripts/dpo.py", f"--dataset_name {data}/pairs --max_length 512 {common} {lora}"),
        "TRL kto.py": ("trl/trl/scripts/kto.py", f"--dataset_name {data}/kto --max_length 512 {common}"),
        "TRL reward.py": ("trl/trl/scripts/reward.py", f"--dataset_name {data}/pairs --max_length 1024 {common}"),
        "nanoGPT train.py, bfloat16": ("nanoGPT/train.py", f"{nano} --dtype=bfloat16"),
        "nanoGPT train.py, float16": ("nanoGPT/train.py", f"{nano} --dtype=float16"),
        "nanoGPT train.py, accumulating": (
            "nanoGPT/train.py",
            f"{nano} --dtype=bfloat16 --gradient_accumulation_steps=4 --dropout=0.1",
        ),
        "PEFT olora_finetuning.py": ("peft/examples/olora_finetuning/olora_finetuning.py", peft),
        "PEFT olora_finetuning.py, 4 bit": ("peft/examples/olora_finetuning/olora_finetuning.py", f"{peft} --quantize"),
        "TRL orpo.py": ("trl/examples/scripts/orpo.py", f"--dataset_name {data}/pairs --max_length 1024 {common}"),
        "TRL cpo.py": ("trl/examples/scripts/cpo.py", f"--dataset_name {data}/pairs --max_length 1024 {common}"),
        "TRL sft.py, checkpointing off": (
            "trl/trl/scripts/sft.py",
            f"--dataset_name {data}/sft --max_length 512 --gradient_checkpointing False --optim adafactor {common}",
        ),
        "a hand-written loop": ("own/loop.py", str(model)),
        "an Accelerate loop": ("own/accelerated.py", str(model)),
    }


def prepare(folder: Path, sources: Path) -> None:
    """The model with its tokenizer and random weights, and the data sets."""
    import numpy
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    model = folder / "model"
    config = AutoConfig.for_model(**CONFIG)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    words = {f"w{number}": number for number in range(31000)}
    special = {"<eos>": 31001, "<pad>": 31002, "<unk>": 31003}
    tokenizer = Tokenizer(models.WordLevel({**words, **special}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(model)
    draw = numpy.random.default_rng(0)

    def text(count: int) -> str:
        return " ".join(f"w{number}" for number in draw.integers(0, 31000, count))

    rows = {
        "sft": lambda: {"text": text(600)},
        "pairs": lambda: {"prompt": text(200), "chosen": text(400), "rejected": text(400)},
        "kto": lambda: {"prompt": text(200), "completion": text(400), "label": bool(draw.integers(2))},
        "alpaca": lambda: {"instruction": text(200), "input": text(100), "output": text(200)},
    }
    (sources / "own").mkdir(exist_ok=True)
    for name, source in OWN.items():
        (sources / "own" / name).write_text(source)
    for name, row in rows.items():
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row()) for _ in range(160))
        (folder / "data" / name / "train.jsonl").write_text("\n".join(lines))
    words = sources / "nanoGPT" / "data" / "words"
    words.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val"):
        draw.integers(0, 50000, 100_000).astype(numpy.uint16).tofile(words / f"{part}.bin")


OWN = {
    "loop.py": """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).cuda().train()
model.gradient_checkpointing_enable({"use_reentrant": False})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
rows = torch.utils.data.TensorDataset(torch.randint(0, 31000, (64, 512)))
for (ids,) in torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True, pin_memory=True, num_workers=2):
    ids = ids.to("cuda", non_blocking=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item(), torch.cuda.max_memory_allocated())
""",
    "accelerated.py": """
import sys
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
rows = torch.utils.data.TensorDataset(torch.randint(0, 31000, (64, 512)))
loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for (ids,) in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
""",
}
"""The scripts of our own."""
CARD = """
import json, runpy, sys
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
class Enough(BaseException): pass
done = []
def after(*_):
    done.append(1)
    if len(done) == STEPS:
        raise Enough
register_optimizer_step_post_hook(after)
script, out, *arguments = sys.argv[1:]
sys.argv = [script, *arguments]
sys.path.insert(0, script.rpartition("/")[0])
try:
    runpy.run_path(script, run_name="__main__")
except Enough:
    pass
peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
open(out, "w").write(json.dumps({"steps": len(done), "peak_allocated": peak[0], "peak_reserved": peak[1]}))
"""


def card(folder: Path, sources: Path, out: Path) -> None:
    """Run every script on the card, four at once."""
    runner = folder / "runner.py"
    runner.write_text(CARD.replace("STEPS", str(STEPS)))

    def run(number: int, name: str) -> dict:
        path, arguments = scripts(folder)[name]
        told = folder / f"told-{number}.json"
        command = [sys.executable, str(runner), str(sources / path), str(told), *arguments.split()]
        begun = time.monotonic()
        done = subprocess.run(command, cwd=(sources / path).parent, capture_output=True, text=True, timeout=400)
        row = {"script": name, "seconds": round(time.monotonic() - begun, 1)}
        return row | (json.loads(told.read_text()) if told.exists() else {"error": done.stderr[-1500:]})

    with ThreadPoolExecutor(4) as pool, out.open("w") as file:
        for row in pool.map(lambda pair: run(*pair), enumerate(scripts(folder))):
            print(json.dumps(row), file=file, flush=True)


def plan(folder: Path, sources: Path, only: str = "") -> None:
    """Run every script by ``vramplan run``, one after the other; a line of JSON each."""
    root = Path(__file__).parents[1]
    for name, (path, arguments) in scripts(folder).items():
        if only not in name:
            continue
        command = [sys.executable, "-m", "vramplan", "run", "--json", "--gpu", "h100-80gb", str(sources / path)]
        environment = {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
        begun = time.monotonic()
        done = subprocess.run(
            [*command, *arguments.split()],
            cwd=(sources / path).parent,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        told = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {"error": done.stderr[-800:]}
        row = {"script": name, "seconds": round(time.monotonic() - begun, 1)}
        if "error" in told:
            print(json.dumps(row | {"error": told["error"], "said": done.stderr[-2500:]}), flush=True)
            continue
        peak = {f"peak_{kind}": told["peak"][kind] for kind in ("allocated", "reserved")}
        print(json.dumps(row | {"steps": told["script"]["steps"], **peak}), flush=True)


if __name__ == "__main__":
    what, folder, sources, *rest = sys.argv[1:]
    act = {"prepare": prepare, "card": card, "plan": plan}[what]
    act(Path(folder).resolve(), Path(sources).resolve(), *(Path(out) if what == "card" else out for out in rest))
