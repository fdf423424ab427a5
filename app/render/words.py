"""What every rendering says in the same words: sizes, the verdict, the place of the peak, the cards that fit."""

from __future__ import annotations

import re

from ..catalog.gpus import all_gpus, find_gpu
from ..registry.quantizers import QUANTIZERS

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FITTING = ("fits", "tight")

KINDS = {
    "weights": "Weights",
    "quantization_constants": "Quantisation constants",
    "adapters": "Adapters",
    "buffers": "Buffers",
    "inputs": "Inputs",
    "optimizer_state": "Optimizer state",
    "gradients": "Gradients",
    "kv_cache": "KV cache",
    "activations": "Activations",
    "activation_gradients": "Gradients of activations",
    "logits_and_loss": "Logits and loss",
    "dequantized_weights": "Dequantised weights",
    "optimizer_temporaries": "Optimizer temporaries",
    "kernel_workspace": "Kernel workspace",
    "temporaries": "Temporaries",
}
"""Names of the kinds of memory, those that stay first: so they are stacked."""

_NO_BF16 = {gpu.key for gpu in all_gpus() if not gpu.bf16}
_DURING = {
    "load": "while the model loads",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer step",
    "generate": "while generating",
    "prefill": "while the prompt is read",
    "decode": "while a token is made",
}


def size(count: int) -> str:
    """Bytes as a person reads them: GiB from 100 MiB on, else MiB or KiB."""
    if abs(count) >= 100 * MIB:
        return f"{count / GIB:.2f} GiB" if abs(count) < 10 * GIB else f"{count / GIB:.1f} GiB"
    if abs(count) >= MIB:
        return f"{count / MIB:.1f} MiB"
    return f"{count / KIB:.1f} KiB" if count else "0"


def short(count: int) -> str:
    """Bytes for a narrow column: 1.96G, 33.0M, 128K."""
    number, _, unit = size(count).partition(" ")
    return f"{number.removesuffix('.0')}{unit[:1]}"


def number(count: int) -> str:
    """A count of parameters: 8.03 B, 135 M, 4096."""
    for scale, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)


def weights(counted: dict) -> str:
    """What a model that cannot be planned weighs, and where that is from."""
    amount = f", {size(counted['bytes'])}" if "bytes" in counted else ""
    return f"{number(counted['parameters'])} parameters{amount}, counted from {counted['from']}"


def during(phase: str) -> str:
    """A phase as part of a sentence."""
    return _DURING.get(phase, f"in {phase}")


def with_article(name: str) -> str:
    """A card's name with *a* or *an*, as it is read aloud; a name that has its own, or is not a card's, as it is."""
    first = name.split()[0] if name.split() else ""
    if first.lower() in ("a", "an", "my", "the", "this", "our"):
        return name
    spelled = (first[:2].isupper() and first != "TITAN") or first[1:2].isdigit()
    return f"an {name}" if first[:1].upper() in ("AEFHILMNORSX" if spelled else "AEIOU") else f"a {name}"


def asked_card(answer: dict) -> dict | None:
    """The verdict on the card that the job names, or None where it names none."""
    return answer["fits"][0] if answer["job"]["gpu"] is not None else None


def state(answer: dict) -> str:
    """``fits``, ``tight`` or ``does_not_fit`` on the job's card; ``unasked`` where it names none."""
    card = asked_card(answer)
    return card["verdict"] if card else "unasked"


def cards_that_fit(answer: dict) -> list[dict]:
    """The verdicts on cards that hold the job, smallest first."""
    return sorted((fit for fit in answer["fits"] if fit["verdict"] in FITTING), key=lambda fit: fit["memory_bytes"])


def smallest_card(answer: dict) -> dict | None:
    """The smallest card that holds the job with nothing to be warned of; else the smallest that holds it."""
    cards = cards_that_fit(answer)
    return next((fit for fit in cards if not note(answer, fit)), cards[0] if cards else None)


def note(answer: dict, fit: dict) -> str:
    """What a card that fits is to be warned of, in a word or two; mostly nothing."""
    notes = ["tight"] if fit["verdict"] == "tight" else []
    job = answer["job"]
    if fit["gpu"] in _NO_BF16 and (job["dtype"] == "bfloat16" or job["mixed_precision"] == "bf16"):
        notes.append("no bfloat16")
    return ", ".join(notes)


def verdict(answer: dict) -> str:
    """The answer to the question, in one sentence."""
    card, count = asked_card(answer), answer["job"]["gpu_count"]
    if card is None:
        smallest = smallest_card(answer)
        said = f"the smallest card is {with_article(smallest['name'])}" if smallest else "no card holds it"
        each = f" on each of {count} cards" if count > 1 else ""
        return f"Needs {size(answer['peak']['process'])}{each}: {said}"
    name = f"{count} × {card['name']}" if count > 1 else with_article(card["name"])
    if card["verdict"] == "fits":
        return f"Fits {name} with {size(card['headroom'])} to spare"
    if card["verdict"] == "tight" and card["needed"] > card["limit"]:
        return f"Tight on {name}: it fits if the allocator gives back its cache, {size(card['headroom'])} to spare"
    if card["verdict"] == "tight":
        return f"Tight on {name}: {size(card['headroom'])} to spare, give or take {size(card['margin'])}"
    missing = size(-card["headroom"])
    most = KINDS.get(card["breaks_on"], card["breaks_on"].replace("_", " ")).lower()
    return f"Does not fit {name}: {missing} short, out of memory {during(card['breaks'])}, where most is {most}"


def beyond(answer: dict) -> list[str]:
    """What of loading, merging and writing the job's card has no room for though it holds the step, in sentences."""
    card, after, out = asked_card(answer), answer["after"], []
    if card is None:
        return []
    if card["verdict"] == "does_not_fit":
        step = max(phase["peak_reserved"] for phase in answer["phases"] if phase["step"])
        if card["breaks"] == "load" and step <= card["limit"]:
            out.append(f"The step would fit, loading does not: it takes {size(answer['load']['peak_allocated'])}.")
        return out
    if "merge" in card["cannot"]:
        took = size(after["merge"])
        out.append(f"It cannot merge the adapter in {answer['job']['dtype']} there ({took}): merge on the CPU.")
    if "save" in card["cannot"]:
        out.append(
            f"It cannot write the checkpoint from there ({size(after['save'])}): move the model to the CPU first."
        )
    return out


def merged(answer: dict) -> str | None:
    """What running the merged model takes, in a sentence; None: there is none, or it cannot be planned."""
    found = answer["advice"]["merged"]
    if not found or "error" in found:
        return None
    does = {"fits": "fits", "tight": "is tight", "does_not_fit": "does not fit"}[found["verdict"]]
    card = with_article(answer["fits"][0]["name"])
    took = size(found["peak"]["reserved"])
    return f"Generating with the merged model in {answer['job']['dtype']} takes {took}: it {does} on {card}."


def cost(option: dict) -> str:
    """What a change costs: in words, and what the plans' numbers say of time."""
    out = [option["cost"]]
    if option["flops_added"]:
        out.append(f"{100 * option['flops_added']:+.0f} % of the products with weights")
    if option["bytes_written_added"] >= MIB:
        least = option["seconds_at_least"]
        time = f", at least {1000 * least:.3g} ms" if least else ""
        out.append(f"a step writes {size(option['bytes_written_added'])} more{time}")
    return "; ".join(out)


def margin(answer: dict) -> str:
    """How sure the verdict is, and why."""
    card = answer["fits"][0]
    return f"± {size(card['margin'])}: {card['margin_source']}"


def peak_place(answer: dict) -> str:
    """When and where the step is at its highest."""
    peak = answer["peak"]
    step = {1: "the first step", 2: "a steady step"}.get(peak["step"], "the step")
    place = f"{during(peak['phase'])} of {step}" if peak["phase"] != "generate" else during("generate")
    return f"{place}, at {operator(peak['module'], peak['op'])}"


TRAINERS = {"pytorch": "a plain loop", "transformers": "transformers' Trainer", "trl": "TRL's SFTTrainer"}
"""Whose step it is, in a sentence."""


def other_trainers(answer: dict) -> str:
    """What the same job takes with the other trainers, and why; empty where none is known."""
    rows = answer.get("other_trainers")
    if not rows:
        return ""
    mine = answer["peak"]["reserved"]
    told = [
        f"{size(row['peak']['reserved'])} with {TRAINERS[row['trainer']]}"
        + (f" ({', '.join(row['why'])})" if row["why"] and row["peak"]["reserved"] != mine else "")
        for row in rows
    ]
    return f"The same job reserves {' and '.join(told)}; here {size(mine)} with {TRAINERS[answer['job']['trainer']]}."


def ranks(answer: dict) -> list[dict]:
    """The classes of ranks of a job on many cards, the one that needs most marked as ``worst``; else none."""
    rows = answer.get("ranks") or []
    worst = max((row["peak"]["reserved"] for row in rows), default=0)
    return [
        {
            "name": f"{rank_numbers(*row['ranks'])}{'' if len(rows) == 1 else ': ' + row['class']}",
            "peak": row["peak"],
            "state": row["optimizer_state"],
            "worst": len(rows) > 1 and row["peak"]["reserved"] == worst,
        }
        for row in rows
    ]


def rank_numbers(first: int, last: int) -> str:
    """``rank 0``, ``ranks 1 to 7``."""
    return f"rank {first}" if first == last else f"ranks {first} to {last}"


def host(answer: dict) -> str:
    """The bytes in a node's own memory, as a sentence; empty where nothing of the job lies there."""
    held = {name: count for name, count in (answer.get("host") or {}).items() if count}
    if not held:
        return ""
    names = {"load": "while it loads", "pinned": "pinned in training", "pageable": "pageable in training"}
    told = [f"{size(count)} {names.get(name, name)}" for name, count in held.items()]
    return f"A node's own memory holds {', '.join(told)}."


def holders(found: list[dict]) -> list[dict]:
    """The largest of what is alive, by module and kind, with what it is called."""
    return [
        {"name": f"{KINDS.get(h['kind'], h['kind']).lower()} of {h['module'] or 'the loop'}", "bytes": h["bytes"]}
        for h in found[:6]
    ]


def card_name(key: str) -> str:
    """A card of the catalogue with its article, as a sentence begins."""
    name = with_article(find_gpu(key).name)
    return name[:1].upper() + name[1:]


def largest(answer: dict, field: str, value: int) -> str:
    """What the largest value of a field that fits is; of lengths, only multiples of eight were tried."""
    if field == "batch_size":
        return ("is the largest batch" if value else "No batch fits") + (" at this length" if length(answer) else "")
    return "tokens are the longest at this batch size" if value else "No eight tokens fit at this batch size"


def operator(module: str, op: str) -> str:
    """An operator and its module, without PyTorch's overload names."""
    name = re.sub(r"\.(default|out|Tensor|Scalar)$", "", op).strip("_")
    return f"{name} in {module}" if module else name


def model_name(answer: dict) -> str:
    """The model: its id, else its class."""
    return answer["model"].get("id") or answer["model"]["class"]


def length(answer: dict) -> int | None:
    """The tokens of a sequence; None: the model is shown none."""
    return None if answer["model"]["task"] == "image-classification" else answer["job"]["sequence_length"]


def settings(answer: dict) -> str:
    """The job on one line, as its answer resolved it."""
    job = answer["job"]
    out = [job["method"]]
    if job["quantization"]:
        kind = job["quantization"]
        out.append(kind["type"] + (" double quant" if kind["double_quant"] and QUANTIZERS[kind["type"]].nests else ""))
    if job["lora"]:
        targets = job["lora"]["target_modules"]
        where = targets if isinstance(targets, str) else ", ".join(targets or ())
        out.append(f"LoRA r{job['lora']['r']}" + (f" on {where}" if where else ""))
    out.append(f"batch {job['batch_size']}" + (f" × {length(answer)}" if length(answer) else ""))
    if job["method"] == "inference":
        out.append(f"{job['new_tokens']} new tokens")
    else:
        out += [job["optimizer"], f"checkpointing {job['gradient_checkpointing'].replace('_', '-')}", job["trainer"]]
    out += [job["dtype"], job["attention"]]
    if job["strategy"] != "single":
        nodes = f" in {job['nodes']} nodes" if job["nodes"] > 1 else ""
        out.append(f"{job['strategy']} on {job['gpu_count']} cards{nodes}")
    return " · ".join(out)


def parts(answer: dict) -> list[tuple[str, str, int]]:
    """What is alive at the peak as (kind, name, bytes), in the order in which it is stacked."""
    alive = answer["parts"]
    known = [(kind, name, alive[kind]) for kind, name in KINDS.items() if alive.get(kind)]
    return known + [(kind, kind.replace("_", " "), count) for kind, count in alive.items() if kind not in KINDS]


def step_title(step: int, phase: str) -> str:
    """What a step is called: the load, the generation, the first step, one like all that follow."""
    if phase in ("generate", "prefill", "decode"):
        return "Generation"
    return {0: "Load", 1: "First step", 2: "Steady step"}.get(step, f"Step {step}")


def phases(answer: dict) -> list[dict]:
    """The phases worth a row: those in which something is taken, with the name of their step."""
    return [
        {**phase, "title": step_title(phase["step"], phase["name"])}
        for phase in answer["phases"]
        if phase["name"] != "end"
    ]


def options(advice: dict) -> list[dict]:
    """The changes that make a job fit: single ones, else the pair that does."""
    return advice["suggestions"] or ([advice["pair"]] if advice["pair"] else [])


def option_title(option: dict) -> str:
    """What a change is called, with the number or the card that it sets."""
    change = option["change"]
    told = [
        f"{change[name]}{unit}" for name, unit in (("batch_size", ""), ("sequence_length", " tokens")) if name in change
    ]
    if "gradient_accumulation_steps" in change:
        told[0] = f"{change['gradient_accumulation_steps']} × batch {told[0]}"
    told += [find_gpu(change["gpu"]).name] if "gpu" in change else []
    title = option["title"][:1].upper() + option["title"][1:]
    return f"{title}: {', '.join(told)}" if told else title


def split_path(path: str) -> tuple[str, str]:
    """A module's path as the repeated block that it is in (``model.layers.{0..31}``, or nothing) and the rest."""
    found = re.fullmatch(r"(.*?\.(?:\d+|\{[^}]*\}))(?:\.(.+))?", path)
    return (found[1], found[2] or "(itself)") if found else ("", path or "(the whole)")


def layer_blocks(answer: dict) -> list[tuple[str, int, list[dict]]]:
    """The layers as (repeated block, how often, its modules with their ``name`` in it); ``""``: outside of blocks."""
    blocks: list[tuple[str, int, list[dict]]] = []
    for layer in answer["layers"]:
        block, name = split_path(layer["path"])
        rows = next((rows for known, _, rows in blocks if block and known == block), None)
        if rows is None and not (blocks and blocks[-1][0] == block):
            blocks.append((block, layer["count"], []))
        (blocks[-1][2] if rows is None else rows).append({**layer, "name": name})
    return blocks


def stack(answer: dict) -> str:
    """The versions that the plan was traced with."""
    return " · ".join(f"{name} {version}" for name, version in answer["stack"].items())
