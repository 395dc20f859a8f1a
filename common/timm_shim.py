"""Makes timm importable beside a CPU-only torch, and loads with it nothing that Fedicom never calls.

timm needs torchvision for a few layers and transforms, never for its detection kernels. The wheel of torchvision on
PyPI is linked against CUDA, so next to a CPU-only torch its compiled part cannot load, and `import torchvision` fails
on two operators that it wants to describe. One of those kernels imports torch's compiler for a question that it asks
when it is called, and timm another part of it to mark one class: .6 s and 60 MB in each process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch._compile import _disable_dynamo

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_COMPILER = "torch._dynamo.utils"
_DOWNLOADS = "huggingface_hub"
_libraries: list[torch.library.Library] = []  # a library forgets its operators when it is collected


def ensure_light_timm() -> None:
    """Imports timm and torchvision. Call it before the first import of either; where timm is loaded, it stays.

    The schemas of `nms` and `qnms` are declared when, and only when, they are missing: with a CUDA torch, or with a
    torchvision that was built for the CPU, nothing is changed. The declared operators have no kernel: calling one
    raises. Torch's compiler is imported when something calls it. timm is told that it cannot download.

    Raises:
        ImportError: torchvision or timm is absent or broken in another way; raised as it came.
        RuntimeError: The same, out of torchvision's own start-up.
    """
    if "timm" in sys.modules:
        return
    with _compiler_when_called(), _without(_DOWNLOADS):
        _torchvision()
        import timm  # noqa: F401


def _torchvision() -> None:
    try:
        import torchvision
    except RuntimeError as error:
        if _libraries or "operator torchvision::" not in str(error):
            raise
        # Tried first, declared second: a schema declared before a working compiled part loads would clash with it.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + _SCHEMA)
        _libraries.append(library)
        import torchvision  # noqa: F401


@contextmanager
def _compiler_when_called() -> Iterator[None]:
    """What is marked or asked for in here finds torch's compiler when it is called, and anything else finds it now."""
    if _COMPILER in sys.modules:
        yield
        return
    later: Any = ModuleType(_COMPILER)

    def real(name: str) -> Any:
        if name.startswith("__"):  # the import's own questions
            raise AttributeError(name)
        if sys.modules.get(_COMPILER) is later:
            del sys.modules[_COMPILER]
        return getattr(import_module(_COMPILER), name)

    later.__getattr__ = real
    later.is_compile_supported = lambda *given: real("is_compile_supported")(*given)
    sys.modules[_COMPILER] = later
    compiler: Any = torch.compiler
    disable, compiler.disable = compiler.disable, _disable_dynamo  # torch's own: the same, and late
    try:
        yield
    finally:
        compiler.disable = disable
        if sys.modules.get(_COMPILER) is later:
            del sys.modules[_COMPILER]


@contextmanager
def _without(library: str) -> Iterator[None]:
    if library in sys.modules:
        yield
        return
    nothing: Any = None
    sys.modules[library] = nothing  # as Python says: not to be found
    try:
        yield
    finally:
        del sys.modules[library]
