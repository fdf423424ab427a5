"""The catalogue against the published files and the readings it was derived from.

`shared/` (or $VRAMPLAN_SHARED) holds 264 published config.json, their parameter counts and the GPU
readings; the tests that need it are skipped where it is absent.
"""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vramplan.catalog import gpus, models
from vramplan.catalog.gpus import MIB, all_gpus, find_gpu
from vramplan.catalog.models import MODELS, find_model, search_models
from vramplan.errors import PlanError

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("VRAMPLAN_SHARED") or ROOT.parent / "shared")
needs_shared = pytest.mark.skipif(not (SHARED / "configs").is_dir(), reason="no shared/ beside the repository")

# One of each architecture that builds in a second or two.
PUBLISHED = (
    "HuggingFaceTB/SmolLM2-135M",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-VL-2B-Instruct",
    "openai-community/gpt2",
    "EleutherAI/pythia-70m",
    "facebook/opt-350m",
    "state-spaces/mamba-130m-hf",
    "google-bert/bert-base-uncased",
    "microsoft/deberta-v3-base",
    "answerdotai/ModernBERT-base",
    "google/flan-t5-small",
    "openai/whisper-tiny",
)
# Models of which only the size is at hand, which the publisher tells.
UNPUBLISHED = (
    "codellama/CodeLlama-34b-hf",
    "mistralai/Mixtral-8x22B-v0.1",
    "mistralai/Mistral-Nemo-Base-2407",
    "google/gemma-3-270m",
    "google/gemma-2b",
    "Qwen/Qwen3-1.7B",
    "distilbert/distilbert-base-uncased",
    "google/vit-base-patch16-224",
)


def config_of(facts):
    from transformers import AutoConfig

    return AutoConfig.for_model(facts.pop("model_type"), **facts)


def build(config, architecture):
    """Return the model of that class on the meta device, its tied weights shared."""
    import accelerate
    import transformers

    with accelerate.init_empty_weights(include_buffers=True):
        model = getattr(transformers, architecture)(config)
    model.tie_weights()
    return model


def published_file(id):
    return SHARED / "configs" / f"{id.replace('/', '__')}.json"


# --- models


@pytest.mark.traces
@needs_shared
@pytest.mark.parametrize("id", PUBLISHED)
def test_facts_give_the_published_architecture(id):
    from transformers import AutoConfig

    model = find_model(id)
    architecture = model.facts["architectures"][0]
    ours = build(config_of(model.config), architecture)
    published = build(AutoConfig.from_pretrained(str(published_file(id))), architecture)

    shapes = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in (ours, published)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == model.parameters


@pytest.mark.traces
@pytest.mark.parametrize("id", UNPUBLISHED)
def test_facts_give_the_parameters_told(id):
    model = find_model(id)
    built = build(config_of(model.config), model.facts["architectures"][0])
    assert sum(p.numel() for p in built.parameters()) == model.parameters


@needs_shared
def test_parameters_equal_those_counted_from_the_published_files():
    counted = {}
    for line in (SHARED / "configs/PARAMS.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 7 and cells[3].startswith("yes"):
            other = re.match(r"\w+: ([\d,]+)$", cells[7])
            counted[cells[1]] = int((other[1] if other else cells[5]).replace(",", ""))
    ours = {model.id: model.parameters for model in MODELS if model.id in counted}
    assert len(ours) > 140
    assert ours == {id: counted[id] for id in ours}


# Fields that a config class does not declare and its modeling code reads all the same.
UNDECLARED = {
    ("deberta-v2", "norm_rel_ebd"),
    ("deberta-v2", "position_buckets"),
    ("deberta-v2", "share_att_key"),
    ("gemma3", "vision_config.vision_use_head"),
    ("glm4_moe", "head_dim"),
    ("phi3", "partial_rotary_factor"),
    ("qwen3_moe", "head_dim"),
    ("t5", "decoder_start_token_id"),
}


def test_every_fact_is_a_field_of_its_config_class():
    """A misspelt field would be kept as a mere attribute and change nothing."""
    from transformers import AutoConfig

    defaults, unknown = {}, set()
    for model in MODELS:
        kind = model.facts["model_type"]
        default = defaults.setdefault(kind, AutoConfig.for_model(kind))
        for name, value in model.facts.items():
            if not hasattr(default, name):
                unknown.add((kind, name))
            elif isinstance(value, dict) and name != "rope_parameters":
                inner = getattr(default, name)
                unknown |= {(kind, f"{name}.{k}") for k in value if not hasattr(inner, k)}
    assert unknown == UNDECLARED


def test_the_facts_of_every_model_load_without_a_warning(caplog):
    import logging

    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        for model in MODELS:
            config_of(model.config)
    finally:
        library.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_a_config_leaves_the_catalogue_as_it_was():
    before = copy.deepcopy([model.facts for model in MODELS])
    for model in MODELS:
        config_of(model.config)
    assert [model.facts for model in MODELS] == before


def test_sixty_models_and_the_families_people_ask_for():
    assert len({model.id for model in MODELS}) == len(MODELS) >= 60
    kinds = {model.facts["model_type"] for model in MODELS}
    assert kinds >= {
        "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "phi", "phi3",
        "deepseek_v2", "deepseek_v3", "smollm3", "gpt_oss", "gpt2", "gpt_neox", "opt", "falcon", "bert", "roberta",
        "deberta-v2", "modernbert", "t5", "vit", "whisper", "mamba2", "olmo2", "granite",
    }  # fmt: skip
    assert all(model.facts["architectures"] for model in MODELS)
    assert find_model("Qwen/Qwen3-8B").source == "Qwen/Qwen3-8B/config.json"


def test_no_name_means_two_models():
    owners = {}
    for model in MODELS:
        for name in {model.id.lower(), *model.aliases}:
            assert owners.setdefault(name, model.id) == model.id
            assert name == name.lower()
            assert find_model(name) is model


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("META-LLAMA/LLAMA-3.1-8b-INSTRUCT", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama-3.1-70b", "meta-llama/Llama-3.1-70B"),
        (" 70b ", "meta-llama/Llama-3.1-70B"),
        ("Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("gpt2", "openai-community/gpt2"),
        ("mixtral", "mistralai/Mixtral-8x7B-v0.1"),
    ],
)
def test_find_model(name, id):
    assert find_model(name).id == id


def test_find_model_knows_nothing_else():
    assert find_model("someone/else") is None
    assert find_model("") is None


def test_search_models():
    assert [m.id for m in search_models("llama 405b")] == [
        "meta-llama/Llama-3.1-405B",
        "meta-llama/Llama-3.1-405B-Instruct",
    ]
    assert search_models("Qwen3 8B")[0].id == "Qwen/Qwen3-8B"
    assert search_models("gpt2")[0].id == "openai-community/gpt2"
    assert search_models("phi")[0].id == "microsoft/phi-2", "the shortest name first"
    found = [model.id for model in search_models("8b", limit=99)]
    assert found.index("EleutherAI/pythia-2.8b") > found.index("ibm-granite/granite-3.3-8b-instruct"), "whole first"
    assert search_models("no such model") == []
    assert len(search_models("instruct", limit=5)) == 5
    assert len(search_models("")) == 20


# --- GPUs

# Readings of gpus.md that are nvidia-smi's total, as torch shows it on Windows and WSL.
WINDOWS = {"rtx-2060", "rtx-3060-ti", "rtx-4070-ti", "rtx-5070"}
# Cards without a torch reading there, and with one elsewhere.
READ_ELSEWHERE = {"h100-nvl": 94849, "gh200": 96768, "rx-7900-xtx": 24560}


def rows_of_gpus_md():
    """Return the cells of each row, its card first."""
    table = (SHARED / "gpus.md").read_text().split("| GPU |")[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")]


def card_of(cell):
    return find_gpu(re.sub(r" (\(|/).*", "", cell))


def numbers(cell):
    """Return the MiB figures of a cell: what stands before `=` or `;`, sources left out."""
    return [int(n) for n in re.findall(r"(?:^|; )(\d+)", re.sub(r"\[.*?\]", "", cell))]


@needs_shared
def test_every_card_of_gpus_md_is_in_the_catalogue():
    rows = rows_of_gpus_md()
    assert len(rows) == len({card_of(row[0]).key for row in rows}) == len(all_gpus()) == 62


@needs_shared
def test_totals_are_the_lowest_readings():
    compared = 0
    for name, _, smi_cell, torch_cell, *_ in rows_of_gpus_md():
        gpu, torch, smi = card_of(name), numbers(torch_cell), numbers(smi_cell)
        if torch and gpu.key not in WINDOWS:
            assert gpu.measured and gpu.total_memory == min(torch) * MIB, gpu.key
            compared += 1
        elif gpu.key in READ_ELSEWHERE:
            assert gpu.measured and gpu.total_memory == READ_ELSEWHERE[gpu.key] * MIB
        else:
            assert not gpu.measured and "less the gap of" in gpu.source, gpu.key
        if smi:
            assert gpu.smi_memory // MIB in smi, gpu.key
    assert compared == 38


@needs_shared
def test_the_other_columns_are_those_of_gpus_md():
    for name, marketed, _, _, bandwidth, arch, bf16, _ in rows_of_gpus_md():
        gpu = card_of(name)
        assert gpu.marketed_gb == int(marketed.split()[0])
        assert arch.startswith(gpu.arch.split()[0])
        if gpu.compute_capability:
            assert arch.endswith("{}.{}".format(*gpu.compute_capability)), gpu.key
        assert gpu.bf16 == bf16.startswith("yes"), gpu.key
        told = [float(n) for n in re.findall(r"\d{3,5}(?:\.\d+)?", bandwidth)]
        assert not told or min(abs(gpu.bandwidth_gbs / n - 1) for n in told) < 0.001, gpu.key


def test_derived_totals_are_cautious():
    derived = [gpu for gpu in all_gpus() if not gpu.measured]
    assert len(derived) == 21
    for gpu in derived:
        if gpu.smi_memory:
            assert 0.953 <= gpu.total_memory / gpu.smi_memory <= 0.9961, gpu.key
    # Totals of out-of-memory messages that name no card, and that no other card can show.
    for key, gib in (("gb200", 184.31), ("b300", 267.69), ("gb300", 276.50)):
        assert 0.999 * gib < find_gpu(key).total_memory / 1024**3 <= gib


def test_no_card_has_more_than_its_box_says():
    for gpu in all_gpus():
        assert gpu.total_memory <= gpu.marketed_gb * 1024**3 * 1.001, gpu.key
        assert gpu.smi_memory is None or gpu.total_memory <= gpu.smi_memory + MIB, gpu.key


def test_cards_are_in_order_of_memory():
    totals = [gpu.total_memory for gpu in all_gpus()]
    assert totals == sorted(totals)
    assert totals[0] < 6 * 1024**3 < 270 * 1024**3 < totals[-1]


def test_no_name_means_two_cards():
    owners = {}
    for gpu in all_gpus():
        for name in (gpu.key, gpu.name, *gpu.aliases):
            assert owners.setdefault(gpus._plain(name), gpu.key) == gpu.key, name


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("h200", "h200"),
        ("NVIDIA H200", "h200"),
        ("a100", "a100-80gb"),
        ("A100-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090-laptop"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("a16", "a2"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_find_gpu(name, key):
    assert find_gpu(name).key == key


def test_an_unknown_card_names_the_nearest():
    with pytest.raises(PlanError) as caught:
        find_gpu("RTX 4091")
    assert "'RTX 4091'" in caught.value.message
    assert "rtx-4090" in caught.value.hint
    for nothing in ("", "NVIDIA", "???"):
        with pytest.raises(PlanError):
            find_gpu(nothing)


def test_the_catalogue_imports_neither_torch_nor_transformers():
    program = (
        f"import sys, {models.__name__}, {gpus.__name__}; "
        "print(*sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
