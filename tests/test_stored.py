"""Checkpoints that are quantised already: what they weigh is what their tensors weigh, and what can be trained is what
the stack trains; a model whose code is elsewhere is planned where transformers has the class that it names.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import LLAMA
from vramplan.dryrun.build.model import bare
from vramplan.dryrun.build.prequantized import stored_weights
from vramplan.errors import PlanError
from vramplan.usecases import plan

pytestmark = pytest.mark.usefixtures("sandbox")

CONFIG = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
SETTINGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "mxfp4": {"quant_method": "mxfp4"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": True},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}  # fmt: skip
LORA = {"r": 4, "target_modules": "all-linear"}


def packed(name: str, n: int, k: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a weight of n rows and k columns in 4 bits, as the two formats lay them down."""
    groups, word = -(-k // 128), torch.int32
    if name == "gptq":
        weight = (word, (k // 8, n)), (word, (k,))  # g_idx: the group of every column
    else:
        weight = ((word, (k, n // 8)),)
    return [*weight, (word, (groups, n // 8)), (torch.float16, (groups, n))]


def size(tensors: list[tuple[torch.dtype, tuple[int, ...]]]) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in tensors)


def rest_of(model) -> tuple[int, list[tuple[int, int]]]:
    """Bytes in 16 bits of what no quantiser touches, and the shapes of what it does."""
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    inside = sum(module.weight.numel() for module in linear.values())
    return 2 * (sum(p.numel() for p in model.parameters()) - inside), [tuple(m.weight.shape) for m in linear.values()]


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_packed_weights_weigh_what_their_tensors_weigh(name):
    model, _ = bare(CONFIG, None, "bfloat16", None)
    rest, shapes = rest_of(model)
    counted = stored_weights(model, SETTINGS[name])
    assert counted["bytes"] == rest + sum(size(packed(name, n, k)) for n, k in shapes)
    assert counted["parameters"] == sum(p.numel() for p in model.parameters())


def test_blocks_of_eight_bits_weigh_what_their_tensors_weigh():
    model, _ = bare(CONFIG, None, "bfloat16", None)
    rest, shapes = rest_of(model)
    assert stored_weights(model, SETTINGS["fp8"])["bytes"] == rest + sum(
        n * k + 4 * -(-n // 128) * -(-k // 128) for n, k in shapes
    )


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_bitsandbytes_weighs_what_it_writes(name, tmp_path):
    """A real checkpoint, written by transformers; beside its tensors bitsandbytes keeps a few words on each."""
    real = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**CONFIG), dtype=torch.bfloat16)
    real.save_pretrained(tmp_path / "plain")
    settings = transformers.BitsAndBytesConfig(
        **{key: value for key, value in SETTINGS[name].items() if key != "quant_method"}
    )
    real = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    state = {key: value for key, value in real.state_dict().items() if isinstance(value, torch.Tensor)}
    written = sum(v.numel() * v.element_size() for k, v in state.items() if ".quant_state." not in k)
    model, _ = bare(CONFIG, None, "bfloat16", None)
    counted = stored_weights(model, SETTINGS[name])["bytes"]
    assert counted == pytest.approx(written, rel=1e-3)


@pytest.mark.parametrize("name", ["gptq", "awq"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_the_stack_cannot_train_is_told_with_its_weights(name, method):
    with pytest.raises(PlanError) as told:
        plan({"config": {**CONFIG, "quantization_config": SETTINGS[name]}, "method": method, "sequence_length": 64})
    error = told.value
    assert name in error.message and "16-bit" in error.hint and "qlora" in error.hint
    assert error.weights["bytes"] < 2 * error.weights["parameters"]
    assert (
        plan({"config": CONFIG, "method": "qlora", "trainer": "pytorch", "sequence_length": 64})["peak"]["allocated"]
        > 0
    )


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_what_is_dequantised_as_it_loads_is_planned_in_16_bits(name):
    stored = {**CONFIG, "quantization_config": SETTINGS[name]}
    for fields in ({"method": "full"}, {"method": "lora", "lora": LORA}):
        answer, plain = (plan({"config": c, "sequence_length": 64, **fields}) for c in (stored, CONFIG))
        assert answer["peak"]["allocated"] == plain["peak"]["allocated"]
        assert any(f"stored as {name}" in warning and "dequantised" in warning for warning in answer["warnings"])
    with pytest.raises(PlanError, match="does not quantise again") as told:
        plan({"config": stored, "method": "qlora", "trainer": "pytorch", "sequence_length": 64})
    assert "method lora" in told.value.hint and told.value.weights["bytes"] > 0


@pytest.mark.parametrize(
    "name, own",
    [("nf4", {"type": "nf4", "double_quant": True}), ("int8", {"type": "int8", "compute_dtype": "float32"})],
)
def test_an_adapter_goes_over_the_layout_that_is_stored(name, own):
    stored = {**CONFIG, "quantization_config": SETTINGS[name]}
    job = {"method": "qlora", "lora": LORA, "sequence_length": 64}
    answer = plan({"config": stored, **job})
    assert answer["peak"] == plan({"config": CONFIG, "quantization": own, **job})["peak"]
    assert any("its own layout" in warning for warning in answer["warnings"])
    for method in ("full", "lora"):
        with pytest.raises(PlanError, match="through adapters only") as told:
            plan({"config": stored, "method": method, "sequence_length": 64})
        assert "qlora" in told.value.hint


def test_a_class_that_transformers_has_is_planned_though_its_code_is_elsewhere():
    auto = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.LlamaForCausalLM"}}
    answer = plan(
        {
            "config": {**LLAMA, **auto, "model_type": "mine"},
            "method": "full",
            "trainer": "pytorch",
            "sequence_length": 64,
        }
    )
    assert answer["model"]["class"] == "LlamaForCausalLM"
    assert (
        answer["peak"] == plan({"config": LLAMA, "method": "full", "trainer": "pytorch", "sequence_length": 64})["peak"]
    )
    assert any("is not run and may differ" in warning for warning in answer["warnings"])
