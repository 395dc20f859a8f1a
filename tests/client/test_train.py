"""A round's work: schedule, losses, gradients and their bounds, against torch and numbers done by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from client import train as module
from client.cohort import Cohort
from client.dp import Noise, Sampling, keystream_noise, os_noise, seeded_noise
from client.train import Private, record_loss, train
from common import wire
from common.config import Augmentation, ModelConfig, Preprocessing, Privacy, Recipe, Task, Training
from common.errors import TrainingError
from common.exchange import RoundPlan, Update
from common.models import build, get_weights, parameter_groups, set_weights
from common.samples import Samples
from common.weights import Weights

CPU = torch.device("cpu")
SGD = Training(optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", batch_size=64)


def recipe_of(training: Training = SGD, *, norm: str = "group", **parts: object) -> Recipe:
    given = {
        "name": "tiny",
        "seed": 3,
        "rounds": 4,
        "data": Preprocessing(size=(16, 16)),
        "model": ModelConfig(family="monai", name="resnet10", width=0.125, stem="small", norm=norm),  # type: ignore[arg-type]
        "training": training,
    }
    return Recipe(**(given | parts))  # type: ignore[arg-type]


def cohort_of(patients: int = 12, images: int = 1, classes: int = 2) -> Cohort:
    """The first `patients` of an endless list: the same patient has the same images in every cohort."""
    count = patients * images
    patient_N = np.repeat(np.arange(patients), images)
    targets_N = (patient_N % classes).astype(np.int64)
    x_N = np.stack([np.random.default_rng([5, n]).normal(size=(1, 16, 16)) for n in range(count)]).astype(np.float32)
    x_N[:, :, 4:9, 4:9] += 2.0 * targets_N[:, None, None, None]
    names = tuple(f"p{n}" for n in range(patients))
    return Cohort(Samples(x_N, targets_N, patient_N, names, {}, ""), np.full(patients, "train"), "", {}, classes)


def go(recipe: Recipe, cohort: Cohort, *, round_: int = 1, site: str = "north", private: Private | None = None):
    model = build(recipe)
    return train(
        model, get_weights(build(recipe)), cohort, recipe, round_=round_, site=site, device=CPU, private=private
    )


def flat(weights: Weights) -> np.ndarray:
    return np.concatenate([array.ravel() for array in weights.values()]).astype(np.float64)


# Determinism


def test_the_same_round_gives_the_same_bits_and_every_other_round_site_and_seed_differs() -> None:
    plain = recipe_of(Training(batch_size=4), norm="batch", data=Preprocessing(size=(16, 16), augmentation=NOISY))
    cohort = cohort_of()
    torch.manual_seed(1)
    first = go(plain, cohort).delta.digest
    torch.manual_seed(2)  # the global generator must not matter
    assert go(plain, cohort).delta.digest == first
    start = get_weights(build(plain))

    def at(recipe: Recipe, round_: int, site: str) -> str:
        model = build(recipe)
        return train(model, start, cohort, recipe, round_=round_, site=site, device=CPU).delta.digest

    assert len({first, at(plain, 2, "north"), at(plain, 1, "south"), at(replace(plain, seed=4), 1, "north")}) == 4


def test_training_leaves_the_global_generator_of_torch_where_it_was() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    go(recipe_of(), cohort_of(6))
    assert torch.equal(torch.rand(3), expected)


def test_what_the_model_held_before_does_not_matter() -> None:
    recipe, cohort = recipe_of(norm="batch"), cohort_of(6)
    fresh, used = build(recipe), build(recipe)
    start = get_weights(fresh)
    train(used, start, cohort_of(8), recipe, round_=1, site="south", device=CPU)
    digests = {train(m, start, cohort, recipe, round_=2, site="north", device=CPU).delta.digest for m in (fresh, used)}
    assert len(digests) == 1


# Schedule


def test_warm_up_rises_in_a_line_and_the_cosine_ends_at_its_floor() -> None:
    training = Training(schedule="cosine", warmup_rounds=2, min_lr_fraction=0.1)
    found = [module.rate(training, progress, 10) for progress in (0.0, 0.05, 0.1, 0.2, 0.6, 1.0)]
    # a fifth of ten rounds is warm-up: 0.05 / 0.2 = 1/4; the middle of the rest has cos(pi / 2) = 0: (1 + 0.1) / 2
    assert found == pytest.approx([1e-3, 0.25, 0.5, 1.0, 0.55, 0.1])


def test_a_warm_restart_begins_at_the_full_rate_again() -> None:
    training = Training(schedule="cosine", restarts=1, min_lr_fraction=0.0)
    found = [module.rate(training, progress, 10) for progress in (0.0, 0.25, 0.4999999, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([1.0, 0.5, 0.0, 1.0, 0.5, 0.0], abs=1e-6)


def test_a_constant_rate_is_constant_after_warm_up_and_warm_up_may_fill_the_whole_run() -> None:
    assert [module.rate(Training(schedule="constant"), p, 3) for p in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert module.rate(Training(warmup_rounds=9), 0.5, 3) == 0.5


def test_rounds_continue_one_schedule_and_do_not_start_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    real = module.rate
    monkeypatch.setattr(module, "rate", lambda t, p, r: seen.append(p) or real(t, p, r))
    recipe = recipe_of(replace(SGD, batch_size=4), rounds=2)
    for round_ in (1, 2):
        go(recipe, cohort_of(8), round_=round_)
    assert seen == pytest.approx([0.0, 0.25, 0.5, 0.75])  # two steps a round, two rounds


# Losses


def test_focal_loss_of_one_record_by_hand_and_of_many_labels_as_torchvision() -> None:
    training = Training(loss="focal", focal_gamma=2.0)
    logits = torch.tensor([[0.0, math.log(3.0)]])  # softmax: 1/4, 3/4
    assert record_loss(recipe_of(training))(logits, torch.tensor([1])).item() == pytest.approx(-math.log(0.75) / 16)

    from common.timm_shim import ensure_light_timm

    ensure_light_timm()
    from torchvision.ops import sigmoid_focal_loss

    many = recipe_of(training, task=Task(kind="multilabel", classes=("a", "b", "c")))
    x, y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.eye(5, 3)
    expected = sigmoid_focal_loss(x, y, alpha=-1, gamma=2.0, reduction="none").mean(1)
    torch.testing.assert_close(record_loss(many)(x, y), expected)


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_a_focal_exponent_below_one_has_a_gradient_where_a_record_is_told_for_sure(kind: str) -> None:
    recipe = recipe_of(Training(loss="focal", focal_gamma=0.5), task=Task(kind=kind))  # type: ignore[arg-type]
    logits = torch.tensor([[-30.0, 30.0]], requires_grad=True)  # 1 - p is 1e-26, and 0 in float32
    target = torch.tensor([[0.0, 1.0]]) if kind == "multilabel" else torch.tensor([1])
    record_loss(recipe)(logits, target).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


def test_smoothing_and_fixed_class_weights_are_those_of_torch_record_by_record() -> None:
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    smooth = record_loss(recipe_of(Training(label_smoothing=0.2)))(x, y)
    torch.testing.assert_close(smooth, nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none")(x, y))
    weighted = record_loss(recipe_of(Training(class_weights=(1.0, 3.0))))(x, y)
    torch.testing.assert_close(weighted, nn.CrossEntropyLoss(torch.tensor([1.0, 3.0]), reduction="none")(x, y))


def test_balanced_class_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    cohort = cohort_of(9, classes=2)  # five of class 0, four of class 1
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=cohort.samples.targets_N)
    loss = record_loss(recipe_of(Training(class_weights="balanced")), cohort)
    found = loss(torch.zeros(2, 2), torch.tensor([0, 1])) / math.log(2)
    assert found.numpy() == pytest.approx(expected)


def test_a_finding_that_nobody_has_does_not_drown_the_others_when_classes_are_balanced() -> None:
    cohort = cohort_of(9, classes=2)
    targets_NC = np.zeros((9, 3), np.float32)
    targets_NC[:6, 0] = targets_NC[:2, 1] = 1  # 6, 2 and none of 8 findings
    cohort = replace(cohort, samples=replace(cohort.samples, targets_N=targets_NC))
    task = Task(kind="multilabel", classes=("a", "b", "c"))
    weight_C = module.class_weights(recipe_of(Training(class_weights="balanced"), task=task), cohort)
    assert weight_C is not None
    assert weight_C.tolist() == pytest.approx([8 / 18, 8 / 6, 1.0])


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_another_record_in_the_batch_changes_no_loss(kind: str, loss: str) -> None:
    recipe = recipe_of(Training(loss=loss, class_weights=(1.0, 5.0)), task=Task(kind=kind))  # type: ignore[arg-type]
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(2))
    y = torch.eye(4, 2) if kind == "multilabel" else torch.tensor([1, 0, 1, 1])
    f = record_loss(recipe)
    assert torch.equal(f(x, y)[:3], f(x[:3], y[:3]))


# Gradients


def test_fedprox_is_the_gradient_of_the_penalised_loss() -> None:
    mu, steps = 0.5, 3
    recipe, cohort = recipe_of(replace(SGD, proximal_mu=mu, local_epochs=float(steps))), cohort_of(8)
    trained = go(recipe, cohort)
    model = build(recipe)
    anchor = [value.detach().clone() for value in model.parameters()]
    x, y = torch.from_numpy(cohort.samples.x_N), torch.from_numpy(cohort.samples.targets_N)
    for _ in range(steps):
        penalty = sum(((w - a) ** 2).sum() for w, a in zip(model.parameters(), anchor, strict=True))
        loss = nn.functional.cross_entropy(model(x), y) + mu / 2 * penalty
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for value in model.parameters():
                value -= SGD.lr * value.grad
    expected = get_weights(model) - get_weights(build(recipe))
    assert flat(trained.delta) == pytest.approx(flat(expected), abs=2e-5)
    without = go(recipe_of(replace(SGD, local_epochs=float(steps))), cohort)
    assert abs(flat(without.delta) - flat(expected)).max() > 1e-3  # the term is not nothing


def test_a_clipped_gradient_moves_the_weights_by_rate_times_clip() -> None:
    trained = go(recipe_of(replace(SGD, gradient_clip=0.01)), cohort_of())
    assert trained.steps == 1
    assert trained.delta.norm == pytest.approx(0.1 * 0.01, rel=1e-4)


def test_layers_learn_at_their_own_rates() -> None:
    cohort, even = cohort_of(), recipe_of()
    decayed = recipe_of(replace(SGD, layer_lr_decay=0.5))
    a, b = go(even, cohort).delta, go(decayed, cohort).delta
    model = build(decayed)
    scale = {id(p): g["lr_scale"] for g in parameter_groups(model, decayed.training) for p in g["params"]}
    of = {name: scale[id(value)] for name, value in model.named_parameters()}
    assert of["fc.weight"] == 1.0
    assert of["conv1.weight"] < 0.2
    for name, factor in of.items():
        assert b[name] == pytest.approx(factor * a[name], rel=1e-4, abs=1e-6), name


def test_a_frozen_backbone_stays_and_only_the_head_travels(tmp_path: Path) -> None:
    import hashlib

    plain = recipe_of(norm="batch")
    file = tmp_path / "start.safetensors"
    save_file({k: v.contiguous() for k, v in build(plain).state_dict().items()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    recipe = replace(
        plain, model=replace(plain.model, norm="auto", trainable="head", weights_file=str(file), weights_sha256=digest)
    )
    model = build(recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = train(model, get_weights(model), cohort_of(), recipe, round_=1, site="north", device=CPU)
    assert set(trained.delta) == {"fc.weight", "fc.bias"}
    assert trained.delta.norm > 0
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}  # no running mean either
    # Out and back, as bytes: the head and a few words.
    plan = RoundPlan(recipe_id=recipe.id, round=1, work="train", weights=get_weights(model), audit_head="")
    update = Update(site="north", recipe_id=recipe.id, round=1, base="0" * 64, delta=trained.delta, weight=1.0, steps=1)
    for message in (plan, update):
        assert 0 < len(wire.to_bytes(wire.encode(message))) - 4 * model.fc.weight.numel() < 1_000
    assert sum(value.nbytes for value in before.values()) > 300_000


@pytest.mark.parametrize("trainable", ["head", "norm_bias", "lora"])
def test_over_a_frozen_backbone_only_what_is_trained_gets_noise_and_travels(tmp_path: Path, trainable: str) -> None:
    import hashlib

    plain = recipe_of(norm="batch")
    file = tmp_path / "start.safetensors"
    save_file({k: v.contiguous() for k, v in build(plain).state_dict().items()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    start = replace(plain.model, norm="auto", trainable=trainable, weights_file=str(file), weights_sha256=digest)  # type: ignore[arg-type]
    recipe = replace(dp(), model=start)
    model = build(recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = train(
        model, get_weights(model), cohort_of(), recipe, round_=1, site="north", device=CPU, private=private(12, sigma=1)
    )
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(trained.delta)
    assert changed == {name for name, value in model.named_parameters() if value.requires_grad}
    assert any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()
    )  # its fixed statistics mix nobody


@pytest.mark.parametrize(("samples", "batch"), [(3, 2), (5, 2), (9, 8), (33, 32), (4, 1), (2, 32), (7, 3)])
def test_no_batch_of_one_reaches_a_batch_norm_and_every_sample_is_seen_once(samples: int, batch: int) -> None:
    cohort = cohort_of(samples)
    steps, batches = module._epochs(cohort, Training(batch_size=batch), np.random.default_rng(0), at_least=2)
    parts = list(batches)
    assert len(parts) == steps
    assert min(map(len, parts)) >= 2
    assert max(map(len, parts)) <= max(batch, 2) + 1
    assert sorted(np.concatenate(parts)) == list(range(samples))


def test_a_batch_norm_network_with_an_odd_number_of_samples_sees_no_single_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = module._batch
    monkeypatch.setattr(module, "_batch", lambda c, x, index_B, d: sizes.append(len(index_B)) or real(c, x, index_B, d))
    assert go(recipe_of(replace(SGD, batch_size=2), norm="batch"), cohort_of(5)).delta.finite
    assert sorted(sizes) == [2, 3]


def test_a_group_norm_network_may_take_one_sample_a_step() -> None:
    assert go(recipe_of(replace(SGD, batch_size=1)), cohort_of(5)).steps == 5


def test_half_an_epoch_is_half_the_steps() -> None:
    assert go(recipe_of(replace(SGD, batch_size=2, local_epochs=0.5)), cohort_of(8)).steps == 2


def test_a_learning_rate_that_explodes_is_an_error_and_no_update() -> None:
    with pytest.raises(TrainingError, match=r"round 1: .* not finite after .* steps; lower training.lr"):
        go(recipe_of(replace(SGD, lr=1e30, local_epochs=4.0)), cohort_of(6))


def test_training_learns_to_tell_two_classes_apart() -> None:
    recipe, cohort = recipe_of(Training(lr=0.01, batch_size=8, local_epochs=6.0, schedule="constant")), cohort_of(24)
    trained = go(recipe, cohort)
    model = build(recipe).eval()
    x, y = torch.from_numpy(cohort.samples.x_N), torch.from_numpy(cohort.samples.targets_N)
    loss = nn.CrossEntropyLoss()
    with torch.no_grad():
        before = loss(model(x), y).item()
        set_weights(model, get_weights(build(recipe)) + trained.delta)
        assert loss(model(x), y).item() < 0.5 * before
    assert trained.loss is not None
    assert trained.loss < before


# Augmentation

NOISY = Augmentation(probability=1.0, noise_std=0.5)


def test_augmentation_changes_what_is_trained_on_and_not_the_samples() -> None:
    cohort = cohort_of(6)
    before = cohort.samples.x_N.copy()
    plain = recipe_of()
    noisy = replace(plain, data=replace(plain.data, augmentation=NOISY))
    assert go(plain, cohort).delta.digest != go(noisy, cohort).delta.digest
    assert np.array_equal(cohort.samples.x_N, before)


# Privacy


def private(patients: int, *, steps: int = 1, sigma: float = 0.0, rate: float = 1.0, seed: int = 0) -> Private:
    return Private(sampling=Sampling(rate=rate, steps=steps), noise_multiplier=sigma, noise=seeded_noise(seed))


def dp(clip: float = 0.5, batch: int = 4, **training: object) -> Recipe:
    privacy = Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-5, clip_norm=clip)
    return recipe_of(replace(SGD, lr=1.0, batch_size=batch, **training), norm="auto", privacy=privacy)  # type: ignore[arg-type]


def test_one_patient_more_moves_the_step_by_at_most_clip_over_batch_however_many_images_it_has() -> None:
    clip, batch = 0.05, 4
    recipe = dp(clip, batch)
    with_, without = cohort_of(7, images=6), cohort_of(6, images=6)
    moved = (go(recipe, with_, private=private(7)).delta - go(recipe, without, private=private(6)).delta).norm
    # its gradient is longer than the clip, so the bound is met, not only kept
    assert moved == pytest.approx(clip / batch, rel=1e-3)


def test_a_step_draws_one_image_of_each_patient() -> None:
    cohort = cohort_of(10, images=4)
    drawn = list(module.private_batches(cohort, private(10, steps=40, rate=0.5), np.random.default_rng(0)))
    assert len(drawn) == 40
    for index_B in drawn:
        patients = cohort.samples.patient_N[index_B]
        assert len(set(patients)) == len(patients)
    assert len(set(np.concatenate(drawn))) == 40  # every image comes up
    assert 4 < np.mean([len(index_B) for index_B in drawn]) < 6  # half of ten


def test_views_are_different_images_of_one_patient_and_repeat_evenly_when_there_are_too_few() -> None:
    cohort = cohort_of(10, images=4)
    for views, each in ((3, {1}), (8, {2}), (6, {1, 2})):
        for index_B in module.private_batches(cohort, private(10, steps=5, rate=0.5), np.random.default_rng(0), views):
            for index_V in index_B.reshape(-1, views):
                assert len(set(cohort.samples.patient_N[index_V])) == 1
                assert set(np.unique(index_V, return_counts=True)[1]) == each
    assert len(next(module.private_batches(cohort, private(10, rate=1e-9), np.random.default_rng(0), 3))) == 0


def test_views_leave_the_bound_of_a_patient_as_it_is() -> None:
    clip, batch = 0.05, 4
    recipe = dp(clip, batch)
    recipe = replace(recipe, privacy=replace(recipe.privacy, views=4, physical_batch=9))
    with_, without = cohort_of(7, images=3), cohort_of(6, images=3)
    moved = (go(recipe, with_, private=private(7)).delta - go(recipe, without, private=private(6)).delta).norm
    assert moved == pytest.approx(clip / batch, rel=1e-3)


def test_the_noise_has_the_variance_that_is_accounted_and_no_loss_is_told() -> None:
    sigma, clip, batch = 2.0, 0.5, 4
    recipe, cohort = dp(clip, batch), cohort_of(4)
    quiet = go(recipe, cohort, private=private(4))
    noisy = go(recipe, cohort, private=private(4, sigma=sigma))
    noise = flat(noisy.delta - quiet.delta)
    assert noise.size > 50_000
    assert noise.std() == pytest.approx(sigma * clip / batch, rel=0.02)
    assert abs(noise.mean()) < 0.01 * sigma * clip / batch
    assert noisy.loss is None


def test_an_empty_draw_is_a_step_of_noise() -> None:
    trained = go(dp(), cohort_of(4), private=private(4, steps=3, sigma=1.0, rate=1e-9))
    assert trained.steps == 3
    # three steps of independent noise: sqrt(3) times one of them
    assert flat(trained.delta).std() == pytest.approx(math.sqrt(3) * 0.5 / 4, rel=0.02)


def test_secret_noise_differs_every_time_and_seeded_noise_does_not() -> None:
    recipe, cohort = dp(), cohort_of(4)
    secret = replace(private(4, sigma=1.0), noise=os_noise())
    assert go(recipe, cohort, private=secret).delta.digest != go(recipe, cohort, private=secret).delta.digest
    again = {go(recipe, cohort, private=private(4, sigma=1.0, seed=9)).delta.digest for _ in range(2)}
    assert len(again) == 1


def test_the_proximal_term_acts_after_the_noise_and_is_not_clipped() -> None:
    # Two steps without a patient and without noise: gradients are zero, so only the proximal term could move
    # anything, and at the anchor it is zero too.
    recipe = dp(proximal_mu=100.0)
    assert go(recipe, cohort_of(4), private=private(4, steps=2, rate=1e-9)).delta.norm == 0
    # One noised step away from the anchor, mu = 1 / lr brings the next step back by exactly that much.
    recipe = dp(proximal_mu=1.0)
    two = go(recipe, cohort_of(4), private=private(4, steps=2, sigma=1.0, rate=1e-9)).delta
    assert flat(two).std() == pytest.approx(0.5 / 4, rel=0.02)  # the second noise alone


# How it computes


def once(is_private: bool, training: Training, norm: str = "group") -> Weights:
    privacy = Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-5, clip_norm=0.5) if is_private else Privacy()
    return go(
        recipe_of(training, norm=norm, privacy=privacy), cohort_of(), private=private(12) if is_private else None
    ).delta


@pytest.mark.parametrize("is_private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("norm", ["group", "group_ws"])
def test_the_memory_format_moves_the_update_by_rounding_alone(is_private: bool, norm: str) -> None:
    usual = flat(once(is_private, SGD, norm))
    other = flat(once(is_private, replace(SGD, memory_format="channels_last"), norm))
    assert 0 < np.linalg.norm(other - usual) < 1e-3 * np.linalg.norm(usual)


@pytest.mark.parametrize("is_private", [False, True], ids=["plain", "private"])
def test_bfloat16_trains_close_to_float32_and_auto_is_float32_on_a_cpu(is_private: bool) -> None:
    usual = once(is_private, SGD)
    assert once(is_private, replace(SGD, precision="auto")) == usual
    low = once(is_private, replace(SGD, precision="bfloat16"))
    assert {array.dtype for array in low.values()} == {np.dtype(np.float32)}
    assert 1e-4 < np.linalg.norm(flat(low) - flat(usual)) / np.linalg.norm(flat(usual)) < 0.3


# What privacy rests on beside the noise


def drawn(noise: Noise, patients: int) -> tuple[list[bytes], int]:
    """The images of a private course's steps, as bytes, and the seed of its dropout."""
    augmented = replace(Preprocessing(size=(16, 16)), augmentation=NOISY)
    recipe = recipe_of(data=augmented, privacy=Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-3))
    model = build(recipe).train()
    given = Private(sampling=Sampling(rate=1.0, steps=2), noise_multiplier=1.0, noise=noise)
    course = module.Course(
        model, cohort_of(patients, 4), recipe, round_=1, site="north", device=CPU, private=given
    )  # fmt: skip
    return [x_B.numpy().tobytes() for x_B, _, _ in course], course.dropout_seed


def test_with_secret_noise_nobody_else_can_tell_which_images_were_taken_and_how_they_were_changed() -> None:
    # With a seed that others know, one patient more gives all later ones other images: more than one clipped gradient.
    one, other = drawn(os_noise(), 6), drawn(os_noise(), 6)
    assert one[1] != other[1]
    assert not set(one[0]) & set(other[0])
    assert drawn(seeded_noise(1), 6) == drawn(seeded_noise(1), 6)


def test_the_noise_comes_from_the_source_that_the_recipe_names() -> None:
    private = Privacy(mechanism="dp_sgd", noise_multiplier=1.0, delta=1e-5)
    for changes, source in (
        ({}, os_noise()),
        ({"secure_rng": True}, keystream_noise()),
        ({"unsafe_seeded_noise": True}, seeded_noise(0)),
    ):
        found = module.site_noise(recipe_of(privacy=replace(private, **changes)), 1, "north")
        assert (type(found), found.secret) == (type(source), source.secret)
