"""The command line as a user meets it: exit codes, one message an error, JSON lines in order, a page to read."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import BAD, JOB, LLAMA
from vramplan import cli
from vramplan.cli import demo_command
from vramplan.form import fields, to_job, to_pairs
from vramplan.job import Job


@pytest.fixture
def vramplan(monkeypatch, capsys):
    """Run ``vramplan`` in this process: (exit code, standard output, standard error)."""

    def run(*args, stdin=""):
        monkeypatch.setattr(sys, "argv", ["vramplan", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return end.value.code or 0, out, err

    return run


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def job_file(tmp_path, job):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    return path


@pytest.mark.traces
def test_a_job_that_fits_its_card_exits_with_0_and_says_so_first(vramplan, config):
    code, out, err = vramplan("estimate", "--config", config, "-m", "lora", "-s", 64, "--gpu", "a100-80gb")
    assert code == 0 and err == ""
    assert out.splitlines()[0].strip().startswith("Fits an A100-SXM4-80GB with 7")
    for word in ("Allocated", "Reserved", "Process", "Phases", "Steady step", "Layers", "Smallest cards", "torch 2"):
        assert word in out, word
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


@pytest.mark.traces
def test_a_job_that_does_not_fit_exits_with_1(vramplan, config):
    code, out, _ = vramplan("estimate", "--config", config, "-m", "lora", "-s", 64, "--gpu", "500MiB")
    assert code == 1 and out.startswith("Does not fit a card of 500 MiB")


@pytest.mark.traces
def test_a_job_without_a_card_exits_with_0_and_names_the_smallest(vramplan, config):
    code, out, _ = vramplan("estimate", "--config", config, "-m", "lora", "-s", 64)
    assert code == 0 and out.startswith("Needs ") and "GeForce RTX 2060" in out


@pytest.mark.traces
def test_json_is_one_answer_on_one_line(vramplan, config):
    code, out, _ = vramplan("estimate", "--config", config, "--method", "lora", "--sequence-length", 64, "--json")
    answer = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert sum(answer["parts"].values()) == answer["peak"]["allocated"]


@pytest.mark.traces
def test_repeated_layers_are_one_line_until_layers_are_asked_for(vramplan, config):
    args = ("estimate", "--config", config, "-m", "lora", "-s", 64, "--trainer", "pytorch")
    _, grouped, _ = vramplan(*args)
    _, opened, _ = vramplan(*args, "--layers")
    assert re.search(r"model\.layers\.\{[^}]*1\} × 2", grouped) and grouped.count("self_attn.q_proj") == 1
    assert "model.layers.{" not in opened and opened.count("self_attn.q_proj") == 2


@pytest.mark.traces
def test_options_change_a_job_file(vramplan, tmp_path):
    path = job_file(tmp_path, {**JOB, "lora": {"r": 4, "target_modules": ["q_proj"]}})
    _, out, _ = vramplan("estimate", "--job", path, "-b", 3, "--lora-r", 8, "--set", "lora.use_rslora=true", "--json")
    job = json.loads(out)["job"]
    assert job["batch_size"] == 3
    assert (job["lora"]["r"], job["lora"]["target_modules"], job["lora"]["use_rslora"]) == (8, ["q_proj"], True)


@pytest.mark.traces
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_planned_is_one_message_and_exit_code_2(vramplan, tmp_path, name):
    job, message, also, _ = BAD[name]
    code, out, err = vramplan("estimate", "--job", job_file(tmp_path, job))
    lines = err.splitlines()
    assert code == 2 and out == ""
    assert lines[0].startswith("Cannot say: ") and message in lines[0] and also in err
    assert len(lines) <= 2 + ("\nWeights: " in err)  # what was built says what it weighs


@pytest.mark.traces
@pytest.mark.parametrize(
    "args, message",
    [
        (("estimate", "--config", "{config}", "-b", "-1"), "`batch_size`"),
        (("estimate", "llama-3.1-8b", "--config", "{config}"), "exactly one"),
        (("estimate", "--config", "/nowhere/config.json"), "/nowhere/config.json cannot be read"),
        (("estimate", "--job", "{config}"), "unknown field"),
        (("estimate", "--jobs", "/nowhere/jobs.jsonl"), "/nowhere/jobs.jsonl cannot be read"),
        (("estimate", "--jobs", "-", "-b", "2"), "--jobs takes every job from its own line"),
        (("estimate", "--config", "{config}", "--set", "seed"), "no value"),
        (("estimate", "--config", "{config}", "--set", "batch=2"), "unknown field `batch`"),
        (("estimate", "--config", "{config}", "--lora-targets", "nope", "-m", "lora", "-s", "64"), "nope"),
        (("estimate", "--nonsense"), "nonsense"),
        (("models", "no-such-model"), "no-such-model"),
    ],
)
def test_bad_options_exit_with_2(vramplan, config, args, message):
    code, _, err = vramplan(*(arg.format(config=config) for arg in args))
    assert code == 2 and message in err


def test_with_json_an_error_is_json_too(vramplan, tmp_path):
    code, out, err = vramplan("estimate", "--job", job_file(tmp_path, BAD["negative batch"][0]), "--json")
    error = json.loads(out)["error"]
    assert code == 2 and error["field"] == "batch_size" and error["message"] in err


def test_a_fault_of_the_planner_is_one_sentence_and_exit_code_2(vramplan, config, monkeypatch):
    monkeypatch.setattr("vramplan.planning.estimate.estimate", lambda *_, **__: 1 / 0)
    code, _, err = vramplan("estimate", "--config", config)
    assert code == 2 and err.startswith("Cannot say: the planner failed on this job: ZeroDivisionError")


@pytest.mark.traces
def test_jobs_come_back_in_order_with_their_ids_and_errors_do_not_stop_them(vramplan):
    lines = [
        json.dumps({"id": 7, "job": JOB}),
        "",
        "{not json",
        json.dumps({"id": "b", "job": {**JOB, "batch_size": 0}}),
        "[1]",
        json.dumps({**JOB, "method": "full"}),
    ]
    code, out, err = vramplan("estimate", "--jobs", "-", "--json", stdin="\n".join(lines))
    good, broken, bad, strange, last = map(json.loads, out.splitlines())
    assert code == 2 and err == ""
    assert good["id"] == 7 and good["peak"]["allocated"] > 0
    assert broken["error"]["message"].startswith("the line is not JSON") and "id" not in broken
    assert bad["id"] == "b" and bad["error"]["field"] == "batch_size"
    assert "list" in strange["error"]["message"]
    assert last["job"]["method"] == "full" and "id" not in last


@pytest.mark.traces
def test_jobs_that_all_plan_exit_with_0(vramplan, tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text(f"{json.dumps({**JOB, 'gpu': {'memory_bytes': 1 << 20}})}\n")
    code, out, _ = vramplan("estimate", "--jobs", path)
    assert code == 0 and json.loads(out)["fits"][0]["verdict"] == "does_not_fit"


@pytest.mark.traces
def test_a_fault_of_the_planner_is_its_lines_alone(vramplan, monkeypatch):
    from vramplan.planning import estimate as service

    real = service.estimate
    monkeypatch.setattr(service, "estimate", lambda job, **k: real(job, **k) if job["batch_size"] == 1 else {}["x"])
    jobs = [{**JOB, "batch_size": size} for size in (2, 1)]
    code, out, _ = vramplan("estimate", "--jobs", "-", stdin="\n".join(map(json.dumps, jobs)))
    first, second = map(json.loads, out.splitlines())
    assert code == 2 and "KeyError" in first["error"]["message"] and "peak" in second


@pytest.mark.traces
def test_solve_finds_the_largest_and_exits_with_1_where_none_fits(vramplan, tmp_path):
    path = job_file(tmp_path, JOB)
    code, out, _ = vramplan("solve", "--job", path, "--memory-limit-bytes", 40 << 20, "--json")
    most = json.loads(out)["batch_size"]
    assert code == 0 and most > 1
    code, out, _ = vramplan("solve", "--job", path, "--memory-limit-bytes", 1 << 20)
    assert code == 1 and out.startswith("No batch size fits 1.0 MiB")
    lines = [json.dumps({"id": 1, "job": JOB, "memory_limit_bytes": 40 << 20}), json.dumps(JOB)]
    code, out, _ = vramplan("solve", "--jobs", "-", "--for", "batch_size", stdin="\n".join(lines))
    good, bad = map(json.loads, out.splitlines())
    assert code == 2 and (good["id"], good["batch_size"]) == (1, most)
    assert "memory_limit_bytes" in bad["error"]["message"]
    assert vramplan("solve")[0] == 2 and vramplan("solve", "--job", path, "--for", "luck")[0] == 2


@pytest.mark.traces
def test_solve_takes_the_options_of_a_job_and_a_card(vramplan, config):
    code, out, _ = vramplan("solve", "--config", config, "-m", "lora", "-s", 64, "-g", "rtx-2060", "--for", "r")
    assert code == 0 and out.startswith("The largest rank in ")
    code, out, _ = vramplan("solve", "--config", config, "-m", "lora", "-s", 64, "--for", "gpu")
    assert code == 0 and out.startswith("The smallest card that takes it is rtx-4060")  # the smallest with bfloat16
    code, _, err = vramplan("solve", "--config", config, "--for", "lenght", "-g", "t4")
    assert code == 2 and "lenght" in err and "batch_size" in err


@pytest.mark.traces
def test_prices_rank_the_cards(vramplan, config, tmp_path):
    prices = tmp_path / "prices.csv"
    prices.write_text("a100-80gb,2\nrtx-4090,0.4\n")
    code, out, _ = vramplan("solve", "--config", config, "-s", 64, "--for", "gpu", "--prices", prices)
    assert code == 0 and out.startswith("The cheapest card that takes it is rtx-4090")
    code, out, _ = vramplan("gpus", "--prices", prices, "--json")
    assert [card["price"] for card in json.loads(out)] == [0.4, 2]


@pytest.mark.traces
def test_compare_varies_one_job_or_takes_several(vramplan, config, tmp_path):
    asked = ("compare", "--config", config, "-s", 64, "--over", "method=lora,full", "--over", "gpu=rtx-4090,500MiB")
    code, out, _ = vramplan(*asked)
    assert code == 0 and out.split()[:2] == ["method", "gpu"] and out.count("does not fit") == 2
    code, out, _ = vramplan(*asked, "--csv")
    assert len(out.splitlines()) == 5 and out.startswith("method,gpu,")
    lines = "\n".join(json.dumps({**JOB, "batch_size": size}) for size in (1, 8))
    code, out, _ = vramplan("compare", "--jobs", "-", stdin=lines)
    assert code == 0 and out.split()[:2] == ["batch_size", "Allocated"]
    code, _, err = vramplan("compare")
    assert code == 2 and "--over" in err


def test_the_card_of_a_machine_without_a_driver_is_refused(vramplan, config, monkeypatch):
    import pynvml

    def missing():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    code, _, err = vramplan("estimate", "--config", config, "-s", 64, "--gpu", "local")
    assert code == 2 and "no NVIDIA driver" in err


@pytest.mark.traces
def test_advice_is_a_list_of_changes_that_make_it_fit(vramplan, tmp_path):
    path = job_file(tmp_path, {**JOB, "method": "full", "batch_size": 64, "gpu": {"memory_bytes": 590 << 20}})
    code, out, _ = vramplan("estimate", "--job", path, "--advise")
    assert code == 1 and "What would make it fit" in out and "smaller batch, accumulated" in " ".join(out.split())
    _, out, _ = vramplan("estimate", "--job", path, "--advise", "--json")
    assert all(option["verdict"] != "does_not_fit" for option in json.loads(out)["advice"]["suggestions"])
    code, _, err = vramplan("estimate", "--job", job_file(tmp_path, JOB), "--advise")
    assert code == 2 and "names none" in err


def test_the_catalogues_are_listed(vramplan):
    code, out, _ = vramplan("gpus")
    assert code == 0 and "a100-80gb" in out and max(map(len, out.splitlines())) <= 80
    code, out, _ = vramplan("models", "llama", "3.1", "8b")
    assert code == 0 and "meta-llama/Llama-3.1-8B" in out and "Qwen" not in out
    assert json.loads(vramplan("gpus", "--json")[1])[0]["total_memory"] > 1 << 30
    assert json.loads(vramplan("models", "pythia-70m", "--json")[1])[0]["id"] == "EleutherAI/pythia-70m"


@pytest.mark.traces
def test_the_demo_answers_the_main_question_and_climbs_the_ladder(vramplan, monkeypatch):
    from vramplan.usecases import plan

    asked = []
    monkeypatch.setattr(demo_command, "plan", lambda job: asked.append(job) or plan({**JOB, "gpu": job.get("gpu")}))
    monkeypatch.setattr(demo_command, "other_trainers", lambda job, trace: [])
    code, out, _ = vramplan("demo")
    assert code == 0 and "Fits an A100-SXM4-80GB" in out and "RTX A6000" in out
    assert [job["model"] for job in asked] == ["llama-3.1-70b", *demo_command.LADDER]
    assert all(job["quantization"]["double_quant"] and job["lora"]["r"] == 16 for job in asked)


@pytest.mark.traces
def test_the_demo_s_second_card_is_planned_as_the_demo_says():
    from vramplan.planning.pretrace import QUESTION
    from vramplan.usecases import plan

    job = {**QUESTION, "model": demo_command.LADDER[-1]}
    shown = demo_command._on(plan({**job, "gpu": "a100-80gb"}), "a6000")["fits"][0]
    assert {**shown, "same_kernels": True} == plan({**job, "gpu": "a6000"})["fits"][0]


def test_version_names_the_stack(vramplan):
    code, out, _ = vramplan("version")
    assert code == 0 and "vramplan " in out and "transformers " in out


def test_looking_things_up_does_not_import_torch():
    template = (
        "import sys; from app import cli\n"
        "for args in (['gpus'], ['models', 'llama'], ['--help'], ['estimate', '--help']):\n"
        "    sys.argv = ['vramplan', *args]\n"
        "    try: cli.main()\n"
        "    except SystemExit as end: assert not end.code, args\n"
        "import vramplan.server.app\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", template], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m_app_is_vramplan():
    args = [sys.executable, "-m", "vramplan", "estimate", "--job", "/nowhere"]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("Cannot say: /nowhere cannot be read")


@pytest.mark.traces
@pytest.mark.parametrize("method", [["lora"], ["inference", "--quantization", "int8"]], ids=" ".join)
def test_libraries_do_not_talk_between_an_answer_s_lines(method):
    args = [sys.executable, "-m", "vramplan", "estimate", "gpt2", "-s", "64", "-g", "t4", "-m", *method]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("Fits a Tesla T4")


def test_text_becomes_what_the_schema_takes():
    job = to_job(
        {
            "model": "123",
            "batch_size": "4",
            "gpu": "23.5 gib",
            "lora.r": "8",
            "lora.alpha": "0.5",
            "lora.target_modules": "q_proj, v_proj",
            "lora.use_dora": "true",
            "gradient_checkpointing": "false",
            "sequence_length": "null",
            "optimizer": "  ",
        }.items()
    )
    assert job == {
        "model": "123",
        "batch_size": 4,
        "gpu": {"name": "a card of 23.5 GiB", "memory_bytes": int(23.5 * 2**30)},
        "lora": {"r": 8, "alpha": 0.5, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
        "gradient_checkpointing": False,
        "sequence_length": None,
    }
    assert to_job([("batch_size", "-1"), ("lora.r", "+2")]) == {"batch_size": -1, "lora": {"r": 2}}
    assert Job.model_validate(job).lora.target_modules == ("q_proj", "v_proj")


def test_arguments_of_libraries_survive_as_text():
    job = {
        "lora": {"r": 8, "rank_pattern": {"v_proj": 4}, "exclude_modules": ["a", "b"], "lora_bias": True},
        "trainer_args": {"max_grad_norm": 0.5, "loss_type": ["sigmoid", "sft"]},
        "generation_args": {"do_sample": True},
    }
    assert to_job(to_pairs(job).items()) == job
    assert to_job([("trainer_args.max_length", "64"), ("trainer_args.loss_type", "dft")]) == {
        "trainer_args": {"max_length": 64, "loss_type": "dft"}
    }


def test_every_field_of_the_job_is_known_to_the_form():
    flat = {name.partition(".")[0] for name in fields()}
    assert flat == set(Job.model_fields)
    assert fields()["optimizer"].choices and fields()["lora.use_dora"].choices == ("true", "false")


def test_a_model_may_be_named_by_an_option(vramplan):
    code, _, err = vramplan("estimate", "llama-3.1-8b", "--model", "gpt2")
    assert code == 2 and "two models are named: llama-3.1-8b and --model gpt2" in err
    _, by_option, _ = vramplan("estimate", "--model", "llama-3.1-8b", "-m", "qlora", "--json")
    _, by_argument, _ = vramplan("estimate", "llama-3.1-8b", "-m", "qlora", "--json")
    assert json.loads(by_option) == json.loads(by_argument)


FOLDER = """
import runpy, sys
sys.modules.pop("vramplan", None)
sys.argv = ["vramplan", "demo"]
try:
    runpy.run_module("app", run_name={name!r})
except SystemExit:
    pass
import vramplan.memory.allocator.caching as caching
print([name for name in sys.modules if name.startswith("app.")], caching.__name__, caching.__file__)
"""


@pytest.mark.parametrize("name", ["__main__", "__mp_main__"])
def test_the_folder_that_is_run_is_the_package_by_its_own_name(name):
    """Numba's caches name their module: what ``python -m app`` compiles, ``vramplan`` must be able to load."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", FOLDER.format(name=name)], cwd=root, capture_output=True, text=True, check=True
    )
    own = root / "app" / "memory" / "allocator" / "caching.py"
    assert done.stdout.endswith(f"[] vramplan.memory.allocator.caching {own}\n"), done.stdout[-300:]
    assert ("Fits an A100" in done.stdout) == (name == "__main__")
