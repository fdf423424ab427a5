"""What is restated of other people's code, held against it: measured figures, and the installed sources themselves."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import LLAMA
from torch.utils._pytree import tree_leaves, tree_map_only
from vramplan.catalog.gpus import find_gpu
from vramplan.dryrun import autocast
from vramplan.dryrun import meta_kernels as native
from vramplan.dryrun.autocast import Autocast
from vramplan.dryrun.cuda.as_if_cuda import as_if_cuda
from vramplan.dryrun.cuda.attention import attention_backend, efficient_workspace
from vramplan.dryrun.cuda.bitsandbytes_ops import bnb_cuda_ops, gemm_4bit_is_fused
from vramplan.dryrun.cuda.card_facts import Card
from vramplan.dryrun.cuda.matmul import matrices_copied
from vramplan.dryrun.cuda.reductions import reduction_scratch
from vramplan.dryrun.cuda.registry import KERNELS
from vramplan.dryrun.tracker import MemoryTracker
from vramplan.job import read_job
from vramplan.memory.events import TraceLog
from vramplan.planning.planned_job import plan_job
from vramplan.planning.profile_cache import load_of

pytestmark = pytest.mark.usefixtures("sandbox")

CARD = Card()


def meta(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "shape, measured",
    [
        ((6304, 1024), 51904512),
        ((6304, 4096), 138412032),
        ((4096, 3072), 100663296),
        ((4096, 768), 25165824),
        ((4096, 2304), 75497472),
        ((4096, 30522), 23440896),
    ],
)
def test_reductions_meet_in_global_memory(shape, measured):
    """Bias gradients recorded on an H100; the buffer rounded to 512 bytes."""
    size = reduction_scratch(meta(*shape), [0], CARD, 8, 4)
    assert -(-size // 512) * 512 == measured


def test_small_reductions_take_nothing():
    assert reduction_scratch(meta(64, 1024), [0], CARD, 8, 4) == 0
    assert reduction_scratch(meta(4096, 1024), [1], CARD, 8, 4) == 0


def taken(run) -> list[tuple[str, int]]:
    """What an operator takes under the tracker, in order."""
    tracker = MemoryTracker(CARD)
    with tracker:
        run()
    return [(entry.op, entry.size) for entry in tracker.trace_log.allocations]


def test_a_norm_of_transposed_rows_meets_in_global_memory():
    """DoRA's norm of a Conv1D's weight (GPT-2 XL), recorded on an H200: 81920512 bytes with the semaphores."""
    plain, transposed = meta(1600, 6400), meta(6400, 1600).T
    assert taken(lambda: torch.linalg.norm(transposed, dim=1)) == [
        ("linalg_vector_norm.default", 2 * 1600),
        ("gpu_reduce_kernel", 81920000),
        ("gpu_reduce_kernel", 512),
    ]
    assert len(taken(lambda: torch.linalg.norm(plain, dim=1))) == 1


@pytest.mark.parametrize(
    "run, measured",
    [
        (lambda x: x.sum(0), 67108864),
        (lambda x: x.var(0), 268435456),
        (lambda x: x.std(0), 268435456),
        (lambda x: torch.var_mean(x, 0), 268435456),
        (lambda x: x.prod(0), 67108864),
        (lambda x: x.amax(0), 33554432),
        (lambda x: x.float().amax(0), 67108864),
        (lambda x: x.argmax(0), 268435456),
        (lambda x: x.bool().any(0), 16777216),
    ],
)
def test_what_reductions_meet_in(run, measured):
    """The buffer of 4096 rows of 2048 in bf16, measured on an H200 by its peak."""
    rows = meta(4096, 2048)
    assert [size for op, size in taken(lambda: run(rows)) if op == "gpu_reduce_kernel"] == [measured, 512]


@pytest.mark.parametrize(
    "run, measured",
    [
        (lambda x: x.logsumexp(-1), [8192, 8192, 16777216]),
        (lambda x: torch.nn.functional.logsigmoid(x), [16777216]),
        (lambda x: x.cumsum(-1, dtype=torch.float32), [33554432, 33554432]),
    ],
)
def test_what_other_kernels_take_beside_their_results(run, measured):
    rows = meta(4096, 2048)
    assert [size for _, size in taken(lambda: run(rows))] == measured


def test_the_lists_of_autocast_are_the_installed_ones():
    """Those whose Python name is another are known by that; what no model calls by itself is left out."""
    header = (Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h").read_text()

    def listed(name: str) -> set[str]:
        start = header.index(f"#define {name}(")
        return set(re.findall(r"_\((?:ADD_NS\()?(\w+)", header[start : header.index("\n\n", start)]))

    inner = {"_scaled_dot_product_flash_attention", "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell"}
    assert listed("AT_FORALL_LOWER_PRECISION_FP") - autocast.LOWER_PRECISION == inner
    assert autocast.LOWER_PRECISION - listed("AT_FORALL_LOWER_PRECISION_FP") == {
        "__matmul__",
        "__rmatmul__",
        "multi_dot",
    }
    raised = {name for name in listed("AT_FORALL_FP32") if "upsample" not in name}
    assert autocast.FLOAT32 - raised == {"__pow__", "__rpow__", "square", "interpolate"} and raised <= autocast.FLOAT32
    by_dtype = listed("AT_FORALL_FP32_SET_OPT_DTYPE") | listed("AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE")
    assert by_dtype | {"linalg_norm", "softmin"} == autocast.FLOAT32_BY_DTYPE
    assert listed("AT_FORALL_PROMOTE") | {"grid_sample"} == autocast.PROMOTE


@pytest.mark.parametrize(
    "run, dtype, casts",
    [
        (torch.square, torch.float32, 1),  # pow within
        (lambda x: torch.nn.functional.normalize(x, dim=-1), torch.float32, 0),
        (lambda x: torch.linalg.norm(x, dim=-1), torch.float32, 0),
        (lambda x: x.double().sum(0), torch.float64, 0),
        (lambda x: torch.addcmul(x, x, x.float()), torch.float32, 2),
        (lambda x: torch.addcmul(x, x, x), torch.bfloat16, 0),
        (lambda x: torch.nn.functional.softplus(x), torch.float32, 1),
        (lambda x: torch.nn.functional.softmin(x, -1), torch.float32, 1),
        (lambda x: torch.nn.functional.interpolate(x[None, None], scale_factor=0.5, mode="bilinear"), torch.float32, 1),
        (lambda x: torch.matmul(x.float(), x.mT), torch.bfloat16, 1),
    ],
)
def test_autocast_casts_as_on_a_card(run, dtype, casts):
    """Result and casts of 17 million elements, as torch.autocast("cuda", bfloat16) was seen to do on an H200."""
    rows, mode = meta(4096, 4096), Autocast(torch.bfloat16)
    made = []

    def under_autocast():
        with mode, mode.on():
            made.append(run(rows).dtype)

    asked = sum(op == "_to_copy.default" for op, _ in taken(under_autocast))
    own = sum(op == "_to_copy.default" for op, _ in taken(lambda: run(rows)))
    assert made == [dtype] and asked - own == casts


def test_what_autocast_cast_is_given_back_from_the_first_argument_on():
    """Recorded on an H200: under no_grad the scores' copy goes before the values'."""
    scores, values = (meta(2, size, 64, dtype=torch.float32) for size in (128, 64))
    tracker, mode = MemoryTracker(CARD), Autocast(torch.bfloat16)
    with torch.no_grad(), tracker, mode, mode.on():
        out = torch.matmul(scores, values)
    trace_log = tracker.close()
    sizes = [trace_log.allocations[~event].size for event in trace_log.events if event < 0]
    assert out.dtype == torch.bfloat16 and sizes == [2 * scores.numel(), 2 * values.numel()]


def test_a_mask_that_is_counted_is_cast_first():
    mask, numbers = meta(4, 1000, dtype=torch.bool), meta(4, 1000)
    assert taken(lambda: mask.sum(1))[:2] == [("sum.dim_IntList", 32), ("make_reduction", 32000)]
    assert taken(lambda: mask.sum())[:2] == [("sum.default", 8), ("make_reduction", 32000)]
    assert len(taken(lambda: numbers.sum(1, dtype=torch.float32))) == 1


@pytest.mark.parametrize("run", [torch.softmax, torch.log_softmax])
def test_half_precision_is_raised_within_the_softmax(run):
    """Recorded on an H200: eager attention's scores of fp16 are not cast; those of bf16 are."""
    scores = {dtype: meta(2, 64, 64, dtype=dtype).requires_grad_() for dtype in (torch.float16, torch.bfloat16)}
    half, brain = (taken(lambda s=s: run(s, -1, dtype=torch.float32)) for s in scores.values())
    assert [size for _, size in half] == [4 * 2 * 64 * 64] and [size for _, size in brain] == [4 * 2 * 64 * 64] * 2


@pytest.mark.parametrize(
    "shape, dtype, measured", [((2, 16, 512, 64), torch.bfloat16, 4198400), ((1, 4, 1024, 256), torch.float32, 4196352)]
)
def test_efficient_attention_backward(shape, dtype, measured):
    query = meta(*shape, dtype=dtype)
    assert efficient_workspace(CARD, query, query) == measured


COMPOSED = {
    **{f"{op}.Scalar": (2,) for op in "add sub rsub mul div add_ sub_ mul_ div_ remainder fill".split()},
    **{f"bitwise_{op}.Scalar": (3,) for op in ("and", "or")},
    **dict.fromkeys(("mean", "sort", "empty_like", "zeros_like", "ones_like"), ()),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones"), ([3, 4],)),
    "masked_fill.Scalar": (torch.ones(2, 1, 4, 1, dtype=torch.bool), 2.0),
    "masked_fill.Tensor": (torch.ones(6, dtype=torch.bool), torch.tensor(2.0)),
    "fill.Tensor": (torch.tensor(2.0),),
    "masked_scatter": (torch.ones(6, dtype=torch.bool), torch.ones(8, 4, 6).bfloat16()),
    "index_put": ([torch.tensor([0, 2])], torch.ones(2, 4, 6).bfloat16()),
    "new_full": ([3, 4], 1.0),
    "_unsafe_view": ([4, 8, 3, 2],),
    "slice_backward": ([8, 4, 9], 2, 0, 6, 1),
    "select_backward": ([8, 5, 4, 6], 1, 2),
    "diagonal_backward": ([8, 4, 6, 6], 0, 2, 3),
}


@pytest.mark.parametrize("laid", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("name", sorted({*COMPOSED, "stack"}))
def test_composed_operators_make_what_pytorch_makes_on_a_cpu(name, laid):
    """Shape, strides and dtype, by the functions in C++."""
    dtype = torch.int64 if "bitwise" in name else torch.bfloat16
    source = torch.ones(8, 4, 6, dtype=dtype)
    if name == "_unsafe_view":  # of what is contiguous
        pass
    elif laid == "transposed":
        source = torch.ones(4, 8, 6, dtype=dtype).transpose(0, 1)
    elif laid == "expanded" and not name.endswith("_.Scalar"):
        source = torch.ones(8, 1, 6, dtype=dtype).expand(8, 4, 6)
    op = getattr(torch.ops.aten, name.split(".")[0])
    op = getattr(op, name.partition(".")[2] or "default")
    given = ([source, source], 1) if name == "stack" else (source, *COMPOSED[name])
    made, light = tree_leaves(op(*given)), tree_leaves(op(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), given)))
    assert not native._has_kernel(op.name(), "Meta")
    assert [(t.shape, t.stride(), t.dtype) for t in light] == [(t.shape, t.stride(), t.dtype) for t in made]


def test_all_that_is_composed_is_held_against_pytorch():
    assert {f"aten::{name}" for name in (*COMPOSED, "stack")} == native.COMPOSED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dims", [1, 2])
def test_what_is_made_by_a_shorter_way_is_what_the_operator_makes(dtype, dims):
    source = meta(5, 8, 16, dtype=dtype).transpose(0, 1)
    weight = meta(*source.shape[-dims:], dtype=dtype)
    for op, given in (
        (torch.ops.aten.native_layer_norm.default, (source, list(weight.shape), weight, weight, 1e-5)),
        (torch.ops.aten._safe_softmax.default, (source, -1)),
    ):
        long = tree_leaves(op(*given))
        with MemoryTracker(CARD):
            short = tree_leaves(op(*given))
        assert [(t.shape, t.stride(), t.dtype) for t in short] == [(t.shape, t.stride(), t.dtype) for t in long]


A100, T4 = Card((8, 0), 108), Card((7, 5), 40)


@pytest.mark.parametrize(
    "card, heads, keys, head, dtype, masked, backend",
    [
        (CARD, 32, 8, 64, torch.bfloat16, False, "cudnn"),
        (CARD, 8, 4, 256, torch.bfloat16, False, "cudnn"),
        (CARD, 32, 32, 64, torch.bfloat16, True, "cudnn"),
        (CARD, 32, 8, 64, torch.float32, False, "math"),
        (CARD, 4, 4, 256, torch.float32, True, "efficient"),
        (A100, 32, 8, 128, torch.bfloat16, False, "flash"),
        (A100, 32, 32, 128, torch.bfloat16, True, "efficient"),
        (T4, 32, 32, 128, torch.float16, False, "efficient"),
        (T4, 32, 8, 128, torch.float16, False, "math"),
        (T4, 32, 32, 128, torch.bfloat16, False, "math"),
        (T4, 32, 32, 128, torch.float32, False, "efficient"),
        (A100, 32, 32, 128, torch.float64, False, "math"),
    ],
)
def test_attention_backend(card, heads, keys, head, dtype, masked, backend):
    query, key = meta(1, heads, 128, head, dtype=dtype), meta(1, keys, 128, head, dtype=dtype)
    mask = meta(1, 1, 128, 128, dtype=dtype) if masked else None
    assert attention_backend(card, query, key, key, mask, 0.0, not masked, True) == backend


def test_bitsandbytes_heuristic_is_asked_for_the_card():
    """On Hopper large products dequantise the weight; a T4 in fp16 fuses small ones. Past 1536 rows nobody fuses."""
    fused = gemm_4bit_is_fused
    assert not fused(CARD, torch.bfloat16, 2048, 4096, 4096, 64)
    assert not fused(CARD, torch.bfloat16, 1024, 4096, 4096, 64)
    assert fused(CARD, torch.bfloat16, 4, 4096, 4096, 64)
    assert fused(T4, torch.float16, 16, 512, 512, 64)


def kept_books(run, card=CARD) -> list:
    """What ``run`` takes on the meta device as on ``card``, in order."""
    tracker = MemoryTracker(card)
    with as_if_cuda(card), tracker:
        run()
    return tracker.trace_log.allocations


def test_layer_norm_copies_what_is_not_contiguous():
    """Whisper's encoder: its states come transposed from a convolution; in backward the gradient does too."""

    def run(transposed: bool):
        states = meta(2, 80, 64).transpose(1, 2) if transposed else meta(2, 64, 80)
        states.requires_grad_()
        out = torch.nn.functional.layer_norm(states, (80,), torch.nn.Parameter(meta(80)))
        out.backward(meta(2, 80, 64).transpose(1, 2) if transposed else meta(2, 64, 80))

    copies = [a.size for a in kept_books(lambda: run(True)) if a.op == "expect_contiguous"]
    assert copies == [2 * 64 * 80 * 2] * 3
    assert not [a for a in kept_books(lambda: run(False)) if a.op == "expect_contiguous"]


@pytest.mark.parametrize("card, kernel, seeds", [(A100, "efficient", 0), (CARD, "cudnn", 2)])
def test_seeds_of_the_efficient_attention_lie_on_the_host(card, kernel, seeds):
    """Seed and offset are 8 bytes each: of cuDNN's kernel on the card, of the efficient one not."""

    def run():
        query = meta(1, 4, 64, 64).requires_grad_()
        torch.nn.functional.scaled_dot_product_attention(query, query, query, meta(1, 1, 64, 64))

    taken = [a for a in kept_books(run, card) if kernel in a.op]
    assert taken and sum(a.size == 8 for a in taken) == seeds


def placed(**fields) -> TraceLog:
    """The books of placing a small model."""
    job = read_job(
        {"config": LLAMA, "method": "lora", "trainer": "pytorch", "sequence_length": 64, "gpu": "h100", **fields}
    ).resolved()
    return load_of(job, job.config, find_gpu("h100")).trace_log()


def stays(trace_log: TraceLog) -> list:
    """What is taken and not given back."""
    given = {~event for event in trace_log.events if event < 0}
    return [entry for key, entry in enumerate(trace_log.allocations) if key not in given]


def entered(run) -> list[int]:
    """The bytes that ``run`` enters, one by one; as in backward, outside modules."""
    tracker = MemoryTracker(CARD)
    tracker.in_backward = True
    with as_if_cuda(CARD), tracker:
        kept = run()
    assert kept is not None
    return [allocation.size for allocation in tracker.trace_log.allocations]


def test_the_embeddings_gradient_of_many_indices():
    """gpt2 and Qwen3-VL, event for event on an H100 and an H200: 4505 rows of 768, 2617 of 1024."""
    for (count, rows, width), dtype, measured in (
        ((4096, 50257, 768), torch.float32, [32768] * 3 + [154389504] + [32768] * 4 + [36040, 13839360]),
        ((3136, 2304, 1024), torch.bfloat16, [25088] * 3 + [4718592] + [25088] * 2 + [18432, 18432, 20936, 10719232]),
    ):
        grad, indices = meta(count, width, dtype=dtype), meta(count, dtype=torch.long)
        assert entered(lambda: torch.ops.aten.embedding_dense_backward(grad, indices, rows, -1, False)) == measured


def convolved(x: tuple, w: tuple, stride: int, mask: tuple[bool, bool, bool]) -> list[int]:
    """What a convolution and its gradients take, their results among it."""
    x, w, padding = meta(*x), meta(*w), [1 if w[2] == 3 else 0] * (len(x) - 2)
    rest = ([stride] * len(padding), padding, [1] * len(padding), False, [0] * len(padding), 1)
    aten = torch.ops.aten
    forward = entered(lambda: aten.convolution(x, w, None, *rest))
    y = aten.convolution(x, w, None, *rest)
    return forward + entered(lambda: aten.convolution_backward(y, x, w, [w.shape[0]], *rest, mask))


def test_convolutions_are_transformed_in_a_workspace():
    """Whisper's, whose workspaces an H200 took to 131 bytes, and ViT's forward."""
    found = convolved((4, 768, 3000), (768, 768, 3), 2, (True, True, False))
    measured = [9216000, 31187091, 18432000, 31187091, 3538944, 31186960]
    assert len(found) == 6 and all(0 <= real - mine <= 131 for mine, real in zip(found, measured, strict=True))
    assert convolved((32, 3, 224, 224), (1024, 3, 16, 16), 16, (False, True, False))[:2] == [12845056, 42729488]


def test_a_filter_is_copied_where_the_input_lies_channels_last():
    """GLM-4.1V's ``downsample`` on an H200: no copy of the input, one of the filter."""
    x, w = meta(256, 2, 2, 1536).permute(0, 3, 1, 2), meta(4096, 1536, 2, 2)
    rest = (None, [2, 2], [0, 0], [1, 1], False, [0, 0], 1)
    assert entered(lambda: torch.ops.aten.convolution(x, w, *rest)) == [2097152, 50331648]


def test_the_mean_over_what_is_not_contiguous_meets_in_global_memory():
    """Gemma 3's ``mm_soft_emb_norm`` on an H200: 2359296 bytes beside the mean."""
    x = meta(1, 1152, 256, dtype=torch.float32).transpose(1, 2)
    assert entered(lambda: x.mean(-1, keepdim=True))[:2] == [1024, 2359296]


def test_attention_without_gradients_keeps_no_logsumexp():
    q = meta(1, 16, 1024, 80)
    assert 16 * 1024 * 4 not in entered(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    q.requires_grad_()
    assert 16 * 1024 * 4 in entered(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))


def test_values_that_are_followed_change_nothing_but_what_they_tell():
    """The engine's sums in place, too: a mode more holds every tensor once more."""
    from vramplan.dryrun.build.model import bare
    from vramplan.dryrun.known_values import KnownValues
    from vramplan.dryrun.steps.dry_run import dry_run

    job = read_job({"config": LLAMA, "method": "full", "trainer": "pytorch", "sequence_length": 64}).resolved()

    def events(values):
        trace_log = dry_run(bare(LLAMA, None, job.dtype, None)[0], job, "causal-lm", CARD, values=values)
        return [(event >= 0, trace_log.allocations[event if event >= 0 else ~event].size) for event in trace_log.events]

    followed = events(KnownValues("balanced"))
    assert Counter(followed) == Counter(events(None)) and len(followed) > 500


def test_int8_weights_pass_through_fp16():
    """bitsandbytes quantises a weight that came as fp16 from the host, beside what arrived; neither stays."""
    trace_log = placed(method="qlora", quantization={"type": "int8"})
    path, count = "model.layers.0.mlp.up_proj", 64 * 128
    arrived, half, scales, weight = (key for key, a in enumerate(trace_log.allocations) if a.fqn == path)
    sizes = [trace_log.allocations[key].size for key in (arrived, half, scales, weight)]
    assert sizes == [2 * count, 2 * count, 4 * 128, count]
    order = [trace_log.events.index(event) for event in (arrived, half, scales, weight, ~half, ~arrived)]
    assert order == sorted(order)


def test_dora_leaves_a_workspace_where_it_adapts():
    """PEFT multiplies an adapter's factors on the card: 33554432 bytes more are placed, as measured on an H100."""
    plain, dora = (placed(lora={"target_modules": ["q_proj"], "use_dora": on}) for on in (False, True))
    more = Counter(a.size for a in stays(dora)) - Counter(a.size for a in stays(plain))
    assert more == {32 << 20: 1, 64 * 4: 2}  # and a magnitude vector a layer
    ops = Counter(a.op for a in dora.allocations if a.fqn == "model.layers.1.self_attn.q_proj")
    assert ops["mm.default"] == ops["linalg_vector_norm.default"] == 1


def test_the_trainers_gradient_scaler_is_run_in_fp16():
    """Its scale and its growth tracker stay on the card; whether a gradient is infinite is asked, and answered no."""
    job = {"config": LLAMA, "method": "full", "dtype": "float32", "trainer": "transformers", "sequence_length": 64}
    scaled, plain = (plan_job(read_job({**job, "mixed_precision": p})).concrete.trace_log() for p in ("fp16", "bf16"))
    full = [a for a in stays(scaled) if a.op == "full.default"]
    assert [(a.size, a.phase) for a in full] == [(4, "backward")] * 2 and len(stays(scaled)) == len(stays(plain)) + 2
    assert Counter(a.kind for a in stays(scaled))["optimizer_state"] > 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_value_that_the_dtype_does_not_hold_is_not_filled_in(dtype):
    """Nor by a real device, in the same words but for the dtype's name."""
    low, mask = torch.finfo(torch.float32).min, torch.ones(2, dtype=torch.bool)
    for device in ("cpu", "meta"):
        tensor = torch.empty(2, dtype=dtype, device=device)
        fill = partial(KERNELS[torch.ops.aten.masked_fill.Scalar], None, torch.ops.aten.masked_fill.Scalar)
        with pytest.raises(RuntimeError, match="value cannot be converted to type .* without overflow"):
            fill((tensor, mask, low), {}, "") if device == "meta" else tensor.masked_fill(mask, low)


def test_which_operands_are_copied_for_cublas():
    """The ranks of an expert's adapter lie apart; what is merely transposed, cut or spread over a batch is taken."""
    experts, rank, wide = 4, 8, 16
    weight = torch.empty(wide, rank * experts, device="meta")
    apart = weight.reshape(wide, rank, experts).permute(2, 0, 1)
    dense = torch.empty(experts, rank, wide, device="meta")
    assert matrices_copied((None, apart, dense)) == [apart]
    cut = torch.empty(experts, wide, 2 * rank, device="meta")[..., :rank]
    spread = weight[:, :rank].expand(experts, wide, rank)
    for left in (cut, spread, dense.mT):
        assert matrices_copied((left, dense)) == []
    rows = torch.empty(wide, rank, 2, device="meta")[..., 0]
    assert matrices_copied((rows, dense[0])) == [rows]


def _sources() -> dict[str, object]:
    import bitsandbytes as bnb
    import peft
    import transformers

    ops = bnb_cuda_ops()
    tuner = peft.tuners.tuners_utils
    return {
        "_dequant_linear_fallback": ops._dequant_linear_fallback,
        "quantize_4bit": bnb.functional.quantize_4bit,
        "Optimizer2State.init_state": bnb.optim.optimizer.Optimizer2State.init_state,
        "cast_adapter_dtype": tuner.cast_adapter_dtype,
        "find_packed_sequence_indices": transformers.masking_utils.find_packed_sequence_indices,
    }


KNOWN = {
    "_dequant_linear_fallback": "ad09ce81b25cb0b8",
    "quantize_4bit": "077d74588037da80",
    "Optimizer2State.init_state": "5e0ba3874f962b46",
    "cast_adapter_dtype": "004a9ef7a8218960",
    "find_packed_sequence_indices": "ebd2ac7ca795dbb0",
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_restated_source_is_the_installed_one(name):
    """A new version of these functions has to be read, and what is restated of it changed, before this passes."""
    source = inspect.getsource(_sources()[name])
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == KNOWN[name]
