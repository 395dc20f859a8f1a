"""What a private step costs: Fedicom's engine and Opacus (hooks, ghost clipping) against a plain step.

    python benchmarks/dp.py --out runs/dp                                         # all that is missing
    python benchmarks/dp.py --out runs/dp --only resnet18 vit_tiny --batches 32   # a piece
    python benchmarks/dp.py --out runs/dp --table                                 # Markdown of what is there

Every cell runs in a process of its own (a fork), on one thread: build, one step to warm up, then `--steps` steps
(fewer where the time of the cell ends) of forward, backward, clip, noise and SGD. The ratio is of CPU time (the fastest
step), which other work on the machine moves least; wall time is kept beside it. Memory is the peak of the process above
what it held before the network was built. A cell that is in dp.jsonl already is not run again, so pieces of one table
can be run apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("plain", "fedicom", "hooks", "ghost")
NAMES = {"fedicom": "Fedicom", "hooks": "Opacus, hooks", "ghost": "Opacus, ghost"}
MODELS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "resnet18": ("timm", "resnet18", (64, 64)),
    "efficientnet_b0": ("timm", "efficientnet_b0", (64, 64)),
    "mobilenetv3": ("timm", "mobilenetv3_small_100", (64, 64)),
    "convnext_tiny": ("timm", "convnext_tiny", (64, 64)),
    "vit_tiny": ("timm", "vit_tiny_patch16_224", (64, 64)),
    "monai_resnet18": ("monai", "resnet18", (64, 64)),
    "monai_resnet50": ("monai", "resnet50", (64, 64)),
    "monai_densenet121": ("monai", "densenet121", (64, 64)),
    "monai_efficientnet_b0": ("monai", "efficientnet-b0", (64, 64)),
    "monai_vit": ("monai", "vit", (64, 64)),
    "monai_resnet18_3d": ("monai", "resnet18", (28, 28, 28)),
    "monai_resnet50_3d": ("monai", "resnet50", (28, 28, 28)),
    "monai_densenet121_3d": ("monai", "densenet121", (32, 32, 32)),
    "monai_efficientnet_b0_3d": ("monai", "efficientnet-b0", (32, 32, 32)),
    "monai_vit_3d": ("monai", "vit", (28, 28, 28)),
}


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/dp"))
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--timeout-s", type=float, default=600.0, help="CPU time of a cell; longer is told as such")
    parser.add_argument("--memory-gb", type=float, default=16.0, help="of a cell; more is told as such")
    parser.add_argument("--last", action="store_true", help="channels last in memory; a table of its own")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    file = arguments.out / "dp.jsonl"
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
        sys.path.insert(0, str(ROOT))
        _settings("resnet18")  # imports
        for batch in arguments.batches:
            for model in arguments.only:
                for method in arguments.methods:
                    cell = {"model": model, "method": method, "batch": batch, "last": arguments.last}
                    if _key(cell) not in _cells(file):
                        done = cell | _run(cell, arguments.steps, arguments.timeout_s, arguments.memory_gb)
                        with file.open("a") as out:
                            out.write(json.dumps(done) + "\n")
                        print(json.dumps(done), flush=True)
    print(table(list(_cells(file).values())))


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: time x and memory x of the plain step."""
    by_key = {_key(cell): cell for cell in cells}
    lines = [
        f"| network, batch | plain step, CPU s | {' | '.join(NAMES[method] for method in METHODS[1:])} |",
        "|---|---|---|---|---|",
    ]
    for batch, last in sorted({(cell["batch"], cell["last"]) for cell in cells}):
        for model, (_, _, size) in MODELS.items():
            plain = by_key.get((model, "plain", batch, last))
            if plain is None or "error" in plain:
                continue
            row = [_ratio(by_key.get((model, method, batch, last)), plain) for method in METHODS[1:]]
            what = f"{model} {'x'.join(map(str, size))}, {batch}{', channels last' if last else ''}"
            lines.append(f"| {what} | {plain['cpu_s']:.2f} | {' | '.join(row)} |")
    return "\n".join(lines)


def _ratio(cell: dict[str, Any] | None, plain: dict[str, Any]) -> str:
    if cell is None:
        return "not run"
    if "error" in cell:
        return str(cell["error"])[:60]
    return f"{cell['cpu_s'] / plain['cpu_s']:.2f} / {cell['memory_mb'] / plain['memory_mb']:.2f}"


def _key(cell: dict[str, Any]) -> tuple[str, str, int, bool]:
    return cell["model"], cell["method"], cell["batch"], cell["last"]


def _cells(file: Path) -> dict[tuple[str, str, int, bool], dict[str, Any]]:
    lines = file.read_text().splitlines() if file.exists() else []
    return {_key(cell): cell for cell in map(json.loads, lines)}


def _run(cell: dict[str, Any], steps: int, timeout_s: float, memory_gb: float) -> dict[str, Any]:
    """One cell in a fork of this process, which has imported everything and started no thread."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            done = _measured(**cell, steps=steps, timeout_s=timeout_s, memory_gb=memory_gb)
        except BaseException as error:
            memory = isinstance(error, MemoryError) or "alloc" in str(error)
            said = str(error).strip().splitlines() or [type(error).__name__]
            done = {"error": f"needs more than {memory_gb:g} GB" if memory else said[-1][:200]}
        os.write(writer, json.dumps(done).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGXCPU:
        return {"error": f"not done in {timeout_s:.0f} s of CPU"}
    return dict(json.loads(text)) if text else {"error": f"ended with {status}"}


def _measured(
    model: str, method: str, batch: int, last: bool, steps: int, timeout_s: float, memory_gb: float
) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(timeout_s), math.ceil(timeout_s) + 5))  # SIGXCPU, then SIGKILL
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * 2**30), int(memory_gb * 2**30)))
    import torch

    torch.set_num_threads(1)
    before = _peak_mb()
    step = _stepper(model, method, batch, last)
    step()
    cpu, wall = [], []
    for _ in range(steps):
        began = time.process_time(), time.perf_counter()
        step()
        cpu.append(time.process_time() - began[0])
        wall.append(time.perf_counter() - began[1])
        if time.process_time() + 1.5 * cpu[-1] > timeout_s:
            break  # fewer steps of a slow cell
    return {
        "cpu_s": min(cpu), "wall_s": min(wall), "steps": len(cpu), "memory_mb": _peak_mb() - before,
        "torch": torch.__version__,
    }  # fmt: skip


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _settings(model: str) -> Any:
    import monai.networks.nets  # noqa: F401
    import opacus  # noqa: F401

    from common.config import ModelConfig, Preprocessing, Privacy, Recipe, Task
    from common.timm_shim import ensure_light_timm

    ensure_light_timm()
    import timm  # noqa: F401

    family: Any
    family, name, size = MODELS[model]
    dimensions: Any = len(size)
    patch = {"vit_tiny_patch16_224": 8, "vit": 8 if dimensions == 2 else 7}.get(name)
    return Recipe(
        name="benchmark",
        task=Task(dimensions=dimensions),
        data=Preprocessing(size=size),
        model=ModelConfig(family=family, name=name, dimensions=dimensions, patch=patch),
        privacy=Privacy(mechanism="dp_sgd", epsilon=8.0, delta=1e-5),
    )


def _stepper(model: str, method: str, batch: int, last: bool) -> Callable[[], None]:
    import torch
    from torch.nn.functional import cross_entropy

    from common.models import build

    recipe = _settings(model)
    network = build(recipe).train()
    x = torch.randn(batch, 1, *recipe.data.size)
    target = torch.arange(batch) % 2
    if last:
        order: Any = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        x, network = x.to(memory_format=order), network.to(memory_format=order)  # type: ignore[call-overload]
    if method in ("hooks", "ghost"):
        return _opacus(network, method, x, target)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=1e-4)
    if method == "fedicom":
        from client.dp import PrivateGradient, os_noise

        engine = PrivateGradient(
            network, lambda y, t: cross_entropy(y, t, reduction="none"), clip_norm=1.0, noise_multiplier=1.0,
            expected_batch=batch, physical_batch=batch, noise=os_noise(),
        )  # fmt: skip
        engine._tested = True  # three records in float64 would raise the peak of small batches
    else:
        engine = None

    def step() -> None:
        optimiser.zero_grad()
        if engine is not None:
            engine.step(x, target)
        else:
            cross_entropy(network(x), target).backward()
        optimiser.step()

    return step


def _opacus(network: Any, method: str, x: Any, target: Any) -> Callable[[], None]:
    import torch
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    from torch import nn

    class Copy(nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return y.clone()

    # Residual blocks add in place to a norm's output, which is a view under Opacus' hooks.
    for module in list(network.modules()):
        for name in ("bn3", "norm3", "bn2", "norm2"):
            if type(module).__name__ in ("BasicBlock", "Bottleneck", "ResNetBlock", "ResNetBottleneck") and hasattr(
                module, name
            ):
                setattr(module, name, nn.Sequential(getattr(module, name), Copy()))
                break
    given: Any = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": len(x)}
    inner = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    wrapped: Any
    criterion: Any = nn.CrossEntropyLoss()
    if method == "hooks":
        wrapped = GradSampleModule(network)
        optimiser: Any = DPOptimizer(inner, **given)
    else:
        wrapped = GradSampleModuleFastGradientClipping(network, max_grad_norm=1.0, use_ghost_clipping=True)
        optimiser = DPOptimizerFastGradientClipping(inner, **given)
        criterion = DPLossFastGradientClipping(wrapped, optimiser, criterion)

    def step() -> None:
        optimiser.zero_grad()
        criterion(wrapped(x), target).backward()
        optimiser.step()

    return step


if __name__ == "__main__":
    main()
