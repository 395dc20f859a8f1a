"""One private gradient: per-patient gradients, clipped, summed, noised, over a public denominator."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

from client.dp import bookkeeping
from client.dp.book import NoRuleError
from client.dp.bookkeeping import Loss, clip_factors, trainable
from client.dp.noise import Noise
from client.dp.rules import settle_norms
from client.dp.uses import memory_format
from common.errors import PrivacyError

log = logging.getLogger(__name__)

_PASSED: dict[Hashable, tuple[bool, str]] = {}
"""Kinds of models whose gradients passed the self-test in this process, and the way that did: whether book-keeping
took them, or for what it had no rule. Only the way that passed may be taken again."""

_COUNT_NOISE = 2.0
"""Of the count of unclipped patients, in units of the noise multiplier: the gradient's noise is 3.3 % larger for it."""
_CLIP_RATE = 0.2  # as in Andrew et al. 2021
_SELF_TEST_PATIENTS = 3
_SELF_TEST_ERROR = 1e-4  # the loss alone is float32; a wrong gradient is off by far more


class PrivateGradient:
    """DP-SGD's gradient for a model whose records do not influence each other.

    Each call of `step` takes the patients that were drawn, `views` records of each. A patient's gradient is the mean
    over its records and is clipped after the mean, so what a patient can change does not depend on the number of its
    records. What is released is

        (sum of clipped gradients + normal(0, noise_multiplier * clip_norm)) / expected_batch

    A patient whose gradient is not finite (a NaN voxel, an overflow) contributes exactly zero: the
    bound holds, and no error tells anybody that such a patient was drawn. Gradients, their norms and sums are float32
    (or of the parameters' type) whatever surrounds the call; with `low` the network itself runs under autocast.

    With `clip_quantile` the clip norm follows that quantile of the patients' norms: after every step the number of
    patients within the bound is released too, less half the batch (so that a patient moves it by one half) and with
    noise of 2 x noise_multiplier, and the bound moves by a factor between exp(-0.2) and exp(0.2). Both releases
    together are one Gaussian mechanism of exactly `noise_multiplier`: 1 / z^2 = 1 / z_gradient^2 + (1/2)^2 / (2 z)^2,
    so the gradient gets z sqrt(16 / 15). Source: Andrew et al. 2021, theorem 1.

    Two ways give the same sums: book-keeping (`client.dp.bookkeeping`, one backward pass) where every
    parameter's use has a rule, else `torch.func` per-sample gradients. The choice is made once.

    Source: Abadi et al. 2016, algorithm 1; Poisson sampling by the caller (`poisson_patients`).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_B: Loss,
        *,
        clip_norm: float,
        noise_multiplier: float,
        expected_batch: float,
        physical_batch: int,
        noise: Noise,
        views: int = 1,
        clip_quantile: float | None = None,
        low: torch.dtype | None = None,
        fast: bool = True,
    ) -> None:
        """Checks the settings and the layers; the first step runs `self_test`.

        Args:
            model: Trained in place by the caller; only its trainable parameters get a gradient.
            loss_B: (model output, targets) -> one loss a record, shape (B,), no record looking at another.
            clip_norm: Largest L2 norm of one record's gradient, above 0.
            noise_multiplier: Noise standard deviation in units of `clip_norm`; 0 means no privacy.
            expected_batch: Public denominator; never the number that was drawn.
            physical_batch: Records at once (at least those of one patient); changes memory, not the result.
            noise: The site's own source.
            views: Records of each drawn patient in a step.
            clip_quantile: Share of the patients that shall stay below the clip norm, of which only the start is then
                given; None fixes it.
            low: What the network's layers compute in, `torch.bfloat16`; None is the parameters' type, which the
                `torch.func` way always takes.
            fast: False forces the `torch.func` way.

        Raises:
            PrivacyError: A setting or a layer breaks the bound.
        """
        for name, value, least in (
            ("clip_norm", clip_norm, 0.0),
            ("expected_batch", expected_batch, 0.0),
            ("physical_batch", physical_batch, 0.0),
            ("views", views, 0.0),
            ("noise_multiplier", noise_multiplier, -1e-300),
        ):
            if not (math.isfinite(value) and value > least):
                raise PrivacyError(
                    f"{name}: got {value}, expected a finite number {'above' if least == 0 else 'from'} 0"
                )
        if clip_quantile is not None and not 0 < clip_quantile < 1:
            raise PrivacyError(f"clip_quantile: got {clip_quantile}, expected a number between 0 and 1, or none")
        self._parameters = list(trainable(model).values())
        if not self._parameters:
            raise PrivacyError("the model has no trainable parameter; unfreeze its head at least")
        self.model, self.loss_B = model, loss_B
        self.clip_norm, self.noise_multiplier = float(clip_norm), float(noise_multiplier)
        self.expected_batch, self.physical_batch = float(expected_batch), int(physical_batch)
        self.views, self.clip_quantile, self.low = int(views), clip_quantile, low
        self._noise = noise
        self._fast, self._no_rule = fast, ""
        self._tested = False
        settle_norms(model)

    @property
    def gradient_noise(self) -> float:
        """Standard deviation of the noise on the sum of gradients, in units of the clip norm."""
        if self.clip_quantile is None:
            return self.noise_multiplier
        return self.noise_multiplier / math.sqrt(1 - 1 / (2 * _COUNT_NOISE) ** 2)

    @property
    def way(self) -> str:
        """`bookkeeping` or `torch.func`, as chosen so far."""
        return "bookkeeping" if self._fast else "torch.func"

    def step(self, x_B: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
        """Sets `.grad` of every trainable parameter to a private gradient.

        Args:
            x_B: Records of the drawn patients, (P x views, ...), those of a patient together; with no patient the
                gradient is noise alone.
            target_B: Their targets, (P x views, ...).

        Returns:
            Gradient norms before the clip, (P,); private, not for release.

        Raises:
            PrivacyError: The self-test of the first step failed, or a layer changed its buffers.
        """
        if len(x_B) != len(target_B):
            raise PrivacyError(f"got {len(x_B)} records and {len(target_B)} targets; expected one target a record")
        if len(x_B) % self.views:
            raise PrivacyError(f"got {len(x_B)} records, expected {self.views} of every patient (views)")
        sums, norms = self.sums(x_B, target_B)
        self.release(sums, norms)
        return norms

    def sums(self, x_B: torch.Tensor, target_B: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The clipped sums and the norms before the clip, as `step` has them before the noise; private."""
        self.tested_with(x_B, target_B)
        settle_norms(self.model)
        sums: list[torch.Tensor] = []
        norms: list[torch.Tensor] = []
        with _buffers_unchanged(self.model):
            at_once = max(1, self.physical_batch // self.views) * self.views
            for start in range(0, len(x_B), at_once):
                part = slice(start, start + at_once)
                chunk, chunk_norms = self._clipped_sum(self.model, self.loss_B, x_B[part], target_B[part], self.low)
                if sums:
                    torch._foreach_add_(sums, chunk)
                else:
                    sums = chunk
                norms.append(chunk_norms)
        if not norms:  # nobody was drawn: noise alone
            sums = [torch.zeros_like(parameter) for parameter in self._parameters]
            norms = [sums[0].new_zeros(0)]
        return sums, torch.cat(norms)

    def tested_with(self, x_B: torch.Tensor, target_B: torch.Tensor) -> None:
        """Runs the self-test, with the first records that there are; every step begins with this."""
        if not self._tested and len(x_B):
            self.self_test(x_B, target_B)

    def release(self, sums: list[torch.Tensor], norms_P: torch.Tensor) -> None:
        """Sets `.grad` to these sums (taken over) with noise, over the public denominator."""
        self._release(sums)
        self._adapt(norms_P)

    def self_test(self, x_B: torch.Tensor, target_B: torch.Tensor) -> None:
        """Compares three patients with a loop over them, and the noise with its variance.

        The records are random numbers of the shape and memory format of `x_B`, and their targets count up, so the
        outcome says nothing about a patient. In float64 and on a copy without dropout: there a right gradient agrees to
        many digits, while in float32 one activation that rounds to the other side of zero can hide in a per cent. Each
        kind of model, loss, shape and memory format is compared once in a process; the noise is tested at every call.

        Args:
            x_B: At least one record, for shape, device and memory format.
            target_B: Its targets, for their shape and type.

        Raises:
            PrivacyError: Gradients, norms or noise are not what the privacy claim rests on.
        """
        if not len(x_B):
            raise PrivacyError("the self-test needs a record to know the shape of; got none")
        settle_norms(self.model)
        kind = self._kind(x_B, target_B)
        if kind in _PASSED:
            self._fast, self._no_rule = _PASSED[kind]
        else:
            self._test_gradients(x_B, target_B)
            _PASSED[kind] = self._fast, self._no_rule
        self._test_noise()
        self._tested = True

    def _kind(self, x_B: torch.Tensor, target_B: torch.Tensor) -> Hashable:
        """All that decides whether gradients are right, but for the values of weights and of the loss' constants."""
        modules = tuple((name, type(module), module.training) for name, module in self.model.named_modules())
        parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in self.model.named_parameters())
        loss = getattr(self.loss_B, "__code__", type(self.loss_B))
        shapes = (x_B.shape[1:], x_B.dtype, target_B.shape[1:], target_B.dtype, str(x_B.device), memory_format(x_B))
        ways = (bookkeeping.clipped_sum, vectorised, bookkeeping.clip_factors, clip_factors, self._fast, self.views)
        return repr(self.model), modules, parameters, loss, shapes, ways

    def _test_gradients(self, x_B: torch.Tensor, target_B: torch.Tensor) -> None:
        dtype = self._parameters[0].dtype
        model = copy.deepcopy(self.model).double().eval()

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.loss_B(output.to(dtype), target)  # it may hold class weights of this type

        records = _SELF_TEST_PATIENTS * self.views
        values = torch.randn((records, *x_B.shape[1:]), generator=torch.Generator().manual_seed(0))
        x = values.to(x_B.device, torch.float64).to(memory_format=memory_format(x_B))
        with _buffers_unchanged(model):
            target = _targets(x, target_B)
            sums, norms = self._clipped_sum(model, loss, x, target, None)
            expected_sums, expected_norms = loop(model, loss, x, target, self.clip_norm, self.views)
        for what, error in (
            ("norms", _distance([norms], [expected_norms])),
            ("clipped sum", _distance(sums, expected_sums)),
        ):
            if not error <= _SELF_TEST_ERROR:
                raise PrivacyError(
                    f"self-test: {what} by {self.way} differ by {error:.1e} from a loop over the records, expected at "
                    f"most {_SELF_TEST_ERROR:.0e}; some layer mixes the records of a batch, or the model's gradient "
                    "is zero or not finite"
                )

    def _clipped_sum(
        self, model: nn.Module, loss_B: Loss, x_B: torch.Tensor, target_B: torch.Tensor, low: torch.dtype | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        given = model, loss_B, x_B, target_B, self.clip_norm, self.views
        with torch.autocast(x_B.device.type, enabled=False):
            if self._fast:
                try:
                    return bookkeeping.clipped_sum(*given, low)
                except NoRuleError as missing:
                    self._fast, self._no_rule = False, str(missing)
                    log.info("per-sample gradients by torch.func; there is no rule for %s", missing)
            try:
                return vectorised(*given)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                if not self._no_rule or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise PrivacyError(
                    f"there is no rule for {self._no_rule}, and torch.func cannot take this network either "
                    f"({str(error).splitlines()[0][:120]}); freeze that parameter or choose another network"
                ) from None

    def _release(self, sums: list[torch.Tensor]) -> None:
        scale = self.gradient_noise * self.clip_norm
        for parameter, total in zip(self._parameters, sums, strict=True):
            if scale:
                total.add_(self._noise.normal(total), alpha=scale)
            parameter.grad = total.div_(self.expected_batch)

    def _adapt(self, norms_P: torch.Tensor) -> None:
        """Moves the clip norm by a noised count; what is not finite counts as clipped."""
        if self.clip_quantile is None:
            return
        count = (norms_P <= self.clip_norm).double().sum() - len(norms_P) / 2
        if self.noise_multiplier:
            count = count + _COUNT_NOISE * self.noise_multiplier * self._noise.normal(count)
        share = min(max(float(count) / self.expected_batch + 0.5, 0.0), 1.0)
        self.clip_norm *= math.exp(-_CLIP_RATE * (share - self.clip_quantile))

    def _test_noise(self) -> None:
        if not self.noise_multiplier:
            return
        before = [parameter.grad for parameter in self._parameters]
        self._release([torch.zeros_like(parameter) for parameter in self._parameters])
        squares = sum(float(p.grad.double().square().sum()) for p in self._parameters if p.grad is not None)
        for parameter, grad in zip(self._parameters, before, strict=True):
            parameter.grad = grad
        count = sum(parameter.numel() for parameter in self._parameters)
        expected = (self.gradient_noise * self.clip_norm / self.expected_batch) ** 2
        # Mean of `count` squares has relative standard deviation sqrt(2 / count); the upper tail is heavier for few.
        allowed = 8 * math.sqrt(2 / count) + 60 / count
        share = squares / count / expected
        if not abs(share - 1) <= allowed or share == 0:
            raise PrivacyError(
                f"self-test: the noise has {share:.4f} of the variance that is accounted, expected 1 within "
                f"{allowed:.4f}; do not train with this noise source"
            )


def vectorised(
    model: nn.Module, loss_B: Loss, x_B: torch.Tensor, target_B: torch.Tensor, clip_norm: float, views: int = 1
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Clipped sum and norms by `torch.func`: right for every model that `vmap` takes; P gradients in memory."""
    parameters = {name: parameter.detach() for name, parameter in trainable(model).items()}

    def loss(weights: dict[str, torch.Tensor], x_V: torch.Tensor, target_V: torch.Tensor) -> torch.Tensor:
        return bookkeeping.per_record(loss_B(functional_call(model, weights, (x_V,)), target_V), views).mean()

    # different: every record has its own dropout
    per_patient = vmap(grad_and_value(loss), in_dims=(None, 0, 0), randomness="different")
    gradients, _ = per_patient(parameters, x_B.unflatten(0, (-1, views)), target_B.unflatten(0, (-1, views)))
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
    factors = clip_factors(squares, clip_norm)
    sums = [torch.tensordot(factors.patients, factors.of_patients(g), 1) for g in gradients.values()]
    return sums, squares.sqrt()


def loop(
    model: nn.Module, loss_B: Loss, x_B: torch.Tensor, target_B: torch.Tensor, clip_norm: float, views: int = 1
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Clipped sum and norms by one backward pass a patient: the reference, slow and plain."""
    parameters = list(trainable(model).values())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    norms = []
    for start in range(0, len(x_B), views):
        part = slice(start, start + views)
        losses = bookkeeping.per_record(loss_B(model(x_B[part]), target_B[part]), views)
        found = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
        gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        norm = torch.stack([g.detach().square().sum() for g in gradient]).sum().sqrt()
        norms.append(norm)
        if torch.isfinite(norm):
            factor = min(1.0, clip_norm / float(norm)) if norm > 0 else 1.0
            torch._foreach_add_(sums, gradient, alpha=factor)
    return sums, torch.stack(norms)


def _targets(x_B: torch.Tensor, like_B: torch.Tensor) -> torch.Tensor:
    """One made-up target a record: the first two classes, or ones and zeros, in turn."""
    places = torch.arange(like_B[:1].numel(), device=like_B.device)
    counted = torch.arange(len(x_B), device=like_B.device)[:, None] + places
    return (counted % 2).to(like_B.dtype).reshape(-1, *like_B.shape[1:])


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """L2 distance relative to b; NaN when b is zero or something is not finite."""
    with torch.no_grad():
        off = torch.stack([(x - y).double().square().sum() for x, y in zip(a, b, strict=True)]).sum()
        return float((off / torch.stack([y.double().square().sum() for y in b]).sum()).sqrt())


@contextmanager
def _buffers_unchanged(model: nn.Module) -> Iterator[None]:
    """Statistics that a layer keeps would leave the site without noise."""
    before = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
    yield
    for name, buffer in model.named_buffers():
        if name not in before or before[name][0] is not buffer or before[name][1] != buffer._version:
            raise PrivacyError(
                f"buffer {name!r} changed while private gradients were taken: its layer keeps statistics of patients "
                "that no noise covers; freeze the layer or replace it by group norm"
            )
