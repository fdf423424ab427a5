"""A Triton whose kernels write where they are told and allocate nothing, for packages that need one to be imported.

What launches a kernel is Python, and runs: it allocates what the kernel writes into. An installed Triton would
compile, for a card that is not there, so this one takes its place. Modules that are imported with it are put away after
the trace, and found again by the next one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..cuda.running import running
from ..sandbox import changed

ON_TRITON = ("liger_kernel", "optimi")
"""The packages that take kernels of Triton on a card, and other ways elsewhere."""
PACKAGES = ("triton", *ON_TRITON)
"""The packages that a trace has of its own."""


class Kernel:
    """A kernel. ``values``: the known values of the running trace, which forget those of what a kernel writes."""

    values: Any = None

    def __init__(self, function: Callable | None):
        self.function, self.__name__ = function, getattr(function, "__name__", "kernel")

    def __getitem__(self, grid):
        return self.run

    def __call__(self, *args, **kwargs):
        """A kernel that another one calls: nothing."""

    def run(self, *args, **kwargs) -> None:
        """The launch of the kernel. What it is given may be written into."""
        if Kernel.values is not None:
            for tensor in (*args, *kwargs.values()):
                if isinstance(tensor, torch.Tensor):
                    Kernel.values.drop_values(tensor)


class _Anything:
    """Any name of Triton's language, and an empty list of them."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __add__(self, other):
        return self

    def __iter__(self):
        return iter(())

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def _jit(function: Callable | None = None, **settings):
    return Kernel(function) if callable(function) else Kernel


class _Module(types.ModuleType):
    __version__ = "3.7.0"
    __path__: ClassVar[list[str]] = []
    jit = staticmethod(_jit)
    autotune = heuristics = staticmethod(lambda *args, **kwargs: lambda kernel: kernel)
    cdiv = staticmethod(lambda a, b: -(-a // b))
    next_power_of_2 = staticmethod(lambda n: 1 << (int(n) - 1).bit_length())

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


AS_ON_CARD = {
    'device.type == "cuda"': 'device.type == "meta"',
    'device.type != "cuda"': 'device.type != "meta"',
    "torch.cuda.get_device_capability(": "card_capability(",
    "torch.cuda.get_device_properties(": "card_properties(",
    "tensor.is_cuda": "tensor.is_meta",
    "torch.cuda.is_bf16_supported()": "(card_capability(tensor) >= (8, 0))",
    "torch.cuda.device_of(tensor)": "nullcontext()",
    "from torch._inductor.utils import triton_type_to_torch": "",
    "TORCH_TO_TRITON_DTYPE[param.dtype]": "param.dtype",
}
"""What these packages ask of a tensor's device, and how their copy of a trace asks it."""


def card_capability(device: Any) -> tuple[int, int]:
    """``torch.cuda.get_device_capability`` of the card that is planned."""
    return running.card.capability


def card_properties(device: Any) -> types.SimpleNamespace:
    """``torch.cuda.get_device_properties`` of it. Its number of multiprocessors becomes a condition of the trace."""
    return types.SimpleNamespace(multi_processor_count=int(running.card.multiprocessors))


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module that takes the path of a card on the meta device."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        source = self.get_data(path).decode()
        for asked, answered in AS_ON_CARD.items():
            source = source.replace(asked, answered)
        return compile(source, path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(card_capability=card_capability, card_properties=card_properties)
        super().exec_module(module)


class _Finder:
    """Finds ``triton`` and all that is in it, and for a trace the modules of the packages on it."""

    on_meta = True

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        package = name.partition(".")[0]
        if package == "triton":
            return importlib.machinery.ModuleSpec(name, _Finder, is_package=True)
        spec = (
            importlib.machinery.PathFinder.find_spec(name, path) if package in ON_TRITON and _Finder.on_meta else None
        )
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec

    @staticmethod
    def create_module(spec):
        return _Module(spec.name)

    @staticmethod
    def exec_module(module) -> None:
        pass


_own: dict[str, types.ModuleType] = {}
"""The modules that were imported with this Triton."""


class _EmptyTriton:
    """The change of Python's modules that puts this Triton, and what needs it, in the place of the installed ones."""

    def __init__(self) -> None:
        self.installed = _ours()

    def apply(self) -> None:
        _take_out(self.installed)
        sys.modules.update(_own)
        sys.meta_path.insert(0, _Finder)

    def undo(self) -> None:
        if _Finder in sys.meta_path:
            sys.meta_path.remove(_Finder)
            _own.update(_ours())
        _take_out(_own)
        sys.modules.update(self.installed)


def _ours() -> dict[str, types.ModuleType]:
    found = list(sys.modules.items())
    return {name: module for name, module in found if name.partition(".")[0] in PACKAGES}


def _take_out(modules: dict[str, types.ModuleType]) -> None:
    for name in modules:
        sys.modules.pop(name, None)


@contextlib.contextmanager
def installed(on_meta: bool = True) -> Iterator[None]:
    """While the context lasts, ``import triton`` finds this one. ``on_meta``: tensors say that they lie on the meta
    device, so the packages on it take the meta device for a card."""
    before, _Finder.on_meta = _Finder.on_meta, on_meta
    try:
        with changed(_EmptyTriton()):
            yield
    finally:
        _Finder.on_meta = before


@functools.cache
def fused_logprob_module() -> types.ModuleType:
    """``trl.kernels.logprob_entropy``, which cannot be imported without Triton: a copy of our own."""
    import trl.kernels

    name = "trl.kernels.logprob_entropy"
    spec = importlib.util.spec_from_file_location(name, Path(trl.kernels.__file__).parent / "logprob_entropy.py")
    module = importlib.util.module_from_spec(spec)
    with installed():
        spec.loader.exec_module(module)
    return module
