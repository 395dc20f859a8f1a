"""A GPU that is not there: torch computes on the CPU, and refuses what a GPU would refuse.

Tensors that were moved to "cuda" are wrapped. Arithmetic between a wrapped tensor and one of the CPU raises, as does a
look at its numbers without `.cpu()`, or a random generator of the other kind. So code that was never run on a card is
at least run through its GPU branches, with numbers that are those of the CPU. What it cannot show: kernels that a card
has not, its roundings, its memory, its streams, and how fast it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
_MIX = ("index", "copy_", "_to_copy", "native_batch_norm", "native_batch_norm_backward")
"""Indices may be the host's, as may a number of no dimension; torch.func gives batch norms ones of its own making."""
_SEEN_BY_THE_HOST = ("numpy", "__array__", "tolist", "data_ptr")


class OnGpu(torch.Tensor):
    """A tensor whose numbers only operations reach."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=held.device, requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        strangers = [leaf for leaf in tensors if not isinstance(leaf, OnGpu)]
        name = func._overloadpacket.__name__
        if any(leaf.dim() for leaf in strangers) and name not in _MIX:
            shapes = [(type(leaf).__name__, tuple(leaf.shape)) for leaf in tensors]
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {shapes}")
        _drawn_there(name, kwargs)
        held_args, held_kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, OnGpu) else leaf, (args, kwargs))
        done = func(*held_args, **held_kwargs)
        if name == "copy_" and not isinstance(args[0], OnGpu):
            return args[0]  # from a GPU to the host
        done = tree_map(lambda leaf: OnGpu(leaf) if isinstance(leaf, torch.Tensor) else leaf, done)
        return return_and_correct_aliasing(func, args, kwargs, done)


class Generator(torch.Generator):
    """Random numbers of the GPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type == "cpu":
            return _CpuGenerator()
        return super().__new__(cls)

    @property
    def device(self) -> torch.device:
        return GPU


_CpuGenerator = torch.Generator


def _drawn_there(name: str, kwargs: Mapping[str, Any]) -> None:
    if not isinstance(kwargs.get("generator"), Generator | None):
        raise RuntimeError(f"{name}: expected a 'cuda' device type for generator but found 'cpu'")


def _there(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _moved(tensor: torch.Tensor, device: Any, copy: bool = False) -> torch.Tensor:
    if device is None or _there(device) == isinstance(tensor, OnGpu):
        return tensor.clone() if copy else tensor
    assert not (torch.is_grad_enabled() and tensor.requires_grad), "gradients through a move are not pretended"
    needs = tensor.requires_grad
    made = OnGpu(tensor.detach().clone()) if _there(device) else tensor.detach().held.clone()  # type: ignore[attr-defined]
    return made.requires_grad_(needs)


class Pretending(TorchFunctionMode):
    """Sees every call of torch's before torch does."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        on_gpu = isinstance(first, OnGpu)
        if name == "__get__" and on_gpu:
            what = getattr(func.__self__, "__name__", "")
            if what == "device":
                return GPU
            if what == "is_cuda":
                return True
            if what == "is_cpu":
                return False
            if what == "data":
                return first.detach()
        if name == "__set__" and on_gpu and getattr(func.__self__, "__name__", "") == "data":
            assert isinstance(args[1], OnGpu), "the data of a tensor of the GPU set to one of the host"
            first.held = args[1].held
        if on_gpu and name in _SEEN_BY_THE_HOST:
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({name}); use Tensor.cpu()")
        if name == "pin_memory":
            return func(first) if on_gpu else first
        if name in ("cpu", "cuda") and isinstance(first, torch.Tensor):
            return _moved(first, name)
        if name == "to" and isinstance(first, torch.Tensor):
            copy = kwargs.pop("copy", False)
            if len(args) > 1 and isinstance(args[1], torch.Tensor):
                device, dtype, form = (GPU if isinstance(args[1], OnGpu) else "cpu"), args[1].dtype, None
            else:
                device, dtype, _, form = torch._C._nn._parse_to(*args[1:], **kwargs)
            words = {} if form is None else {"memory_format": form}
            there = _moved(first, device, copy)
            return func(there, **({"dtype": dtype} if dtype is not None else {}), **words) if dtype or words else there
        device = kwargs.get("device")
        if device is None or not (on_gpu or _there(device)):
            return func(*args, **kwargs)
        if _there(device):
            _drawn_there(name, kwargs)
        done = func(*args, **{**kwargs, "device": "cpu"})
        return tree_map(lambda leaf: _moved(leaf, device) if isinstance(leaf, torch.Tensor) else leaf, done)


_swap = torch.utils.swap_tensors


def _swapped(one: torch.Tensor, other: torch.Tensor) -> None:
    if isinstance(one, OnGpu) or isinstance(other, OnGpu):
        _swap(one, other)
    else:
        one.data = other.data


_ANSWERS: Mapping[str, Any] = {
    **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
    "device_count": 1,
    "current_device": 0,
    "get_device_name": "pretended GPU",
    "mem_get_info": (8 << 30, 16 << 30),
    "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    **dict.fromkeys(("_lazy_init", "synchronize", "empty_cache", "manual_seed", "set_rng_state")),
}
_BELOW = ("_cuda_setMemoryFraction", "_cuda_setDevice")
"""What torch calls after its own look at what it was given."""


@contextmanager
def pretending() -> Iterator[torch.device]:
    """torch sees one GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in _ANSWERS.items():  # a function each: torch's compiler tells them apart by what they are
            patch.setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
        for name in _BELOW:
            patch.setattr(torch._C, name, lambda *_: None, raising=False)
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)  # asks a CUDA build's driver
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)  # a moved parameter stays itself
        patch.setattr(torch.utils, "swap_tensors", _swapped)
        patch.setattr(torch, "Generator", Generator)
        autocast = torch.autocast
        patch.setattr(torch, "autocast", lambda device, **words: autocast("cpu", **words))  # wrapped ones are the CPU's
        run = threading.Thread.run

        def pretended(thread: threading.Thread) -> None:
            with Pretending():  # a mode is of one thread
                run(thread)

        patch.setattr(threading.Thread, "run", pretended)
        with Pretending():
            yield GPU
