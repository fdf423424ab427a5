"""An answer as a page of a terminal: the verdict in words, the bar, the tables."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..registry.quantizers import QUANTIZERS
from . import words
from .words import size

COLORS = {
    "weights": "blue",
    "quantization_constants": "bright_blue",
    "adapters": "cyan",
    "buffers": "bright_black",
    "inputs": "bright_black",
    "optimizer_state": "magenta",
    "gradients": "yellow",
    "kv_cache": "bright_green",
    "activations": "green",
    "activation_gradients": "bright_yellow",
    "logits_and_loss": "red",
    "dequantized_weights": "bright_cyan",
    "optimizer_temporaries": "bright_magenta",
    "kernel_workspace": "white",
    "temporaries": "bright_red",
}
GLYPHS = "█▓▒░▚▞▙▟▛▜"
STATES = {"fits": "bold green", "tight": "bold yellow", "does_not_fit": "bold red", "unasked": "bold"}
CARDS = 6
WIDEST = 110


def page(answer: dict, width: int) -> RenderableType:
    """The whole page for an answer, ``width`` columns wide."""
    head = Text.assemble(
        (words.verdict(answer), STATES[words.state(answer)]),
        "\n",
        *((f"{sentence}\n", STATES["does_not_fit"]) for sentence in words.beyond(answer)),
        (words.model_name(answer), "bold"),
        f", {words.number(answer['model']['parameters'])} parameters\n",
        (words.settings(answer), "dim"),
    )
    parts = [
        head,
        "",
        peaks(answer),
        "",
        bar(answer, words.asked_card(answer), width - 2),
        "",
    ]
    if words.ranks(answer):
        parts += [title("Ranks", "each on a card of its own"), _ranks(answer), ""]
    parts += [title("Phases"), phases(answer)]
    parts += ["", title("Layers", "of one; K, M, G are KiB, MiB, GiB"), _layers(answer, width)]
    parts += ["", title("Smallest cards that fit"), _cards(answer)]
    if "advice" in answer:
        parts += ["", title("What would make it fit"), _advice(answer)]
        if said := words.merged(answer):
            parts += ["", Padding(Text(said), (0, 0, 0, 2))]
    if whose := words.other_trainers(answer):
        parts += ["", title("Whose step"), Padding(Text(whose), (0, 0, 0, 2))]
    if answer["warnings"]:
        parts += ["", title("Warnings")]
        parts += [Padding(Text(f"! {warning}", "yellow"), (0, 0, 0, 2)) for warning in answer["warnings"]]
    parts += ["", Text(words.stack(answer), "dim")]
    return Group(*parts)


def show(answer: dict, console: Console) -> None:
    """Print the page, no wider than reads well."""
    width = min(console.width, WIDEST)
    console.print(page(answer, width), highlight=False, width=width)


def title(text: str, note: str = "") -> Text:
    """The head of a part of the page."""
    return Text.assemble((text, "bold"), (f"  {note}" if note else "", "dim"))


def peaks(answer: dict) -> RenderableType:
    """The peaks, and where they come."""
    peak = answer["peak"]
    low, high = peak["process_interval"]
    table = _grid("left", "right", "left")
    table.add_row("Allocated", size(peak["allocated"]), Text("max_memory_allocated", "dim"))
    table.add_row("Reserved", size(peak["reserved"]), Text("max_memory_reserved", "dim"))
    table.add_row("Process", size(peak["process"]), Text(f"as nvidia-smi shows it: {size(low)} to {size(high)}", "dim"))
    if answer["load"]["peak_reserved"] > peak["reserved"]:
        table.add_row("Loading", size(answer["load"]["peak_reserved"]), Text("reserved while the model loads", "dim"))
    place = words.peak_place(answer)
    return Group(table, Padding(Text(f"The peak comes {place}."), (0, 0, 0, 2)))


def _grid(*justify: str) -> Table:
    table = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    for side in justify:
        table.add_column(justify=side)
    return table


def bar(answer: dict, card: dict | None, width: int) -> RenderableType:
    """The process against the card: one glyph and colour a part, what is free as dots."""
    peak = answer["peak"]
    total = max(peak["process"], card["memory_bytes"] if card else 0)
    entries = sorted(words.parts(answer), key=lambda part: -part[2])
    named = [(name, count, COLORS.get(kind, "white")) for kind, name, count in entries if count >= total / 1000]
    named += [
        ("Everything else", sum(count for _, _, count in entries if count < total / 1000), "bright_black"),
        ("Reserved, unused", peak["reserved"] - peak["allocated"], "bright_black"),
        ("CUDA context", peak["process"] - peak["reserved"], "bright_black"),
    ]
    bar, legend = Text(), _grid("left", "left", "right", "right")
    done = drawn = 0
    for index, (name, count, color) in enumerate(named):
        if not count:
            continue
        done += count
        cells = round(done / total * width) - drawn
        drawn += cells
        glyph = GLYPHS[index % len(GLYPHS)]
        bar.append(glyph * cells, color)
        legend.add_row(Text(glyph, color), name, size(count), Text(f"{100 * count / total:.1f} %", "dim"))
    free = total - peak["process"]
    bar.append("·" * (width - drawn), "dim")
    if card:
        legend.add_row(Text("·", "dim"), "Free" if free else "Card", size(free or card["memory_bytes"]), "")
    return Group(Padding(bar, (0, 0, 0, 2)), legend)


def _ranks(answer: dict) -> RenderableType:
    """A row a class of ranks, and what a node holds."""
    table = quiet_table("Ranks", "Allocated", "Reserved", "Process", "State")
    for row in words.ranks(answer):
        cells = (size(row["peak"][figure]) for figure in ("allocated", "reserved", "process"))
        table.add_row(row["name"], *cells, size(row["state"]), style="bold" if row["worst"] else None)
    held = words.host(answer)
    return Group(table, Padding(Text(held), (0, 0, 0, 2))) if held else table


def phases(answer: dict) -> Table:
    """A row a phase."""
    table = quiet_table("", "Phase", "Start", "Peak", "End", "Reserved")
    last = None
    for phase in words.phases(answer):
        title = phase["title"] if phase["title"] != last else ""
        last = phase["title"]
        style = None
        if (phase["step"], phase["name"]) == (answer["peak"]["step"], answer["peak"]["phase"]):
            style = "bold"
        amounts = ("allocated_start", "peak_allocated", "allocated_end", "peak_reserved")
        table.add_row(title, phase["name"], *(size(phase[amount]) for amount in amounts), style=style)
    return table


def weights_of(answer: dict) -> tuple[str, str]:
    """The field of a layer that holds its weights as this job stores them, and that layout's name."""
    kind = answer["job"]["quantization"]
    column = None if kind is None else QUANTIZERS[kind["type"]].column_of(kind["double_quant"])
    if column is None:
        return "base", answer["job"]["dtype"]
    return column, f"{kind['type']} dq" if kind["double_quant"] else kind["type"]


def _layers(answer: dict, width: int) -> RenderableType:
    stored, layout = weights_of(answer)
    columns = {
        stored: layout,
        "adapters": "Adapters",
        "gradients": "Grads",
        "optimizer_state": "State",
        "activations": "Activ.",
        "activations_checkpointed": "ckpt.",
    }
    used = [field for field in columns if any(layer[field] for layer in answer["layers"])]
    table = quiet_table("Module", "Params", *(columns[field] for field in used))
    table.padding = (0, 1, 0, 0) if width < WIDEST else table.padding
    table.columns[0].overflow = "fold"
    table.columns[0].no_wrap = False
    for block, count, layers in words.layer_blocks(answer):
        if block:
            table.add_row(block + (f" × {count}" if count > 1 else ""), style="bold")
        for layer in layers:
            amounts = (words.short(layer[field]) if layer[field] else "" for field in used)
            parameters = words.number(layer["parameters"]) if layer["parameters"] else ""
            table.add_row(f"  {layer['name']}" if block else layer["name"], parameters, *amounts)
    return Padding(table, (0, 0, 0, 1 if width < WIDEST else 0))


def _cards(answer: dict) -> RenderableType:
    cards = words.cards_that_fit(answer)
    if not cards:
        return Padding(Text("None of the catalogue holds this job."), (0, 0, 0, 2))
    table = quiet_table("Card", "Memory", "To spare", "")
    for fit in cards[:CARDS]:
        table.add_row(fit["name"], size(fit["memory_bytes"]), size(fit["headroom"]), words.note(answer, fit))
    return table


def _advice(answer: dict) -> RenderableType:
    if words.state(answer) != "does_not_fit":
        return Padding(Text("It fits as it is."), (0, 0, 0, 2))
    options = words.options(answer["advice"])
    if not options:
        return Padding(Text("No single change does, and no pair that was tried."), (0, 0, 0, 2))
    table = quiet_table("Change", "Reserved", "To spare", "Costs")
    table.columns[0].no_wrap = table.columns[3].no_wrap = False
    for option in options:
        cost = words.cost(option) + (" (changes the training)" if option["changes_objective"] else "")
        table.add_row(option["title"], size(option["peak"]["reserved"]), size(option["headroom"]), cost)
    return table


def quiet_table(*columns: str) -> Table:
    """A quiet table: no lines, a dim head, words to the left and numbers to the right."""
    table = Table(box=None, pad_edge=True, padding=(0, 1, 0, 1), header_style="dim")
    text = {
        "",
        "Phase",
        "Module",
        "Card",
        "--gpu",
        "Model",
        "Also called",
        "Smallest card",
        "Change",
        "Costs",
        "Peak in",
        "Ranks",
        "Verdict",
    }
    for name in columns:
        table.add_column(name, justify="left" if name in text else "right", no_wrap=True)
    return table


def gpus(cards, prices: dict[str, float], console: Console) -> None:
    """The catalogue of cards."""
    table = quiet_table("Card", "--gpu", "Memory", "Sold as", "bf16", *(["Price"] if prices else []))
    for card in cards:
        memory = ("" if card.measured else "~") + size(card.total_memory)
        price = [f"{prices[card.key]:g}"] if prices else []
        table.add_row(card.name, card.key, memory, f"{card.marketed_gb} GB", "yes" if card.bf16 else "no", *price)
    console.print(table, highlight=False)
    console.print(Text("  Memory: what torch can use. ~ derived from nvidia-smi's total, not read.", "dim"))
    console.print(Text("  Parts of a card: a100-80gb:3g.40gb is a MIG slice, a6000:ecc the card with ECC on.", "dim"))


VERDICTS = {"fits": "fits", "tight": "tight", "does_not_fit": "does not fit"}


def solved(answer: dict, target: str, console: Console) -> None:
    """What the solver found, and what it checked."""
    if target in ("gpu", "model"):
        return _found(answer, target, console)
    if target == "gpu_count":
        return _fewest(answer, console)
    value, where = answer[target], f"{size(answer['memory_limit_bytes'])} of allocator memory"
    name = target.replace("_", " ") if target != "r" else "rank"
    if not value:
        console.print(Text(f"No {name} fits {where}", STATES["does_not_fit"]))
    else:
        console.print(Text(f"The largest {name} in {where} is {value}", STATES["fits"]))
        if "sure" in answer and answer["sure"] != value:
            console.print(Text(f"  {answer['sure']} to be sure: beyond it the verdict is tight."))
        if answer.get("gradient_accumulation_steps", 1) > 1:
            console.print(Text(f"  {answer['gradient_accumulation_steps']} such batches make the job's whole batch."))
    above = [tried for tried, fits in answer["tries"].items() if not fits]
    if above:
        edge = f"{value} fits, {min(above)} does not" if value else f"{min(above)} does not fit"
        console.print(Text(f"  Replayed: {edge}.", "dim"), highlight=False)
    if answer["refused"]:
        console.print(Text(f"  The model takes no {min(answer['refused'])}.", "dim"), highlight=False)


def _fewest(answer: dict, console: Console) -> None:
    found, each = answer["gpu_count"], f"{size(answer['memory_limit_bytes'])} of allocator memory"
    said = f"{found} cards with {each} each are the fewest" if found > 1 else f"One card with {each} is enough"
    said = said if found else f"No number of cards with {each} each is enough"
    console.print(Text(said, STATES["fits" if found else "does_not_fit"]))
    less = [count for count, fits in answer["tries"].items() if not fits]
    if less:
        console.print(Text(f"  Replayed: {max(less)} are too few.", "dim"), highlight=False)
    if answer["refused"]:
        refused = ", ".join(map(str, answer["refused"]))
        console.print(Text(f"  The job takes no {refused}.", "dim"), highlight=False)


def _found(answer: dict, target: str, console: Console) -> None:
    what = {"gpu": "The smallest card that takes it is", "model": "The largest model of the catalogue that fits is"}
    prices = target == "gpu" and any("price" in row for row in answer["cards"])
    lead = "The cheapest card that takes it is" if prices else what[target]
    found = answer[target]
    said = f"{lead} {found}" if found else "None of the catalogue does"
    console.print(Text(said, STATES["fits" if found else "does_not_fit"]), highlight=False)
    rows = answer["cards"] if target == "gpu" else answer["tries"]
    table = quiet_table(
        "Card" if target == "gpu" else "Model", *(["Price"] if prices else []), "Reserved", "To spare", ""
    )
    for row in rows:
        price = [f"{row['price']:g}"] if prices else []
        word = VERDICTS[row["verdict"]]
        table.add_row(row[target], *price, size(row["peak"]["reserved"]), size(row["headroom"]), word)
    console.print(table, highlight=False)


def comparison(answer: dict, console: Console) -> None:
    """Jobs side by side: what was varied, else what tells them apart."""
    rows = answer["rows"]
    plain = [
        field for field in ("model", "method", "batch_size", "sequence_length", "gpu") if field not in answer["over"]
    ]
    told = [field for field in plain if len({str(row.get(field)) for row in rows if "error" not in row}) > 1]
    if not answer["over"] and not told:
        told = ["model", "method"]
    asked = any(row.get("gpu") for row in rows)
    table = quiet_table(
        *answer["over"], *told, "Allocated", "Reserved", "Peak in", *(["Verdict", "To spare"] if asked else [])
    )
    for column in table.columns[: len(answer["over"]) + len(told)]:
        column.justify = "left"
    for row in rows:
        cells = [_cell(row["varied"].get(field)) for field in answer["over"]] + [
            _cell(row.get(field)) for field in told
        ]
        if "error" in row:
            table.add_row(*cells, Text(row["error"]["message"], "yellow"))
            continue
        peak = row["peak"]
        cells += [size(peak["allocated"]), size(peak["reserved"]), peak["phase"]]
        if asked:
            beside = (
                f", cannot {' or '.join(row['cannot'])}" if row["cannot"] and row["verdict"] != "does_not_fit" else ""
            )
            cells += [Text(VERDICTS[row["verdict"]] + beside, STATES[row["verdict"]]), size(row["headroom"])]
        table.add_row(*cells if row.get("gpu") or not asked else (*cells[:-2], "", ""))
    console.print(table, highlight=False)


def _cell(value: object) -> str:
    return value["name"] if isinstance(value, dict) and "name" in value else "" if value is None else str(value)


def models(found, console: Console) -> None:
    """Models of the catalogue."""
    table = quiet_table("Model", "Params", "Also called")
    table.columns[2].no_wrap = False
    for model in found:
        table.add_row(model.id, words.number(model.parameters), ", ".join(model.aliases))
    console.print(table, highlight=False)


def ladder() -> Table:
    """The empty table of ``demo``: one row a model."""
    return quiet_table("Model", "Params", "Weights", "Peak", "Process", "Smallest card")


def ladder_row(table: Table, answer: dict) -> None:
    """Add one answer to :func:`ladder`'s table."""
    weights = sum(answer["parts"].get(kind, 0) for kind in ("weights", "quantization_constants"))
    smallest = words.smallest_card(answer)
    table.add_row(
        words.model_name(answer).rpartition("/")[2],
        words.number(answer["model"]["parameters"]),
        size(weights),
        size(answer["peak"]["allocated"]),
        size(answer["peak"]["process"]),
        smallest["name"] if smallest else "none",
    )
