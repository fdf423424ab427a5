"""Every measured row, asked through the public command line; from the answers are written the README's tables and
``app/catalog/accuracy.json``, which the page of accuracy shows row by row.

``VRAMPLAN_WRITE=1 pytest tests/test_accuracy.py`` rewrites both; without it what has drifted fails.
The rows are in ``tests/measured``, each with its job and, where the catalogue lacks the model, with its config (of the
published one, shortened to the ``layers`` that were measured).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from vramplan.job import read_job
from vramplan.memory.fit import MIN_MARGIN, measured_of
from vramplan.planning.planned_job import kind_of
from vramplan.render.accuracy import DATA, error, summary

ROOT = Path(__file__).parent.parent
MEASURED = Path(__file__).parent / "measured"
PHASES = {
    "after_forward": ("forward", "allocated_end"),
    "peak_forward": ("forward", "peak_allocated"),
    "after_backward": ("backward", "allocated_end"),
    "peak_backward": ("backward", "peak_allocated"),
    "peak_optim": ("optimizer", "peak_allocated"),
    "end_alloc": ("end", "allocated_end"),
}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask(lines: list[dict], *command: str) -> list[dict]:
    """The answers of two ``python -m vramplan`` processes, every second line each, in order."""

    def run(part: list[dict]) -> list[dict]:
        text = "\n".join(json.dumps(line) for line in part)
        done = subprocess.run(
            [sys.executable, "-m", "vramplan", *command, "--jobs", "-", "--json"],
            input=text,
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=900,
        )
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(part), done.stderr[-2000:]
        return answers

    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(run, (lines[::2], lines[1::2])))
    out = [None] * len(lines)
    out[::2], out[1::2] = halves
    return out


POST_TRAINING = {
    "post-training": ("h100-post-training.jsonl", "one H100: post-training"),
    "own-post-training": ("h100-own-post-training.jsonl", "one H100: post-training, other settings"),
}
"""Rows of objectives, trainers' arguments, adapters, optimisers and generation: file and title by table."""
SAMPLE = 27
"""``make test`` plans every so many of these rows."""
NOT_PLANNED = ("not modelled", "PEFT cannot adapt")
"""What an answer says that refuses a row."""

Errors = dict[str, list[tuple[float, str, int, int]]]
"""By figure, a row each: the error in percent, the row's id, the bytes planned and the bytes measured."""


def compare(rows: list[dict], answers: list[dict], stated: bool = True) -> Errors:
    """The errors; ``stated``: every row lies in its kind's interval."""
    errors: Errors = {}

    def note(figure: str, found: int, truth: int | None, row: dict) -> None:
        if truth:
            errors.setdefault(figure, []).append((error(found, truth), row["id"], found, truth))

    for row, answer in zip(rows, answers, strict=True):
        assert "error" not in answer, (row["id"], answer["error"])
        measured = row["measured"]
        assert sum(answer["parts"].values()) == answer["peak"]["allocated"], row["id"]
        if stated:
            within_what_its_kind_states(row, answer)
        note("peak_allocated", answer["peak"]["allocated"], measured["peak_allocated"], row)
        note("peak_reserved", answer["peak"]["reserved"], measured.get("peak_reserved"), row)
        note("peak_process", answer["peak"]["process"], measured.get("peak_process"), row)
        note("placed_allocated", answer["load"]["placed_allocated"], measured["placed_allocated"], row)
        note("optimizer_state", answer["optimizer_state"], measured.get("optimizer_state"), row)
        phases = {(phase["step"], phase["name"]): phase for phase in answer["phases"]}
        for number, step in enumerate(first_and_steady(measured.get("steps")), 1):
            for name, (phase, field) in PHASES.items():
                if (number, phase) in phases:
                    note("phases", phases[number, phase][field], step[name], row)
    return errors


def compare_post_training(rows: list[dict], answers: list[dict]) -> tuple[Errors, list[str]]:
    """The errors, with one of phases for each phase's peak; and the ids of the rows that are not planned."""
    planned = [(row, answer) for row, answer in zip(rows, answers, strict=True) if "error" not in answer]
    refused = [(row["id"], answer["error"]) for row, answer in zip(rows, answers, strict=True) if "error" in answer]
    for id, told in refused:
        assert any(words in told["message"] for words in NOT_PLANNED), (id, told)
    errors = compare(*map(list, zip(*planned, strict=True)), stated=False)
    for row, answer in planned:
        for peak, found, truth in phase_peaks(row["measured"], answer["phases"]):
            errors.setdefault("phases", []).append((error(found, truth), f"{row['id']} {peak}", found, truth))
    return errors, [id for id, _ in refused]


def phase_peaks(measured: dict, phases: list[dict]) -> Iterator[tuple[str, int, int]]:
    """Of the first and the last step, each phase that both know: its name, its peak planned and its peak measured."""
    steps = sorted({phase["step"] for phase in phases if phase["step"]})
    for which, step in (("first", steps[0]), ("steady", steps[-1])):
        for name, truth in (measured.get(which) or {}).get("peaks", {}).items():
            found = [phase["peak_allocated"] for phase in phases if (phase["step"], phase["name"]) == (step, name)]
            if found:
                yield f"{which} {name}", max(found), truth


def first_and_steady(steps: list[dict] | None) -> list[dict]:
    """The first of the measured steps, and the one with the highest peak of those that follow: a plan shows these."""
    if not steps:
        return []
    return [steps[0], max(steps[1:], key=lambda step: max(size for name, size in step.items() if "peak" in name))]


def within_what_its_kind_states(row: dict, answer: dict) -> None:
    """The measured peaks lie in the interval that the verdict takes for this kind of job."""
    known, _ = measured_of(kind_of(read_job({**answer["job"], "model": "a/model"})))
    for figure in ("allocated", "reserved"):
        found, truth = answer["peak"][figure], row["measured"].get(f"peak_{figure}")
        if truth:
            below, above = (max(share * found, MIN_MARGIN) for share in (known.below, known.above))
            assert -below <= truth - found <= above, (row["id"], figure, truth - found)


def limits_of(errors: Errors, figure: str) -> tuple[float, float, float]:
    return summary([found[0] for found in errors[figure]])


def table(title: str, errors: Errors) -> list[str]:
    lines = [f"| {title} | figures | median | 95 % | worst | the worst row |", "| --- | --: | --: | --: | --: | --- |"]
    for figure, found in errors.items():
        median, most, worst = limits_of(errors, figure)
        name = max(found)[1]
        lines.append(f"| {figure} | {len(found)} | {median:.3f} % | {most:.2f} % | {worst:.2f} % | {name} |")
    return lines


TABLES = ("h200", "h100", "architectures", "settings", *POST_TRAINING, "frontiers")


def check_data(name: str, title: str, rows: list[dict]) -> None:
    """What the page of accuracy shows of these rows is what was computed."""
    kept = json.loads(DATA.read_text()) if DATA.exists() else {}
    found = {**kept, name: {"title": title, "rows": rows}}
    if os.environ.get("VRAMPLAN_WRITE"):
        tables = [
            f'{json.dumps(key)}: {{\n"title": {json.dumps(table["title"])}, "rows": [\n'
            + ",\n".join(map(json.dumps, table["rows"]))
            + "\n]}"
            for key, table in sorted(found.items(), key=lambda pair: TABLES.index(pair[0]))
        ]
        DATA.write_text("{\n" + ",\n".join(tables) + "\n}\n")
    assert found == kept or os.environ.get("VRAMPLAN_WRITE"), f"the rows {name} in {DATA.name} have drifted"


def check(name: str, title: str, errors: Errors) -> None:
    """The table ``name`` and, for the page, every row: of its phases the one that is most off."""
    rows: dict[str, dict] = {}
    for figure, found in errors.items():
        for off, id, planned, measured in found:
            row = rows.setdefault(id.split()[0], {"id": id.split()[0]})
            if figure not in row or off > error(*row[figure]):
                row[figure] = [planned, measured]
    check_readme(name, table(title, errors))
    check_data(name, title, [*rows.values()])


def check_readme(name: str, lines: list[str], file: str = "README.md") -> None:
    readme = ROOT / file
    text = readme.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
    assert pattern.search(text), f"{file} has no block {name}"
    written = pattern.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], text)
    if os.environ.get("VRAMPLAN_WRITE"):
        readme.write_text(written)
    assert written == text or os.environ.get("VRAMPLAN_WRITE"), f"the table {name} in {file} has drifted"


def test_the_h200_rows():
    rows = rows_of(MEASURED / "h200-steps.jsonl")
    errors = compare(rows, ask([row["job"] for row in rows], "estimate"))
    bounds = {
        "peak_allocated": (0.1, 1, 1),
        "peak_reserved": (1, 5, 8),
        "placed_allocated": (0.1, 0.1, 0.5),
        "optimizer_state": (0.1, 0.1, 0.1),
        "phases": (0.2, 0.5, 1),
    }
    check("h200", "one H200, 78 jobs", errors)
    for figure, limits in bounds.items():
        assert all(found <= limit for found, limit in zip(limits_of(errors, figure), limits, strict=True)), (
            figure,
            max(errors[figure]),
        )


def test_our_own_rows():
    rows = rows_of(MEASURED / "h100-steps.jsonl")
    errors = compare(rows, ask([row["job"] for row in rows], "estimate"))
    check("h100", f"one H100, {len(rows)} jobs", errors)
    median, most, worst = limits_of(errors, "peak_allocated")
    assert median <= 0.1 and most <= 1 and worst <= 2, max(errors["peak_allocated"])


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(MEASURED.glob("*-probe.jsonl")), ids=lambda path: path.stem)
def test_probed_rows(path):
    """Rows that ``vramplan probe --report`` wrote on a card, of whole models: at least 30, each within the bounds."""
    rows = [row for row in rows_of(path) if row["layers"] is None]
    answers = ask([row["job"] for row in rows], "estimate")
    errors = compare(rows, answers)
    card = path.stem.partition("-")[0]
    check_readme(f"probe-{card}", table(f"one {card.upper()}, {len(rows)} jobs", errors), "docs/probe.md")
    lines = [
        "| job | allocated, bytes | plan | reserved | process | matched |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for row, answer in zip(rows, answers, strict=True):
        cells = [
            f"{(answer['peak'][figure] / row['measured'][f'peak_{figure}'] - 1) * 100:+.3f} %"
            for figure in ("allocated", "reserved", "process")
        ]
        matched = f"{100 * row['matched']:.2f} %"
        lines.append(f"| {row['id']} | {row['measured']['peak_allocated']:,} | {' | '.join(cells)} | {matched} |")
    check_readme(f"probe-jobs-{card}", lines, "docs/probe.md")
    assert len(rows) >= 30 and min(row["matched"] for row in rows) >= 0.99
    for figure, limits in {"peak_allocated": (0.1, 1), "peak_reserved": (1, 5), "peak_process": (2, 2)}.items():
        median, _, worst = limits_of(errors, figure)
        assert median <= limits[0] and worst <= limits[1], (figure, max(errors[figure]))


def settings_rows() -> list[dict]:
    """Methods, trainers, optimisers, masks, dtypes, accumulation, routing of published configs: rows that nobody chose
    (Python's ``random`` did), those left out that the stack refuses and LLM.int8's, which depend on the values."""
    rows = rows_of(MEASURED / "h200-settings.jsonl")
    for row in rows:  # measured as a sum over parameters: the code book that they share was counted for each
        if row["job"]["trainer"] != "pytorch" and "8bit" in row["job"]["optimizer"]:
            row["measured"]["optimizer_state"] = None
    return rows


def check_settings(rows: list[dict]) -> Errors:
    """The errors, within their bounds."""
    errors = compare(rows, ask([row["job"] for row in rows], "estimate"))
    median, most, worst = limits_of(errors, "peak_allocated")
    assert median <= 0.001 and most <= 0.1 and worst <= 0.5, max(errors["peak_allocated"])
    return errors


@pytest.mark.slow
def test_settings_drawn_at_random():
    rows = settings_rows()
    check("settings", f"one H200, {len(rows)} jobs drawn at random", check_settings(rows))


def test_a_sample_of_settings_drawn_at_random():
    """Every fourth of them; a slow test has them all, and writes the table."""
    check_settings(settings_rows()[::4])


def test_architectures_that_the_h200_rows_lack():
    """Hybrids, state-space and MoE models, MLA, vision-language, speech: published configs, shortened where needed."""
    rows = rows_of(MEASURED / "h100-architectures.jsonl")
    errors = compare(rows, ask([row["job"] for row in rows], "estimate"))
    check("architectures", f"one H100, {len(rows)} other architectures", errors)
    median, _, worst = limits_of(errors, "peak_allocated")
    assert median <= 0.1 and worst <= 1, max(errors["peak_allocated"])


@pytest.mark.parametrize("table", POST_TRAINING)
def test_a_sample_of_post_training(table):
    """Whatever is planned is near; what is not is said to be not planned."""
    rows = rows_of(MEASURED / POST_TRAINING[table][0])[::SAMPLE]
    errors, _ = compare_post_training(rows, ask([row["job"] for row in rows], "estimate"))
    within_bounds_of_post_training(errors)


@pytest.mark.slow
@pytest.mark.parametrize("table", POST_TRAINING)
def test_post_training(table):
    file, title = POST_TRAINING[table]
    rows = rows_of(MEASURED / file)
    errors, refused = compare_post_training(rows, ask([row["job"] for row in rows], "estimate"))
    check(table, f"{title}, {len(rows) - len(refused)} of {len(rows)} jobs", errors)
    within_bounds_of_post_training(errors)


def within_bounds_of_post_training(errors: Errors) -> None:
    for figure, bounds in {"peak_allocated": (0.1, 1, 2), "phases": (0.3, 100, 100)}.items():
        found = limits_of(errors, figure)
        assert all(value <= bound for value, bound in zip(found, bounds, strict=True)), (
            figure,
            found,
            max(errors[figure]),
        )


def test_frontiers():
    rows = rows_of(MEASURED / "h200-frontiers.jsonl")
    lines = [{**row["job"], "memory_limit_bytes": row["cap_bytes"]} for row in rows]
    found = [answer["batch_size"] for answer in ask(lines, "solve", "--for", "batch_size")]
    truth = [row["max_batch_size"] for row in rows]
    lines = ["| job | limit | largest batch | measured |", "| --- | --: | --: | --: |"]
    for row, mine in zip(rows, found, strict=True):
        lines.append(f"| {row['id']} | {row['cap_bytes'] / 2**30:.1f} GiB | {mine} | {row['max_batch_size']} |")
    check_readme("frontiers", lines)
    title = "one H200, the largest batch under a cap on the allocator"
    keys = ("id", "limit", "planned", "measured")
    values = ((row["id"], row["cap_bytes"], mine, row["max_batch_size"]) for row, mine in zip(rows, found, strict=True))
    check_data("frontiers", title, [dict(zip(keys, each, strict=True)) for each in values])
    assert sum(a == b for a, b in zip(found, truth, strict=True)) >= 9
    assert all(a <= b for a, b in zip(found, truth, strict=True))
