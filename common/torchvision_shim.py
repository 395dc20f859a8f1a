"""Makes torchvision importable beside a CPU-only torch.

timm needs torchvision for a few layers and transforms, never for its detection kernels. The
wheel of torchvision on PyPI is linked against CUDA, so next to a CPU-only torch its compiled
part cannot load, and `import torchvision` fails on two operators that it wants to describe.
"""

from __future__ import annotations

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []  # a library forgets its operators when it is collected


def ensure_torchvision() -> None:
    """Imports torchvision, declaring the schemas of `nms` and `qnms` when, and only when, they are missing.

    Call it before the first import of timm. With a CUDA torch, or with a torchvision that was
    built for the CPU, nothing is changed. The declared operators have no kernel: calling one raises.

    Raises:
        ImportError: torchvision is absent or broken in another way; raised as it came.
        RuntimeError: The same, out of torchvision's own start-up.
    """
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
