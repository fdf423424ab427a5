"""Servers: commands are read by the engine's own flags, caches are counted in integers, plans agree with starts that
others published."""

import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from rich.console import Console
from vramplan import cli
from vramplan.catalog.gpus import find_gpu
from vramplan.errors import PlanError
from vramplan.render import served
from vramplan.server.app import create_app
from vramplan.serving import gguf, kv_cache
from vramplan.serving.command import read, start_of, words_of
from vramplan.serving.kv_cache import CacheLayer, pool_of
from vramplan.serving.llamacpp_flags import FLAGS as LLAMA
from vramplan.serving.named_model import look_at
from vramplan.serving.rank_weights import stages
from vramplan.serving.server_plan import answer
from vramplan.serving.sglang_flags import FLAGS as SGLANG
from vramplan.serving.vllm_flags import FLAGS

CONFIGS = Path(__file__).parents[2] / "shared" / "configs"
GIB = 1 << 30


def config(name):
    path = CONFIGS / f"{name}.json"
    if not path.exists():
        pytest.skip("the configs are not here")
    return json.loads(path.read_text())


def planned(command, gpu, name):
    return answer({"command": command, "gpu": gpu, "config": config(name)})


def parsed(text):
    environment, words = words_of(text)
    return read(words[start_of(words, FLAGS.starts) :], environment, FLAGS)


def test_a_command_is_read_as_a_shell_reads_it():
    command = parsed(
        "VLLM_USE_V1=1 vllm serve org/model --max-model-len 32k -tp 2 \\\n  --gpu-memory-utilization=0.9 "
        '--no-enable-prefix-caching --served-model-name a b --speculative_config \'{"method": "ngram"}\' # a comment'
    )
    assert command.model == "org/model" and command.environment == {"VLLM_USE_V1": "1"}
    assert command.number("max-model-len", 0) == 32000 and command.number("tensor-parallel-size", 1) == 2
    assert command.given["enable-prefix-caching"] is False and command.given["served-model-name"] == ["a", "b"]
    assert command.settings("speculative-config") == {"method": "ngram"}
    assert command.free == ("enable-prefix-caching", "served-model-name")


@pytest.mark.parametrize("flag", sorted(FLAGS.known))
def test_every_flag_of_vllm_is_read_or_refused_in_a_sentence(flag):
    value = "" if flag in FLAGS.switches else " 1"
    try:
        assert flag in parsed(f"vllm serve m --{flag}{value}").given
    except PlanError as error:
        assert flag in FLAGS.refused and error.message.startswith(f"--{flag}: ")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("", "no command"),
        ("vllm serve 'm", "cannot be read"),
        ("rm -rf /", "starts no server"),
        ("vllm serve m && rm x", "several commands"),
        ("vllm serve m --max-modl-len 3", "no flag"),
        ("vllm serve m --max-model-len", "no value"),
        ("vllm serve m n", "follows no flag"),
        ("vllm serve m -dp 4", "data and context parallel"),
        ("vllm serve", "names no model"),
        ("x" * 30_000, "too long"),
    ],
)
def test_nonsense_is_one_sentence(command, said):
    with pytest.raises(PlanError, match=said):
        answer({"command": command, "gpu": "h100"})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("openai__whisper-large-v2", "encoder-decoder"),
        ("Qwen__Qwen3.5-35B-A3B", "keep a state"),
        ("BAAI__bge-reranker-v2-m3", "writes no text"),
        ("deepseek-ai__DeepSeek-V3.2", "sparse index"),
    ],
)
def test_models_that_are_not_planned_are_refused_in_a_sentence(name, said):
    with pytest.raises(PlanError, match=said):
        planned("vllm serve m", "h100", name)


def test_a_uniform_cache_has_one_group():
    pool = pool_of([CacheLayer(kv_cache.FULL, 4096)] * 40)
    assert pool.bytes_per_block == 40 * 16 * 4096 and pool.blocks(33, 0) == 3
    assert pool.longest(10 * pool.bytes_per_block, 1000, 0) == 9 * 16


def test_mixed_layers_are_cut_into_groups_of_equal_size():
    """As in gpt-oss (12 and 12) and gemma-3-12b (40 and 8): padded to 13 of 13, or cut into groups of 8."""
    full, sliding = CacheLayer(kv_cache.FULL, 4096), CacheLayer(kv_cache.SLIDING, 4096, 128)
    assert [group.layers for group in pool_of([full] * 8 + [sliding] * 40).groups] == [8] * 6
    near = pool_of([full] * 13 + [sliding] * 12)
    assert [group.layers for group in near.groups] == [13, 12] and near.bytes_per_block == 13 * full.page
    assert sliding.blocks(10_000, 2048) == -(-(127 + 2048) // 16) + 1


def test_layers_over_stages():
    assert [len(stage) for stage in stages(80, 4)] == [20] * 4
    assert [len(stage) for stage in stages(30, 4)] == [7, 8, 8, 7]


@pytest.mark.parametrize("flag", sorted(SGLANG.known))
def test_every_flag_of_sglang_is_read_or_refused_in_a_sentence(flag):
    words = ["--model-path", "m", f"--{flag}", *([] if flag in SGLANG.switches else ["1"])]
    try:
        assert flag in read(words, {}, SGLANG).given
    except PlanError as error:
        assert flag in SGLANG.refused and error.message.startswith(f"--{flag}: ")


def test_sglang_names_its_share_by_its_own_rule():
    """An H100 of 81559 MiB: 512, a chunk's 8192 × 1.5, an eighth of a GiB, 256 × 2, 8 each of 58 prefill graphs."""
    plan = planned("python3 -m sglang.launch_server --model-path m", "h100", "Qwen__Qwen3-32B")
    reserve = 512 + 8192 * 1.5 + 128 + 256 * 2 + 8 * 58
    assert plan["settings"]["mem_fraction_static"] == round((81559 - reserve) / 81559, 3)
    cache = plan["kv_cache"]
    assert cache["tokens"] == cache["available"] // (64 * 2 * 8 * 128 * 2)
    assert plan["total"] - sum(plan["parts"].values()) == pytest.approx(cache["available"], abs=2)


def test_sglang_refuses_in_its_own_words():
    name = "Qwen__Qwen3-32B"
    plan = planned("sglang serve --model-path m --mem-fraction-static 0.7", "h100", name)
    assert plan["verdict"] == "refuses" and "Raise --mem-fraction-static above" in plan["message"]
    share = plan["utilization_needed"]
    assert (
        planned(f"sglang serve --model-path m --mem-fraction-static {share + 0.001}", "h100", name)["message"] is None
    )


@pytest.mark.parametrize("flag", sorted(LLAMA.known))
def test_every_flag_of_llama_server_is_read_or_refused_in_a_sentence(flag):
    words = [f"--{flag}", *([] if flag in LLAMA.switches else ["1"])]
    try:
        assert flag in read(words, {}, LLAMA).given
    except PlanError as error:
        assert flag in LLAMA.refused and error.message.startswith(f"--{flag}: ")


FILES = {
    # https://ozeki.chat/p_8590-understanding-ai-model-files.html (bartowski's Llama-3.1-Nemotron-70B-Instruct-HF)
    "deepseek-ai__DeepSeek-R1-Distill-Llama-70B": "Q8_0 74.98 Q6_K 57.89 Q5_K_M 49.95 Q5_K_S 48.66 Q4_K_M 42.52 Q4_K_S "
    "40.35 Q3_K_L 37.14 Q3_K_M 34.27 Q3_K_S 30.91",
    # https://huggingface.co/tensorblock/Alphatao_Affine-9459823-GGUF (the shape of Qwen3-8B)
    "Qwen__Qwen3-8B": "Q3_K_S 3.770 Q3_K_M 4.124 Q3_K_L 4.431 Q4_0 4.775 Q4_K_S 4.802 Q4_K_M 5.028 Q5_0 5.721 Q5_K_S "
    "5.721 Q5_K_M 5.851 Q6_K 6.726 Q8_0 8.710",
    # https://huggingface.co/bartowski/Qwen_Qwen3-32B-GGUF
    "Qwen__Qwen3-32B": "Q5_K_M 23.21 Q5_K_S 22.64 Q4_1 20.64 Q4_K_M 19.76 Q4_K_S 18.77",
    # https://huggingface.co/bartowski/LLaMA3-iterative-DPO-final-GGUF (the shape of Llama-3-8B)
    "deepseek-ai__DeepSeek-R1-Distill-Llama-8B": "Q8_0 8.54 Q6_K 6.59 Q5_K_M 5.73 Q5_K_S 5.59 Q4_K_M 4.92 Q4_K_S 4.69",
}
"""Published files: mixtures and GB."""


@pytest.mark.parametrize("name", FILES)
def test_sizes_of_published_files(name):
    """Within 0.2 % and the digits printed. A file also holds its tokeniser, of some 8 MB."""
    model = look_at(config(name), find_gpu("h100"), "float16")
    words = FILES[name].split()
    for mixture, printed in zip(words[::2], words[1::2], strict=True):
        size = sum(bytes_of for _, _, bytes_of in gguf.tensors(model, mixture)) + 8e6
        digit = 0.5 * 10 ** -len(printed.partition(".")[2])
        assert size / 1e9 == pytest.approx(float(printed), rel=0.002, abs=digit), mixture


def test_llama_server_fits_its_context_and_then_its_layers():
    name = "Qwen__Qwen3-32B"
    ample = planned("llama-server -hf Qwen/Qwen3-32B-GGUF:Q4_K_M", "h100", name)
    assert ample["settings"]["max_model_len"] == 40960 and ample["kv_cache"]["available"] == 40960 * 64 * 2 * 1024 * 2
    short = planned("llama-server -m Qwen3-32B-Q4_K_M.gguf", "rtx-4090", name)
    assert 4096 <= short["settings"]["max_model_len"] < 40960 and short["verdict"] == "starts"
    few = planned("llama-server -m Qwen3-32B-Q8_0.gguf", "rtx-4090", name)
    assert few["settings"]["max_model_len"] == 4096 and few["settings"]["layers_on_card"] < 65
    assert few["total"] - sum(few["parts"].values()) - few["kv_cache"]["available"] > 1 << 30
    off = planned("llama-server -m Qwen3-32B-Q8_0.gguf --fit off", "rtx-4090", name)
    assert off["verdict"] == "refuses"


def test_llama_servers_buffers_of_published_logs():
    """https://github.com/SciSharp/LLamaSharp/issues/1099: Qwen2.5-3B, 512 tokens, 4096 cells: 300.75 and 144 MiB."""
    plan = planned("llama-server -m qwen2.5-3b-q8_0.gguf -c 4096 --fit off", "rtx-4090", "Qwen__Qwen2.5-3B")
    assert plan["parts"]["activations"] == 300.75 * (1 << 20) and plan["kv_cache"]["available"] == 144 << 20


LLMD = "https://github.com/llm-d-incubation/llm-d-planner/blob/e50305af/docs/empirical-vllm-memory-results.md"
STARTS = [
    ("deepseek-ai__DeepSeek-R1-Distill-Llama-8B", 1, 14.99),
    ("Qwen__Qwen3-0.6B", 1, 1.12),
    ("Qwen__Qwen3-32B", 1, 61.03),
    ("Qwen__Qwen3-32B", 2, 30.59),
]
"""Of :data:`LLMD`: a config of the same sizes, ranks, and GiB that "Model loading took"."""


@pytest.mark.parametrize(("name", "ranks", "gib"), STARTS)
def test_weights_of_published_starts(name, ranks, gib):
    """vLLM counts the tables of rotary embeddings as weights. Within half a percent, and the two digits printed."""
    plan = planned(f"vllm serve m -tp {ranks} --max-model-len 16000 --max-num-seqs 1", "h100", name)
    sampler = plan["settings"]["max_num_seqs"] * config(name)["vocab_size"] * 4.125
    tables = plan["parts"]["buffers"] - sampler - 32 * (1 << 20) - 8192 * 4
    assert (plan["parts"]["weights"] + tables) / GIB == pytest.approx(gib, rel=0.005, abs=0.006)


CACHES = [
    # https://github.com/vllm-project/vllm/issues/10517, blocks of 16
    ("deepseek-ai__DeepSeek-R1-Distill-Llama-8B", 1, 3.81, 1952 * 16),
    ("deepseek-ai__DeepSeek-R1-Distill-Llama-8B", 1, 2.89, 1478 * 16),
    # LLMD: Mistral-Small-3.2-24B, whose text model has these sizes
    ("mistralai__Mistral-Small-24B-Instruct-2501", 1, 28.20, 184_832),
]
"""A config of the same sizes, ranks, "Available KV cache memory" in GiB, tokens."""


@pytest.mark.parametrize(("name", "ranks", "gib", "tokens"), CACHES)
def test_caches_of_published_starts(name, ranks, gib, tokens):
    """Within 1 %: the memory is printed with two digits."""
    command = f"vllm serve m -tp {ranks} --max-model-len 4096 --kv-cache-memory-bytes {int(gib * GIB)}"
    assert planned(command, "h100", name)["kv_cache"]["tokens"] == pytest.approx(tokens, rel=0.01)


def test_a_70b_on_two_cards():
    command = "vllm serve m --max-model-len 16384 --gpu-memory-utilization 0.92 -tp 2"
    plan = planned(command, "h100", "deepseek-ai__DeepSeek-R1-Distill-Llama-70B")
    assert plan["verdict"] == "starts" and plan["ranks"] == 2
    cache = plan["kv_cache"]
    assert cache["bytes_per_block"] == 80 * 2 * 4 * 128 * 2 * 16
    assert cache["tokens"] == pytest.approx(cache["available"] / (80 * 2 * 4 * 128 * 2), rel=0.001)
    assert plan["requested"] - sum(plan["parts"].values()) == cache["available"]


def test_a_refusal_says_vllms_words_and_what_would_do():
    name = "deepseek-ai__DeepSeek-R1-Distill-Llama-8B"
    plan = planned("vllm serve m", "rtx-4090", name)
    assert plan["verdict"] == "refuses" and "To serve at least one request" in plan["message"]
    longest = plan["longest"]
    assert 0 < longest < 131072 and f"maximum model length is {longest}" in plan["message"]
    again = planned(f"vllm serve m --max-model-len {longest}", "rtx-4090", name)
    assert again["message"] is None and again["concurrency"] >= 1
    beyond = planned(f"vllm serve m --max-model-len {longest + 16}", "rtx-4090", name)
    assert beyond["message"]


def test_the_utilisation_that_is_named_starts():
    name = "Qwen__Qwen3-32B"
    low = planned("vllm serve m --max-model-len 8000 --gpu-memory-utilization 0.8", "h100", name)
    share = low["utilization_needed"]
    assert low["message"] and share > 0.8
    command = "vllm serve m --max-model-len 8000 --gpu-memory-utilization "
    assert planned(command + str(share), "h100", name)["message"] is None
    assert planned(command + str(round(share - 0.0001, 4)), "h100", name)["message"]


def test_stages_hold_the_model_between_them():
    name = "deepseek-ai__DeepSeek-R1-Distill-Llama-8B"
    whole = planned("vllm serve m", "h100", name)["parts"]["weights"]
    halves = planned("vllm serve m -pp 2", "h100", name)["stages"]
    assert sum(stage["weights"] for stage in halves) == whole and len(halves) == 2


SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}


def test_the_api_answers_as_the_command_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    monkeypatch.setattr(
        "sys.argv", ["vramplan", "serving", "vllm serve m", "-g", "8GiB", "--config", str(path), "--json"]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = json.loads(capsys.readouterr().out)
    assert end.value.code in (0, None) and told["verdict"] == "starts"
    with TestClient(create_app()) as client:
        asked = {
            "command": "vllm serve m",
            "gpu": {"name": "a card of 8 GiB", "memory_bytes": 8 << 30},
            "config": SMALL,
        }
        answered = client.post("/serving", json=asked).json()
        assert {**answered, "gpu": ""} == {**told, "gpu": ""}
        refused = client.post("/serving", json={"command": "vllm serve /etc", "gpu": "h100"})
        assert refused.status_code == 422 and "reads no files" in refused.json()["error"]["message"]
        for wrong in ([], {"command": 3}, {"command": "vllm serve m", "gpus": 1}, {"command": "vllm serve m -tp x"}):
            assert client.post("/serving", json=wrong).status_code == 422


def test_the_terminal_shows_the_verdict_and_the_parts(capsys):
    told = answer({"command": "vllm serve m --port 1", "gpu": "rtx-4090", "config": SMALL})
    served.show(told, Console(width=100))
    out = capsys.readouterr().out
    assert out.startswith("Starts on a GeForce RTX 4090: ") and "KV cache" in out and "--port" in out
