"""One site's training over several devices of one machine.

The first process draws the patients, augments, adds the noise and steps, as it would alone; the others hold the same
network and give the gradients of their part of each batch. So nothing that privacy rests on happens twice: a patient
is clipped where its records are, all of them in one place, and the noise is added once, to the sum.

Not `DistributedDataParallel`: that averages finished gradients over equal parts inside the backward pass, and the
private gradient is not made there.

Source: Li et al. 2020 (VLDB), the same collectives.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from client.dp import PrivateGradient, Sampling, os_noise
from client.dp.bookkeeping import trainable
from client.train import Loss, Private, mean_gradient, private_gradient, record_loss
from common.compute import compute_with
from common.config import Recipe, recipe_from_json
from common.errors import TrainingError
from common.models import build

_TIMEOUT = datetime.timedelta(minutes=10)
_GO = b"go"


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What another process works on in one step."""

    x: npt.NDArray[np.float32]
    target: npt.NDArray[np.generic]
    of: int
    """Records of the whole batch."""
    clip_norm: float | None
    """None: a plain gradient."""


@dataclass(frozen=True, kw_only=True)
class _Begin:
    """A visit begins: all that the network holds follows."""

    seed: int
    class_weights: tuple[float, ...] | None


class Team:
    """Processes that share the gradients of one recipe's network; they end with this one."""

    def __init__(self, recipe: Recipe, devices: Sequence[torch.device], memory_fraction: float = 1.0) -> None:
        """Starts a process for every device but the first, which is this process's own."""
        self.recipe, self.devices, self.memory_fraction = recipe, tuple(devices), memory_fraction
        self._folder = tempfile.TemporaryDirectory(prefix="fedicom-team-")
        meeting = str(Path(self._folder.name) / "meeting")
        spawn = get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        text, threads = recipe.canonical.decode(), max(1, torch.get_num_threads() // len(devices))
        for rank in range(1, len(devices)):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=_follow,
                args=(theirs, rank, len(devices), meeting, text, str(devices[rank]), threads, memory_fraction),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        _meet(0, len(devices), meeting, devices[0])

    def begin(self, model: nn.Module, recipe: Recipe, seed: int) -> None:
        """Gives the others this visit's network and loss.

        Args:
            recipe: With class weights as numbers.
            seed: Of dropout; each process has its own.
        """
        weights = recipe.training.class_weights
        assert weights != "balanced"
        with self._talking():
            for pipe in self._pipes:
                pipe.send(_Begin(seed=seed, class_weights=weights))
            for value in model.state_dict().values():
                dist.broadcast(value, 0)

    def private_step(self, engine: PrivateGradient, x_B: torch.Tensor, target_B: torch.Tensor) -> None:
        """As `engine.step`, with the clipped sums of all processes."""
        own = self._hand_out(engine.model, x_B, target_B, engine.views, engine.clip_norm)
        sums, norms = engine.sums(x_B[own], target_B[own])
        told = self._collect(sums)
        engine.release(sums, torch.cat([norms, *(torch.as_tensor(other).to(norms) for other in told)]))

    def plain_step(
        self, model: nn.Module, loss_B: Loss, x_B: torch.Tensor, target_B: torch.Tensor, recipe: Recipe
    ) -> torch.Tensor:
        """Sets `.grad` to that of the mean loss over the whole batch, and gives that loss."""
        own = self._hand_out(model, x_B, target_B, 1, None)
        parameters = list(trainable(model).values())
        loss = mean_gradient(model, loss_B, x_B[own], target_B[own], recipe.training, of=len(x_B))
        sums = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        told = self._collect(sums)
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total
        return loss + sum(float(other[0]) for other in told)

    def close(self) -> None:
        """Ends the other processes; safe to call twice."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        if self._processes and dist.is_initialized():
            dist.destroy_process_group()
        self._pipes, self._processes = [], []
        self._folder.cleanup()

    def _hand_out(
        self, model: nn.Module, x_B: torch.Tensor, target_B: torch.Tensor, views: int, clip_norm: float | None
    ) -> slice:
        """Sends the others their parts and the weights, and tells which part is this process's own."""
        bounds = [len(x_B) // views * rank // len(self.devices) * views for rank in range(len(self.devices) + 1)]
        with self._talking():
            for rank, pipe in enumerate(self._pipes, start=1):
                part = slice(bounds[rank], bounds[rank + 1])
                x, target = x_B[part].cpu().numpy(), target_B[part].cpu().numpy()
                pipe.send(_Part(x=x, target=target, of=len(x_B), clip_norm=clip_norm))
            for parameter in trainable(model).values():
                dist.broadcast(parameter.detach(), 0)
        return slice(bounds[0], bounds[1])

    def _collect(self, sums: list[torch.Tensor]) -> list[npt.NDArray[np.float32]]:
        """Adds the others' sums to these in place, once all have said that theirs is there."""
        told: list[npt.NDArray[np.float32]] = []
        with self._talking():
            for pipe in self._pipes:
                answer = pipe.recv()
                if isinstance(answer, str):
                    raise TrainingError(f"training on several devices: {answer}")
                told.append(answer)
            for pipe in self._pipes:
                pipe.send_bytes(_GO)
            for total in sums:
                dist.reduce(total, 0)
        return told

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """What goes wrong here leaves somebody waiting for a word that will not come: the team ends."""
        try:
            yield
        except (EOFError, OSError, RuntimeError) as error:
            self.close()
            raise TrainingError(
                f"training on several devices: another process ended ({type(error).__name__}); see this node's log"
            ) from None
        except BaseException:
            self.close()
            raise


_TEAM: list[Team] = []
"""At most one in a process: a node works on one recipe at a time."""


def team_of(recipe: Recipe, devices: Sequence[torch.device], memory_fraction: float = 1.0) -> Team:
    """The team for this recipe; that of another recipe ends."""
    wanted = recipe, tuple(devices), memory_fraction
    if _TEAM and ((_TEAM[0].recipe, _TEAM[0].devices, _TEAM[0].memory_fraction) != wanted or not _TEAM[0]._pipes):
        _TEAM.pop().close()
    if not _TEAM:
        _TEAM.append(Team(*wanted))
    return _TEAM[0]


def dismiss() -> None:
    """Ends the team, where there is one."""
    while _TEAM:
        _TEAM.pop().close()


def _meet(rank: int, world: int, meeting: str, device: torch.device) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing of a gradient leaves the machine
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world,
        timeout=_TIMEOUT,
    )  # fmt: skip


def _follow(
    pipe: Connection, rank: int, world: int, meeting: str, recipe_json: str, where: str, threads: int, share: float
) -> None:
    """The life of another process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = torch.device(where)
    compute_with(threads)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device)
    _meet(rank, world, meeting, device)
    recipe = recipe_from_json(recipe_json)
    model = build(recipe).to(device).train()
    parameters = list(trainable(model).values())
    loss_B, engine = record_loss(replace(recipe, training=replace(recipe.training, class_weights=None))), None
    while True:
        try:
            order: _Begin | _Part = pipe.recv()
            if isinstance(order, _Begin):
                for value in model.state_dict().values():
                    dist.broadcast(value, 0)
                torch.manual_seed(order.seed // 2 + rank)
                given = replace(recipe, training=replace(recipe.training, class_weights=order.class_weights))
                loss_B, engine = record_loss(given), None
                continue
            for parameter in parameters:
                dist.broadcast(parameter.detach(), 0)
            try:
                if order.clip_norm is not None and engine is None:
                    engine = _engine(model, loss_B, recipe)
                sums, told = _part(model, loss_B, recipe, engine, order, device)
            except Exception as error:  # told, for the first process waits; its text may hold anything
                pipe.send(f"{type(error).__name__} in the process of {where}")
                return
            pipe.send(told)
            if pipe.recv_bytes() != _GO:
                return
            for total in sums:
                dist.reduce(total, 0)
        except (EOFError, OSError):
            return


def _engine(model: nn.Module, loss_B: Loss, recipe: Recipe) -> PrivateGradient:
    """Clips and sums as the first process does; the noise is that one's alone."""
    no_noise = Private(sampling=Sampling(rate=1.0, steps=1), noise_multiplier=0.0, noise=os_noise())
    return private_gradient(model, loss_B, recipe, no_noise)


def _part(
    model: nn.Module, loss_B: Loss, recipe: Recipe, engine: PrivateGradient | None, part: _Part, device: torch.device
) -> tuple[list[torch.Tensor], npt.NDArray[np.float32]]:
    x_B, target_B = torch.from_numpy(part.x).to(device), torch.from_numpy(part.target).to(device)
    if part.clip_norm is not None:
        assert engine is not None
        engine.clip_norm = part.clip_norm
        sums, norms = engine.sums(x_B, target_B)
        return sums, norms.float().cpu().numpy()
    for parameter in trainable(model).values():
        parameter.grad = None
    loss = mean_gradient(model, loss_B, x_B, target_B, recipe.training, of=part.of)
    sums = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable(model).values()]
    return sums, np.array([float(loss)], np.float32)


def _end_with_parent() -> None:
    parent: Any = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
