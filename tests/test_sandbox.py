"""What a trace changes of others' code is changed while it runs, for its own thread, and is as before afterwards."""

from __future__ import annotations

import ast
import ctypes
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from tiny import LLAMA
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from vramplan.dryrun import sandbox
from vramplan.dryrun.build.model import _no_initialisation, empty_parameters
from vramplan.dryrun.cuda.as_if_cuda import as_if_cuda
from vramplan.dryrun.cuda.bitsandbytes_ops import bnb_cuda_ops
from vramplan.dryrun.cuda.card_facts import Card
from vramplan.dryrun.cuda.registry import KERNELS
from vramplan.dryrun.steps.dry_run import paged_states_elsewhere
from vramplan.dryrun.tracker import MemoryTracker
from vramplan.errors import OurFault, Unanswered
from vramplan.job import read_job
from vramplan.planning import profile_cache
from vramplan.planning.resolve import card_of, config_of
from vramplan.planning.tracer import InProcessTracer, request_of
from vramplan.usecases import plan

ROOT = Path(__file__).parent.parent
JOBS = [
    {"method": "qlora", "gpu": "h100"},
    {"method": "full", "gpu": "a100-80gb", "mixed_precision": "bf16", "dtype": "float32"},
    {"method": "lora", "gpu": "t4", "dtype": "float16", "lora": {"use_dora": True}},
    {"method": "full", "gpu": "h100", "optimizer": "paged_adamw_8bit", "gradient_checkpointing": "non_reentrant"},
    {"method": "lora", "gpu": "a100-80gb", "trainer": "trl"},
    {"method": "inference", "gpu": "rtx-4090", "new_tokens": 3},
]
"""Six jobs of one small model, each of which is planned with patches that the others do without."""


def whole(fields: dict) -> dict:
    return {"config": LLAMA, "sequence_length": 64, **fields}


def request(fields: dict):
    job = read_job(whole(fields)).resolved()
    return request_of(job, config_of(job)[0], card_of(job))


def traced(fields: dict) -> bytes:
    return InProcessTracer().trace("step", request(fields))


# --- what is as before --------------------------------------------------------------------------------------


def places(patch: sandbox.Patch) -> list[tuple]:
    """The modules or classes that have, or could have, the name of a row."""
    owner, _, name = patch.target.rpartition(".")
    if importlib.util.find_spec(owner.partition(".")[0]) is None:
        return []
    if "*" not in owner:
        holder = resolve(owner)
        return (
            [(holder, found) for found in vars(holder) if fnmatchcase(found, name)] if "*" in name else [(holder, name)]
        )
    return [(module, name) for path, module in [*sys.modules.items()] if fnmatchcase(path, owner) and module]


def resolve(dotted: str):
    """A module or a class by its full name."""
    try:
        return importlib.import_module(dotted)
    except ImportError:
        owner, _, name = dotted.rpartition(".")
        return getattr(resolve(owner), name)


MISSING = object()


def state() -> dict:
    """Everything that a trace changes, and what it could leave behind."""
    import huggingface_hub

    attributes = {
        (patch.target, id(holder)): vars(holder).get(name, MISSING)
        for patch in sandbox.PATCHES
        for holder, name in places(patch)
    }
    kernels = {name: torch._C._dispatch_dump(f"aten::{name}").count("registered at") for name in sandbox.AUTOGRAD_META}
    return {
        **attributes,
        "autograd": [has(name, "AutogradMeta") for name in sandbox.AUTOGRAD_META],
        "kernels": kernels,
        "meta": frozenset(name for name in python_kernels() if has(name, "Meta")),
        "modes": (len(_get_current_dispatch_mode_stack()), torch._C._len_torch_function_stack()),
        "autocast": (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_grad_enabled()),
        "offline": bool(huggingface_hub.constants.HF_HUB_OFFLINE),
        "filters": [len(handler.filters) for handler in logging.getLogger("transformers").handlers],
        "environment": {name: value for name, value in os.environ.items() if "PYTEST" not in name},
        "overrides": optimizer_overrides(),
    }


def has(name: str, key: str) -> bool:
    name = name if "::" in name else f"aten::{name}"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def python_kernels() -> list[str]:
    """The operators for which PyTorch registers a shape function in Python."""
    from vramplan.dryrun.meta_kernels import _library

    return [f"aten::{key.split('/')[1]}" for key in _library._op_impls]


def optimizer_overrides() -> tuple:
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    return id(manager), dict(manager.pid2config), dict(manager.index2config)


@pytest.fixture
def unchanged():
    """The test leaves everything as it was."""
    for job in JOBS[0], JOBS[4]:
        traced(job)  # imports what a trace imports
    before = state()
    yield
    after = state()
    assert {key: (before[key], after.get(key)) for key in before if before[key] != after.get(key)} == {}
    assert not sandbox._applied and sandbox._tracing is None


def test_a_trace_leaves_everything_as_it_was(unchanged):
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    manager.index2config[0, 0] = {"optim_bits": 32}  # the user's own, for all optimizers
    try:
        for job in JOBS:
            assert traced(job)
        assert manager.index2config == {(0, 0): {"optim_bits": 32}}
    finally:
        manager.index2config.clear()


def test_a_trace_that_fails_leaves_everything_as_it_was(unchanged, monkeypatch):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setitem(KERNELS, torch.ops.aten.mm.default, broken)
    with pytest.raises(Unanswered, match="KeyError"):
        traced(JOBS[4])


def test_a_trace_that_is_interrupted_leaves_everything_as_it_was(unchanged, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(KERNELS, torch.ops.aten.mm.default, interrupted)
    with pytest.raises(KeyboardInterrupt):
        traced(JOBS[4])


class Killed(BaseException):
    """What a thread is killed with."""


@pytest.mark.parametrize("part", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_trace_that_is_killed_leaves_everything_as_it_was(unchanged, part):
    """At any moment: an error is raised in its thread from outside."""
    job = {**JOBS[4], "batch_size": 3}
    start = time.monotonic()
    traced(job)
    seconds = time.monotonic() - start
    for attempt in range(10):
        if killed_after(part * seconds * 0.8**attempt, job):
            break
    else:
        pytest.fail("each trace ended before it was killed")
    assert traced(JOBS[0])


def killed_after(seconds: float, job: dict) -> bool:
    """Whether a trace in a thread was killed that runs for longer."""
    ended = []

    def run():
        try:
            traced(job)
        except Killed:
            ended.append(Killed)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(seconds)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Killed))
    thread.join()
    return bool(ended)


def test_an_error_that_python_drops_in_a_callback_is_raised(unchanged, monkeypatch):
    """Else the trace would lack an event, and be stored."""
    real, calls = MemoryTracker._storage_freed, []

    def once(tracker, watch):
        calls.append(1)
        if len(calls) == 200:
            raise KeyError("lost")
        return real(tracker, watch)

    once.__module__ = MemoryTracker.__module__
    monkeypatch.setattr(MemoryTracker, "_storage_freed", once)
    with pytest.raises(KeyError, match="lost"):
        traced(JOBS[0])
    assert len(calls) > 200


def test_an_undo_that_is_interrupted_is_done_all_the_same(unchanged):
    real, tries = sandbox._Replacement.undo, []

    def fails_once(change):
        tries.append(change)
        if len(tries) == 1:
            raise KeyboardInterrupt
        real(change)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt), sandbox.active():
        patch.setattr(sandbox._Replacement, "undo", fails_once)
    assert len(tries) > 1


# --- threads ------------------------------------------------------------------------------------------------


def test_jobs_in_threads_are_planned_as_in_turn(unchanged, monkeypatch, tmp_path):
    """Byte for byte, and so is what is stored."""
    in_turn = [traced(job) for job in JOBS]
    with ThreadPoolExecutor(len(JOBS)) as threads:
        assert [*threads.map(traced, JOBS)] == in_turn
        assert [*threads.map(traced, reversed(JOBS))] == in_turn[::-1]
        monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
        cache = profile_cache.ProfileCache()
        monkeypatch.setattr(profile_cache, "_profiles", cache)
        answers = [*threads.map(lambda job: plan(whole(job)), JOBS)]
    assert [cache.own.get(request(job).key) for job in JOBS] == [[data] for data in in_turn]
    again = [plan(whole(job)) for job in JOBS]
    assert [answer["peak"] for answer in answers] == [answer["peak"] for answer in again]


def test_another_thread_s_code_runs_as_before(unchanged):
    """While a trace of this thread has everything replaced."""
    with ThreadPoolExecutor(1) as threads:
        alone = threads.submit(users_own).result()
        with (
            sandbox.active(),
            as_if_cuda(Card()),
            paged_states_elsewhere(),
            _no_initialisation(),
            empty_parameters(),
        ):
            assert threads.submit(users_own).result() == alone
            assert users_own() != alone


def users_own() -> list:
    """What a user's own code does with torch, bitsandbytes and the Hub."""
    import bitsandbytes
    import huggingface_hub

    layer = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(layer.weight, 3.0)
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    return [
        layer.weight.device.type,
        float(layer.weight.detach().sum()) if layer.weight.device.type == "cpu" else None,
        autocast_on_meta(),
        isinstance(torch.autocast("cpu", torch.bfloat16), torch.autocast),
        torch.utils._foreach_utils._get_fused_kernels_supported_devices(),
        bitsandbytes.functional.is_on_gpu.__module__,
        bool(huggingface_hub.constants.HF_HUB_OFFLINE),
        manager is bitsandbytes.optim.GlobalOptimManager._instance,
        *operators(),
    ]


def autocast_on_meta() -> str:
    try:
        return str(torch.is_autocast_enabled("meta"))
    except RuntimeError:
        return "the meta device has none"


def operators() -> list[tuple]:
    """Shape, strides and operators of a few calls on meta tensors."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Logs(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    found: list[tuple] = []
    q = torch.empty(1, 4, 8, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    scores = torch.empty(2, 8, 8, device="meta", dtype=torch.float16)
    for run in (
        lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
        lambda: torch.nn.functional.dropout(scores, 0.1),
        lambda: torch.softmax(scores, -1, dtype=torch.float32),
        lambda: torch.log_softmax(scores, -1, dtype=torch.float32),
    ):
        names: list[str] = []
        with Logs():
            out = run()
        found.append((tuple(out.shape), out.stride(), str(out.dtype), *names))
    return found


# --- a user's process ---------------------------------------------------------------------------------------

META = """
import json, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
if {planned}:
    from tiny import LLAMA
    from vramplan.usecases import plan
    plan({{"config": LLAMA, "method": "lora", "trainer": "pytorch", "sequence_length": 32, "vocab": 1}} if 0 else
         {{"config": {{**LLAMA, "vocab_size": 136}}, "method": "lora", "trainer": "pytorch", "sequence_length": 32}})
from torch.utils._python_dispatch import TorchDispatchMode

class Logs(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names.append(str(func))
        return func(*args, **(kwargs or {{}}))

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

q = meta(1, 4, 8, 16).requires_grad_()
rows = meta(8, 4, 6, dtype=torch.float32).transpose(0, 1)
for run in (
    lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
    lambda: torch.nn.functional.dropout(meta(4, 4), 0.5),
    lambda: torch.softmax(meta(4, 4, dtype=torch.float16), -1, dtype=torch.float32),
    lambda: torch.ops.aten.softplus_backward(rows, rows, 1, 20),
    lambda: torch.ops.aten.native_layer_norm(rows, [6], None, None, 1e-5)[0],
    lambda: torch.stack([rows, rows], 1),
):
    names = []
    with Logs():
        out = run()
    print(json.dumps([list(out.shape), out.stride(), str(out.dtype), names]))
"""


def test_a_user_s_own_meta_tensors_behave_as_if_nothing_had_been_planned(tmp_path):
    def run(planned: bool) -> str:
        code = META.format(root=str(ROOT), tests=str(ROOT / "tests"), planned=planned)
        environment = {**os.environ, "VRAMPLAN_CACHE": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
        ).stdout

    before = run(False)
    assert before.count("\n") == 6 and run(True) == before


IMPORTED = """
import json, logging, os, sys
sys.path.insert(0, {root!r})
import torch, transformers, peft, accelerate, huggingface_hub.constants
def state():
    names = (torch.compile, torch.autocast, torch.nn.Module.__call__, torch.tensor, sys.unraisablehook)
    ops = ("softmax.int", "dropout", "scaled_dot_product_attention", "softplus_backward", "stack")
    return [
        [*map(id, names)],
        dict(os.environ),
        [torch._C._dispatch_dump("aten::" + op) for op in ops],
        huggingface_hub.constants.HF_HUB_OFFLINE,
        [logging.getLogger(name).level for name in ("bitsandbytes", "transformers")],
        transformers.logging.get_verbosity(),
    ]
before = state()
import vramplan.dryrun.trace, vramplan.dryrun.steps.merge_and_save
assert state() == before
from bitsandbytes.backends.default import ops
compiled = []
torch.compile = lambda function, **_: compiled.append(function.__name__) or function
"""


def test_an_import_changes_nothing():
    code = IMPORTED.format(root=str(ROOT))
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={k: v for k, v in os.environ.items() if "VERB" not in k}
    )


def test_what_bitsandbytes_compiles_is_compiled_when_it_is_called():
    calls = []

    def compile(function, **options):
        calls.append(options)
        return function

    later = sandbox._compile_later(compile, lambda x: x + 1, dynamic=False)
    assert calls == [] and [later(1), later(2)] == [2, 3] and calls == [{"dynamic": False}]


# --- the list -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", sandbox.PATCHES, ids=lambda patch: patch.target)
def test_every_row_names_what_the_installed_version_has(patch):
    assert patch.reason and patch.versions
    import transformers.models.llama.modeling_llama
    import transformers.models.mamba.modeling_mamba  # noqa: F401
    import trl.kernels.chunked_logprob
    import trl.trainer.dpo_trainer  # noqa: F401

    bnb_cuda_ops()
    there = [
        holder
        for holder, name in places(patch)
        if name in vars(holder) or (isinstance(holder, type) and hasattr(holder, name))
    ]
    assert there or patch.absent, f"{patch.target} is not there"


def test_nothing_is_replaced_that_is_not_listed_or_outside_of_the_sandbox(unchanged):
    with pytest.raises(OurFault, match="does not list"), sandbox.active(), sandbox.replaced(torch, "add", None):
        pass
    with pytest.raises(OurFault, match="outside"), sandbox.replaced(torch, "tensor", None):
        pass
    with pytest.raises(OurFault, match="outside"), MemoryTracker(Card()):
        pass


def test_what_was_not_there_is_deleted_again(unchanged):
    from transformers.models.mamba import modeling_mamba

    with sandbox.active(), sandbox.replaced(modeling_mamba, "range", range):
        assert "range" in vars(modeling_mamba)
    assert "range" not in vars(modeling_mamba)


def test_a_process_that_does_nothing_else_keeps_the_registrations():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from vramplan.dryrun import sandbox
import vramplan.dryrun.trace
has = lambda: torch._C._dispatch_has_kernel_for_dispatch_key("aten::dropout", "AutogradMeta")
x = torch.empty(4, 4, device="meta")
sandbox.hold()
assert has()
with sandbox.active():
    assert has()
assert has() and torch.nn.functional.dropout(x).shape == x.shape
"""
    subprocess.run([sys.executable, "-c", code], check=True)


PATCHING = ("setattr", "delattr")
ALLOWED = {("build/quantizers/__init__.py", "setattr(model.get_submodule(parent), leaf, new)"), ("sandbox.py", "*")}


@pytest.mark.parametrize(
    "path", [*(ROOT / "app/dryrun").rglob("*.py"), *(ROOT / "app/probe").rglob("*.py")], ids=lambda path: path.name
)
def test_foreign_names_are_set_in_the_sandbox_alone(path):
    """No setattr, and no assignment to an attribute of what was imported from elsewhere."""
    name = str(path.relative_to(ROOT / "app")).removeprefix("dryrun/")
    if (name, "*") in ALLOWED:
        return
    tree = ast.parse(path.read_text())
    foreign = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PATCHING:
            assert (name, ast.unparse(node)) in ALLOWED, ast.unparse(node)
        for target in _written(node):
            root = target
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            set_on = isinstance(root, ast.Name) and root.id in foreign and root is not target
            assert not set_on, f"{name}:{node.lineno} {ast.unparse(node)[:80]}"


def _written(node: ast.AST) -> list:
    if isinstance(node, (ast.Assign, ast.Delete)):
        return node.targets
    return [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else []
