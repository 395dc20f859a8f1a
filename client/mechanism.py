"""Self-tests of the privacy mechanism that this installation trains with, for one recipe.

Everything is asked of the functions of `client.train` that a round calls: the engine, the draws, the noise. No patient
is needed: images are random numbers, for the promise must hold for all of them. Statistical checks share
`common.privacy_audit.FALSE_ALARM` among them (Bonferroni), and each names its share.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import nn

from client import train as work
from client.cohort import Cohort
from client.dp import PrivateGradient, Sampling, sampling, seeded_noise
from client.dp.bookkeeping import Loss, trainable
from client.dp.noise import Noise
from client.policy import solved
from common.accounting import Event, epsilon_pld, epsilon_prv, epsilon_rdp
from common.config import Recipe
from common.errors import FedicomError, PrivacyError
from common.models import build
from common.privacy_audit import FALSE_ALARM, Check
from common.samples import Samples

_IMAGES = (1, 2, 4, 8)
"""Images of the made-up patients, in turn: more of them must not mean more draws."""
_DRAWS = 60_000
"""Patients x steps that the sampling rate is measured on."""
_NUMBERS = 60_000
"""Noise numbers wanted for each size of batch."""
_EXACT = 1e-6
"""Largest relative difference in float64 from a loop over the records."""
_COUNTS = 150
"""Steps in which the noised count of an adaptive clip norm is watched."""
_BATCHES = (0, 1, 5)
_SHARE = FALSE_ALARM / 16
"""Of each statistical check: two a site, which beyond three sites share what three would have, and five more."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a site with so many training patients does in every round of the recipe."""

    sampling: Sampling
    noise_multiplier: float

    def gradient_noise(self, recipe: Recipe) -> float:
        """Of the sum of gradients: with an adaptive clip norm a noised count is released too, and both together are
        one mechanism of `noise_multiplier` (Andrew et al. 2021): 1 / z^2 = 1 / z_gradient^2 + (1/2)^2 / (2 z)^2."""
        adaptive = recipe.privacy.clip_quantile is not None
        return self.noise_multiplier * math.sqrt(16 / 15) if adaptive else self.noise_multiplier


def planned(recipe: Recipe, patients: int) -> Planned:
    """Rate, steps and noise as a site solves for them.

    Raises:
        PrivacyError: The recipe has no privacy, or no noise reaches its epsilon.
    """
    training = recipe.training
    if not recipe.privacy.active:
        raise PrivacyError("the recipe trains without privacy: there is no mechanism to audit; say privacy=dp_sgd")
    drawn = sampling(patients, training.batch_size, training.local_epochs)
    return Planned(sampling=drawn, noise_multiplier=solved(recipe, drawn))


def self_tests(
    recipe: Recipe, patients: Mapping[str, int], *, device: torch.device | None = None, seed: int = 0
) -> tuple[Check, ...]:
    """Tests noise, clipping, denominator, draws and secrecy of what would train this recipe here.

    Args:
        recipe: With privacy.
        patients: Site to its number of training patients; sampling and account are checked for each, the rest for
            the one with the least noise.
        seed: Of the made-up images. The noise is the site's own and has none.

    Returns:
        One check each; a mechanism that raises has failed that check.

    Raises:
        PrivacyError: The recipe has no privacy, or there is no site.
    """
    if not patients:
        raise PrivacyError("there is no site to audit; give a number of patients")
    plans = {name: planned(recipe, count) for name, count in patients.items()}
    plan = min(plans.values(), key=lambda each: each.noise_multiplier)
    bench = _Bench(recipe, plan, device or torch.device("cpu"), seed)
    checks: list[Check] = []
    for name, count in patients.items():
        share = _SHARE * min(1.0, 3 / len(patients))
        checks += _tried(f"account, {name}", partial(_account, recipe, plans[name], name))
        checks += _tried(f"sampling, {name}", partial(_draws, recipe, plans[name].sampling, count, name, share))
    checks += _tried("clipped sums", bench.sums)
    checks += _tried("noise", bench.noise)
    checks += _tried("noise of the clip norm's count", bench.count)
    checks += _tried("secrecy", bench.secrecy)
    return tuple(checks)


def _tried(name: str, test: Callable[[], list[Check]]) -> list[Check]:
    try:
        return test()
    except FedicomError as error:  # the engine's own self-test, perhaps: it says what is wrong
        return [Check(name=name, passed=False, found=str(error)[:400], expected="no refusal by the mechanism itself")]


def _account(recipe: Recipe, plan: Planned, site: str) -> list[Check]:
    """The solved noise, counted forwards again over all rounds."""
    delta = recipe.privacy.delta
    assert delta is not None
    event = Event(
        noise_multiplier=plan.noise_multiplier, sampling_rate=plan.sampling.rate,
        steps=plan.sampling.steps * recipe.rounds,
    )  # fmt: skip
    pld, prv, rdp = (count([event], delta) for count in (epsilon_pld, epsilon_prv, epsilon_rdp))
    wanted = recipe.privacy.epsilon
    # PRV is an upper end with an error of 0.01; RDP is looser, never tighter
    agrees = abs(pld - prv) <= 0.02 + 0.01 * pld and rdp >= pld * (1 - 1e-3)
    check = Check(
        name=f"account, {site}",
        passed=agrees and (wanted is None or pld <= wanted),
        found=f"epsilon {pld:.3f} by PLD, {prv:.3f} by PRV, {rdp:.3f} by RDP; noise {plan.noise_multiplier:.4g}, "
        f"rate {plan.sampling.rate:.4g}, {event.steps} steps",
        expected=("" if wanted is None else f"at most {wanted:g}, ") + "PLD and PRV within 1 %, RDP above",
    )
    return [check]


def _draws(recipe: Recipe, drawn: Sampling, patients: int, site: str, share: float) -> list[Check]:
    """Whom the real sampler draws, over many steps, from patients with one to eight images."""
    cohort = _made_up(recipe, patients)
    steps = max(200, min(20_000, _DRAWS // patients))
    rng = np.random.default_rng(0)
    private = work.Private(
        sampling=replace(drawn, steps=steps), noise_multiplier=1.0, noise=work.site_noise(recipe, 1, site)
    )
    patient_N = cohort.samples.patient_N
    counts_P = np.zeros(patients, np.int64)
    sizes, twice, happened = np.zeros(steps, np.int64), 0, 0
    views = recipe.privacy.views
    for at, index in enumerate(work.private_batches(cohort, private, rng, views)):
        rows = index.reshape(-1, views)
        mixed = int((patient_N[rows] != patient_N[rows[:, :1]]).sum())  # views of a row are of one patient
        who, times = np.unique(patient_N[rows[:, 0]], return_counts=True)
        twice += int((times > 1).sum()) + mixed
        counts_P[who] += times
        if at < steps:
            sizes[at] = len(rows)
        happened += 1
    checks = [
        Check(
            name=f"one draw a patient, {site}",
            passed=twice == 0,
            found=f"{twice} patients were drawn more than once in a step, in {steps} steps",
            expected="0: a patient with several images is one patient",
        ),
        Check(
            name=f"number of steps, {site}",
            passed=happened == steps,
            found=f"{happened} steps were drawn",
            expected=f"{steps}, as accounted",
        ),
    ]
    groups = {f"{images} image{'s' * (images > 1)}": counts_P[k :: len(_IMAGES)] for k, images in enumerate(_IMAGES)}
    worst, wrong = "", False
    for name, found in {"all": counts_P, **groups}.items():
        trials = len(found) * steps
        if not trials:
            continue
        low, high = stats.binom.interval(1 - share / 5, trials, drawn.rate)
        inside = low <= found.sum() <= high
        if not inside or not worst:
            worst = f"{found.sum() / trials:.5f} of patients with {name} (interval {low / trials:.5f} to "
            worst += f"{high / trials:.5f}, {trials} draws)"
        wrong = wrong or not inside
    worst = worst.replace("patients with all", "all patients")
    checks.append(
        Check(
            name=f"sampling rate, {site}",
            passed=not wrong,
            found=worst,
            expected=f"{drawn.rate:.5f}, whatever the number of images",
            false_alarm=share,
        )
    )
    if drawn.rate < 1:
        checks.append(_independent(sizes, patients, drawn.rate, site, share))
    return checks


def _independent(sizes: npt.NDArray[np.int64], patients: int, rate: float, site: str, share: float) -> Check:
    """Batches of Poisson sampling vary like a binomial number; batches of fixed size do not, and cost more epsilon."""
    variance = patients * rate * (1 - rate)
    fourth = variance * (1 + 3 * variance - 6 * rate * (1 - rate))  # central moment of the binomial
    squares = float(((sizes - patients * rate) ** 2).mean())
    allowed = float(stats.norm.isf(share / 2)) * math.sqrt((fourth - variance**2) / len(sizes))
    return Check(
        name=f"independent draws, {site}",
        passed=abs(squares - variance) <= 1.1 * allowed,  # a tenth more: the mean of squares is not quite normal
        found=f"batches vary with variance {squares:.3f}",
        expected=f"{variance:.3f} within {1.1 * allowed:.3f} (binomial)",
        false_alarm=share,
    )


class _Bench:
    """The recipe's network under the recipe's engine, with made-up images."""

    def __init__(self, recipe: Recipe, plan: Planned, device: torch.device, seed: int) -> None:
        self.recipe, self.plan, self.device = recipe, plan, device
        self.rng = torch.Generator().manual_seed(seed)
        self.loss = work.record_loss(recipe)
        self.size = sum(p.numel() for p in trainable(build(recipe)).values())

    # Clipping and denominator, exactly

    def sums(self) -> list[Check]:
        """Without noise, in float64: the release is the clipped sum of a loop over patients, over the batch size."""
        model = build(self.recipe).double().to(self.device).eval()
        batch, clip = self.recipe.training.batch_size, self.recipe.privacy.clip_norm
        views = self.recipe.privacy.views
        x, target = self._records(max(_BATCHES), torch.float64)
        parts = [slice(at, at + views) for at in range(0, len(x), views)]
        raw = [_alone(model, self.loss, x[part], target[part]) for part in parts]
        norms = [float(gradient.norm()) for gradient in raw]
        if not all(0 < norm < math.inf for norm in norms):
            raise PrivacyError("the network's gradient is zero or not finite on random images; nothing can be tested")
        largest, off, denominators = 0.0, 0.0, []
        # Every record far above the clip norm, about half of them above, all of them below
        for scale in (10 * clip / min(norms), clip / sorted(norms)[len(norms) // 2], 0.5 * clip / max(norms)):
            scaled = _times(self.loss, scale)
            for physical in (2, self.recipe.privacy.physical_batch):
                for count in (n for n in _BATCHES if n):
                    till = count * views
                    found = self._released(model, scaled, x[:till], target[:till], physical)
                    wanted = _clipped_sum(raw[:count], scale, clip)
                    share = float(found @ wanted / (wanted @ wanted))
                    denominators.append(share * batch)
                    off = max(off, float((found * batch - wanted).norm() / wanted.norm()))
                    more = self._released(model, scaled, x[views:till], target[views:till], physical)
                    largest = max(largest, float((found - more).norm()) * batch / clip)
        poisoned = x[: 2 * views].clone()
        poisoned[0].fill_(float("nan"))
        found = self._released(model, _times(self.loss, 10 * clip / min(norms)), poisoned, target[: 2 * views], 64)
        nan_norm = float(found.norm()) * batch / clip
        divided = dict.fromkeys(f"{batch / share:.6g}" for share in (max(denominators), min(denominators)))
        return [
            Check(
                name="sensitivity to one patient",
                passed=largest <= 1 + _EXACT and nan_norm <= 1 + _EXACT,
                found=f"one patient more moved the sum by up to {largest:.6f} clip norms"
                + ("" if nan_norm <= 1 + _EXACT else f", one with NaN voxels by {nan_norm}"),
                expected="at most 1, at every size of gradient, NaN voxels included",
            ),
            Check(
                name="clipped sums against a loop over patients",
                passed=off <= _EXACT,
                found=f"relative difference up to {off:.1e} (float64)",
                expected=f"at most {_EXACT:.0e}",
            ),
            Check(
                name="fixed denominator",
                passed=all(abs(share - 1) <= _EXACT for share in denominators),
                found=f"sums were divided by {' to '.join(divided)}",
                expected=f"{batch}, however many were drawn",
            ),
        ]

    def _released(
        self, model: nn.Module, loss: Loss, x: torch.Tensor, target: torch.Tensor, physical: int
    ) -> torch.Tensor:
        recipe = replace(self.recipe, privacy=replace(self.recipe.privacy, physical_batch=physical))
        private = work.Private(sampling=self.plan.sampling, noise_multiplier=0.0, noise=work.site_noise(recipe, 1, "a"))
        work.private_gradient(model, loss, recipe, private).step(x, target)
        return _flat(model)

    # Noise

    def noise(self) -> list[Check]:
        """Two steps on the same patients differ by the noise alone: its size, parameter by parameter, and its shape."""
        model = build(self.recipe).to(self.device).train()
        names, sizes = zip(*((name, p.numel()) for name, p in trainable(model).items()), strict=True)
        repeats = max(1, min(50, math.ceil(_NUMBERS / self.size)))
        x, target = self._records(max(_BATCHES), torch.float32)
        worst: tuple[float, str] = (0.0, "")
        totals, all_z = {}, []
        share = _SHARE / (len(_BATCHES) * len(names))
        for batch in _BATCHES:
            till = batch * self.recipe.privacy.views
            z = torch.stack([self._noise(model, x[:till], target[:till]) for _ in range(repeats)])
            totals[batch] = float(z.square().mean())
            all_z.append(z.flatten().cpu().numpy())
            for name, part in zip(names, z.split(list(sizes), dim=1), strict=True):
                low, high = stats.chi2.interval(1 - share, part.numel())
                squares = float(part.double().square().sum())
                beyond = max(low / max(squares, 1e-300), squares / high)
                if beyond > worst[0]:
                    ratio = squares / part.numel()
                    span = f"{low / part.numel():.3f} to {high / part.numel():.3f}"
                    worst = (beyond, f"; {name} with {batch} patients {ratio:.4f} ({span})")
        numbers = np.concatenate(all_z)
        sample = np.random.default_rng(0).choice(numbers, min(len(numbers), 50_000), replace=False)
        p_value = float(stats.kstest(sample, "norm").pvalue)
        said = ", ".join(f"{totals[batch]:.4f} with {batch}" for batch in _BATCHES)
        return [
            Check(
                name="noise variance",
                passed=worst[0] <= 1,
                found=f"{said} patients drawn{worst[1] if worst[0] > 1 else ''}",
                expected=f"1 (in units of what is accounted) in each of {len(names)} parameters, chi-square",
                false_alarm=_SHARE,
            ),
            Check(
                name="noise is Gaussian",
                passed=p_value >= _SHARE,
                found=f"Kolmogorov-Smirnov p = {p_value:.3g} over {len(sample)} numbers",
                expected=f"p of at least {_SHARE:.0e}",
                false_alarm=_SHARE,
            ),
        ]

    def _noise(self, model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Standard normal numbers, if the engine is right: the difference of two steps, in units of the noise."""
        noise = self.plan.gradient_noise(self.recipe)
        unit = noise * self.recipe.privacy.clip_norm / self.recipe.training.batch_size
        released, source = [], work.site_noise(self.recipe, 1, "a")
        with _world(11):
            for _ in range(2):
                engine = self._engine(model, source)  # a new one: the clip norm may move at every step
                _seed_all(11)  # both steps have the same dropout
                engine.step(x, target)
                released.append(_flat(model).double() / unit)
        return (released[0] - released[1]).float() / math.sqrt(2)

    def count(self) -> list[Check]:
        """An adaptive clip norm moves by a noised count of patients; the noise shows where nobody was drawn."""
        quantile, z = self.recipe.privacy.clip_quantile, self.plan.noise_multiplier
        if quantile is None:
            return []
        batch = math.ceil(40 * z)  # so that hardly a count is cut off at the ends
        recipe = replace(self.recipe, training=replace(self.recipe.training, batch_size=batch))
        private = work.Private(
            sampling=self.plan.sampling, noise_multiplier=z, noise=work.site_noise(recipe, 1, "a")
        )  # fmt: skip
        engine = work.private_gradient(build(recipe).to(self.device), self.loss, recipe, private)
        x, target = self._records(1, torch.float32)
        norms = [engine.clip_norm]
        for _ in range(_COUNTS):
            engine.step(x[:0], target[:0])
            norms.append(engine.clip_norm)
        moved = -np.diff(np.log(norms)) / 0.2 + quantile - 0.5  # the count over the batch, when nobody was drawn
        squares = float(((moved * batch / (2 * z)) ** 2).sum())
        low, high = stats.chi2.interval(1 - _SHARE, _COUNTS)
        return [
            Check(
                name="noise of the clip norm's count",
                passed=bool(low <= squares <= high),
                found=f"variance {squares / _COUNTS:.3f} over {_COUNTS} steps",
                expected=f"1 (in units of what is accounted) within {low / _COUNTS:.3f} to {high / _COUNTS:.3f}",
                false_alarm=_SHARE,
            )
        ]

    # Secrecy

    def secrecy(self) -> list[Check]:
        """Equal recipes, rounds, sites and seeds: nothing but the noise may differ, and it must."""
        checks = [self._secret_noise()]
        if self.plan.sampling.rate < 1:
            checks.append(self._secret_draws())
        return [*checks, self._secret_images()]

    def _secret_noise(self) -> Check:
        recipe = self.recipe
        made = [work.site_noise(recipe, 1, "a") for _ in range(2)]
        with _world(recipe.seed):
            mine = []
            for source in made:
                _seed_all(recipe.seed)
                mine.append(self._alone(source))
            twin, later = self._alone(work.site_noise(recipe, 1, "a")), self._alone(made[0])
        others = {
            "the same site asked again": mine[1],
            "the next step": later,
            "the next round": self._alone(work.site_noise(recipe, 2, "a")),
            "another object": twin,
        }
        guesses: dict[str, Noise] = {f"seed {recipe.seed}": seeded_noise(recipe.seed)} | {
            f"the seed of {purpose!r}": seeded_noise(work.seed_of(purpose, recipe, 1, "a"))
            for purpose in ("noise", "train")
        }
        others |= {f"noise from {name}": self._alone(source) for name, source in guesses.items()}
        with _world(recipe.seed):
            others["torch.manual_seed(recipe seed)"] = torch.randn(self.size).to(mine[0])
        found = {name: _correlation(mine[0], other) for name, other in others.items()}
        allowed = float(stats.norm.isf(_SHARE / (2 * len(found)))) / math.sqrt(self.size)
        name, worst = max(found.items(), key=lambda item: abs(item[1]))
        secret = all(source.secret for source in made)
        return Check(
            name="noise is secret and fresh",
            passed=abs(worst) <= allowed and secret,
            found=f"largest correlation {worst:.4f}, with {name}"
            + ("" if secret else "; the source says that its seed is known"),
            expected=f"at most {allowed:.4f} with {len(found)} others, made from all that a server knows",
            false_alarm=_SHARE,
        )

    def _secret_draws(self) -> Check:
        recipe, rate = self.recipe, self.plan.sampling.rate
        cohort, drawn = _made_up(recipe, 100), []
        for _ in range(2):
            private = self._private(Sampling(rate=rate, steps=max(4, math.ceil(0.4 / (rate * (1 - rate))))))
            with _world(recipe.seed):
                rng = np.random.default_rng(recipe.seed)
                batches = work.private_batches(cohort, private, rng, recipe.privacy.views)
                drawn.append([tuple(cohort.samples.patient_N[index].ravel().tolist()) for index in batches])
        others = drawn[0] != drawn[1]
        return Check(
            name="draws are secret",
            passed=others,
            found=f"equal seeds gave {'other' if others else 'equal'} patients",
            expected="other patients: who is in a step is part of what hides them",
            false_alarm=1e-9,
        )

    def _secret_images(self) -> Check:
        recipe, seeds = self.recipe, []
        for _ in range(2):
            private = self._private(self.plan.sampling)
            with _world(recipe.seed):
                model = build(recipe).train()
                course = work.Course(
                    model, _made_up(recipe, 1), recipe, round_=1, site="a", device=self.device, private=private
                )  # fmt: skip
                seeds.append(course.dropout_seed)
        others = seeds[0] != seeds[1]
        return Check(
            name="images and their changes are secret",
            passed=others,
            found=f"equal seeds gave {'another' if others else 'an equal'} stream of images, augmentation and dropout",
            expected="another stream: with a known one, one patient more would change what all others give",
            false_alarm=1e-9,
        )

    def _private(self, sampling: Sampling) -> work.Private:
        """As a round has it, with fresh noise."""
        noise = work.site_noise(self.recipe, 1, "a")
        return work.Private(sampling=sampling, noise_multiplier=self.plan.noise_multiplier, noise=noise)

    def _alone(self, source: Noise) -> torch.Tensor:
        """One noise vector as the engine releases it when nobody was drawn."""
        model = build(self.recipe).to(self.device)
        x, target = self._records(1, torch.float32)
        self._engine(model, source).step(x[:0], target[:0])
        return _flat(model).double()

    def _engine(self, model: nn.Module, source: Noise) -> PrivateGradient:
        private = work.Private(sampling=self.plan.sampling, noise_multiplier=self.plan.noise_multiplier, noise=source)
        return work.private_gradient(model, self.loss, self.recipe, private)

    def _records(self, patients: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of so many patients, those of a patient together, with targets."""
        count = patients * self.recipe.privacy.views
        x = torch.randn((count, 1, *self.recipe.data.size), generator=self.rng, dtype=dtype).to(self.device)
        classes = self.recipe.task.outputs
        if self.recipe.task.kind == "multilabel":
            target = torch.randint(0, 2, (count, classes), generator=self.rng).to(dtype)
        else:
            target = torch.randint(0, classes, (count,), generator=self.rng)
        return x, target.to(self.device)


def _made_up(recipe: Recipe, patients: int) -> Cohort:
    """Training patients with 1, 2, 4, 8, 1, ... images; the pixels take no memory."""
    patient_N = np.repeat(np.arange(patients), [_IMAGES[p % len(_IMAGES)] for p in range(patients)])
    x_N = np.broadcast_to(np.float32(0), (len(patient_N), 1, *recipe.data.size))
    targets_N = (patient_N % recipe.task.outputs).astype(np.int64)
    names = tuple(f"p{p}" for p in range(patients))
    samples = Samples(x_N, targets_N, patient_N, names, {}, "")
    return Cohort(samples, np.full(patients, "train"), "", {}, recipe.task.outputs)


def _times(loss: Loss, scale: float) -> Loss:
    return lambda output, target: scale * loss(output, target)


def _alone(model: nn.Module, loss: Loss, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """One patient's gradient, the mean over the images, by plain autograd; flat."""
    parameters = list(trainable(model).values())
    found = torch.autograd.grad(loss(model(x), target).mean(), parameters, allow_unused=True)
    return torch.cat([
        (torch.zeros_like(p) if g is None else g.detach()).flatten() for p, g in zip(parameters, found, strict=True)
    ])  # fmt: skip


def _clipped_sum(raw: list[torch.Tensor], scale: float, clip: float) -> torch.Tensor:
    total = torch.zeros_like(raw[0])
    for gradient in raw:
        scaled = scale * gradient
        total += scaled * min(1.0, clip / float(scaled.norm()))
    return total


def _flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainable(model).values() if p.grad is not None])


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()).clamp(min=1e-300))


def _seed_all(seed: int) -> None:
    """Every generator that somebody outside could have set."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the very global state that must not matter
    random.seed(seed)


@contextmanager
def _world(seed: int) -> Iterator[None]:
    """Global generators are set inside and put back after."""
    before, python = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng():
        _seed_all(seed)
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002
            random.setstate(python)
