"""The private gradient against a loop over the records, against Opacus, and by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from client.dp import PrivateGradient, bookkeeping, layers, seeded_noise
from client.dp import engine as dp_engine
from client.dp.book import NoRuleError
from client.dp.engine import loop, vectorised
from common.config import ModelConfig, Preprocessing, Privacy, Recipe, Task
from common.errors import PrivacyError
from common.models import build


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def engine(model: nn.Module, **changes: object) -> PrivateGradient:
    fixed: dict[str, object] = {
        "clip_norm": 1.0, "noise_multiplier": 0.0, "expected_batch": 4, "physical_batch": 64, "noise": seeded_noise(0),
    }  # fmt: skip
    loss = changes.pop("loss", cross_entropy)
    return PrivateGradient(model, loss, **{**fixed, **changes})  # type: ignore[arg-type]


def small(*, inplace: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(inplace=inplace), nn.Conv2d(8, 6, 3, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 3),
    )  # fmt: skip


def batch(count: int, *shape: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *(shape or (1, 8, 8)), generator=generator), torch.arange(count) % 2


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    off = math.sqrt(sum(float((x - y).detach().double().square().sum()) for x, y in zip(a, b, strict=True)))
    return off / math.sqrt(sum(float(y.detach().double().square().sum()) for y in b))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def recipe(family: str, name: str, size: tuple[int, ...]) -> Recipe:
    dimensions = len(size)
    return Recipe(
        name="test",
        task=Task(dimensions=3 if dimensions == 3 else 2),
        data=Preprocessing(size=size),
        model=ModelConfig(
            family=family, name=name, dimensions=3 if dimensions == 3 else 2,  # type: ignore[arg-type]
            width=0.125 if family == "monai" and (name == "vit" or name.startswith("resnet")) else 1.0,
        ),
        privacy=Privacy(mechanism="dp_sgd", epsilon=8.0, delta=1e-5),
    )  # fmt: skip


NETWORKS = [
    ("timm", "resnet18", (32, 32)),
    ("timm", "efficientnet_b0", (32, 32)),
    ("timm", "mobilenetv3_small_100", (32, 32)),
    ("timm", "convnext_tiny", (32, 32)),
    ("timm", "vit_tiny_patch16_224", (32, 32)),
    ("monai", "resnet18", (16, 16)),
    ("monai", "resnet50", (32, 32)),  # at 16 x 16 a group norm over one voxel is ill-conditioned
    ("monai", "densenet121", (32, 32)),
    ("monai", "efficientnet-b0", (32, 32)),
    ("monai", "vit", (16, 16)),
    ("monai", "resnet18", (8, 8, 8)),
    ("monai", "resnet50", (8, 8, 8)),
    ("monai", "densenet121", (32, 32, 32)),
    ("monai", "efficientnet-b0", (32, 32, 32)),
    ("monai", "vit", (8, 8, 8)),
]
FUNCTORCH = ("resnet18", "vit_tiny_patch16_224")


@pytest.mark.parametrize(("family", "name", "size"), NETWORKS, ids=lambda part: str(part).replace(" ", ""))
def test_every_network_gives_the_clipped_sum_of_a_loop_over_the_records_in_both_memory_formats(
    family: str, name: str, size: tuple[int, ...]
) -> None:
    model = build(recipe(family, name, size)).double().train()
    x, target = batch(3, 1, *size)
    x = x.double()
    _, norms = loop(model, cross_entropy, x, target, 1.0)
    clip = float(norms.median())  # one clipped, one not
    assert norms.min() < clip < norms.max()
    sums, _ = loop(model, cross_entropy, x, target, clip)
    ways = [bookkeeping.clipped_sum]
    if name in FUNCTORCH:  # Opacus' functorch way takes the same per-sample gradients
        ways.append(vectorised)
    for order in (torch.contiguous_format, torch.channels_last if len(size) == 2 else torch.channels_last_3d):
        x, model = x.to(memory_format=order), model.to(memory_format=order)  # type: ignore[call-overload]
        for way in ways:
            got_sums, got_norms = way(model, cross_entropy, x, target, clip)
            assert not any(value.requires_grad for value in (*got_sums, got_norms))  # no graph stays alive
            assert distance(got_sums, sums) < 1e-10, (way.__module__, order)
            assert distance([got_norms], [norms]) < 1e-10, (way.__module__, order)


@pytest.mark.parametrize(
    ("family", "name", "size"),
    [("timm", "resnet18", (32, 32)), ("timm", "mobilenetv3_small_100", (32, 32)), ("monai", "resnet18", (8, 8, 8))],
)
def test_standardised_networks_give_the_clipped_sum_of_a_loop_over_the_records_in_both_memory_formats(
    family: str, name: str, size: tuple[int, ...]
) -> None:
    plain = recipe(family, name, size)
    model = build(replace(plain, model=replace(plain.model, norm="group_ws"))).double().train()
    x, target = batch(3, 1, *size)
    x = x.double()
    _, norms = loop(model, cross_entropy, x, target, 1.0)
    clip = float(norms.median())
    sums, _ = loop(model, cross_entropy, x, target, clip)
    for order in (torch.contiguous_format, torch.channels_last if len(size) == 2 else torch.channels_last_3d):
        x, model = x.to(memory_format=order), model.to(memory_format=order)  # type: ignore[call-overload]
        got_sums, got_norms = bookkeeping.clipped_sum(model, cross_entropy, x, target, clip)
        assert distance(got_sums, sums) < 1e-10
        assert distance([got_norms], [norms]) < 1e-10


def test_under_channels_last_opacus_is_wrong_and_this_engine_is_right() -> None:
    # Opacus 1.6 unfolds 2D inputs with as_strided, which assumes the other memory format.
    from opacus.grad_sample import GradSampleModule

    torch.manual_seed(0)
    x, target = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3))
    _, expected = loop(model, cross_entropy, x, target, 1.0)

    def opacus(values: torch.Tensor) -> torch.Tensor:
        wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
        cross_entropy(wrapped(values), target).sum().backward()
        return next(wrapped.parameters()).grad_sample

    loss = cross_entropy(model(x), target)
    truth = torch.stack([torch.autograd.grad(each, model[0].weight, retain_graph=True)[0] for each in loss])
    last = x.to(memory_format=torch.channels_last)
    assert distance([opacus(x)], [truth]) < 1e-5
    assert distance([opacus(last)], [truth]) > 0.5  # when this fails, Opacus was repaired
    for values in (x, last):
        assert distance([engine(model).step(values, target)], [expected]) < 1e-5


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        tuple(kernel),
        stride=tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        padding=tuple(draw(st.integers(0, 2)) for _ in range(dims)),
        dilation=tuple(dilation),
        groups=groups,
    )
    sizes = [d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True)]
    x = torch.randn(3, conv.in_channels, *sizes, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return conv.double(), x.double()


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_every_method_gives_the_gradient_of_each_record_for_any_convolution(
    case: tuple[nn.Conv2d, torch.Tensor],
) -> None:
    conv, x = case
    y = conv(x)
    gy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    expected = torch.stack(
        [torch.autograd.grad((conv(x[i : i + 1]) * gy[i : i + 1]).sum(), conv.weight)[0] for i in range(3)]
    )
    squares = expected.flatten(1).square().sum(1)
    weight = conv.weight.detach()
    shape = layers.Shape.of(weight, conv.stride, conv.padding, conv.dilation, conv.groups)
    assert shape is not None
    for method in ("loop", "grouped", "unfold", "gram", "norms"):
        got, got_squares = layers.convolution_gradients(x, gy, weight, shape, method=method)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        else:
            torch.testing.assert_close(got_squares, squares, rtol=1e-9, atol=1e-9)
        if method != "gram":  # one patient of three views
            got, got_squares = layers.convolution_gradients(x, gy, weight, shape, views=3, method=method)
            whole = expected.sum(0, keepdim=True)
            if got is not None:
                torch.testing.assert_close(got, whole, rtol=1e-10, atol=1e-10)
            else:
                torch.testing.assert_close(got_squares, whole.flatten(1).square().sum(1), rtol=1e-9, atol=1e-9)
    assert layers.convolution_method(x, gy, weight, shape) in ("loop", "grouped", "unfold", "gram", "norms")


def test_a_gram_matrix_is_taken_of_single_records_and_untouched_weights_alone() -> None:
    # 16 gradients of 9 MiB are not kept, and four positions make a small Gram matrix.
    weight = torch.empty(512, 512, 3, 3, device="meta")
    x = gy = torch.empty(16, 512, 2, 2, device="meta")
    shape = layers.Shape.of(weight, 1, 1, 1, 1)
    assert shape is not None
    assert layers.convolution_method(x, gy, weight, shape) == "gram"
    assert layers.convolution_method(x, gy, weight, shape, views=2) == "norms"
    assert layers.convolution_method(x, gy, weight, shape, gram=False) == "norms"


@pytest.mark.parametrize("positions", [1, 7])
def test_both_methods_give_the_gradient_of_each_record_for_linear_layers(positions: int) -> None:
    x, gy = torch.randn(4, positions, 5).double(), torch.randn(4, positions, 3).double()
    expected = torch.einsum("btp,btd->bpd", gy, x)
    kept, _ = layers.linear_gradients(x, gy, method="kept")
    _, squares = layers.linear_gradients(x, gy, method="gram")
    torch.testing.assert_close(kept, expected)
    torch.testing.assert_close(squares, expected.square().sum((1, 2)))


def test_a_gram_norm_in_float32_is_never_below_the_truth_even_where_almost_everything_cancels() -> None:
    generator = torch.Generator().manual_seed(0)
    for spread in (1e-6, 1e-4, 1e-2):
        x = torch.ones(8, 40, 16) + spread * torch.randn(8, 40, 16, generator=generator)
        gy = torch.randn(8, 40, 4, generator=generator)
        gy -= gy.mean(1, keepdim=True)  # the sum over positions of g u^T is nearly zero
        _, squares = layers.linear_gradients(x, gy, method="gram")
        truth = torch.einsum("btp,btd->bpd", gy.double(), x.double()).square().sum((1, 2))
        assert squares is not None
        assert (squares.double() >= truth * (1 - 1e-6)).all()


@pytest.mark.parametrize("shape", [(1, 1, 1 << 22), (1, 1 << 22)])
def test_the_norm_of_a_long_gradient_is_right_within_what_the_clip_allows(
    shape: tuple[int, ...],
) -> None:
    # Four million squares one after the other came to .18 % too little.
    truth = 0.1 * math.sqrt(1 << 22)
    norm = float(layers.squared_norms(torch.full(shape, 0.1)).double().sqrt())
    assert norm == pytest.approx(truth, rel=64 * torch.finfo(torch.float32).eps)


def test_the_gradient_is_the_clipped_sum_over_the_public_denominator() -> None:
    # gradient of w * x is x: 3 is clipped to 1, 0.5 stays; (1 + 0.5) / 10
    model = nn.Linear(1, 1, bias=False)
    private = engine(model, loss=lambda y, t: y[:, 0] * t, expected_batch=10)
    norms = private.step(torch.tensor([[3.0], [0.5]]), torch.tensor([1.0, 1.0]))
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(0.15, rel=1e-5)
    assert norms.tolist() == pytest.approx([3.0, 0.5])
    assert not model.weight.grad.requires_grad
    private.step(torch.tensor([[-3.0], [0.5]]), torch.tensor([1.0, 1.0]))
    assert model.weight.grad.item() == pytest.approx(-0.05, rel=1e-4)  # set, not added to


@pytest.mark.parametrize("fast", [True, False])
def test_one_patient_more_moves_the_sum_by_at_most_the_clip_norm(fast: bool) -> None:
    model = small()
    x, target = batch(9)
    x[8] *= 1e4
    private = engine(model, clip_norm=0.01, expected_batch=1, fast=fast)
    private.step(x[:8], target[:8])
    without = [gradient.clone() for gradient in gradients(model)]
    norms = private.step(x, target)
    assert norms.min() > 0.01
    moved = math.sqrt(
        sum(float((a - b).double().square().sum()) for a, b in zip(gradients(model), without, strict=True))
    )
    assert moved == pytest.approx(0.01, rel=1e-3)
    private.step(x[8:], target[8:])
    alone = math.sqrt(sum(float(g.double().square().sum()) for g in gradients(model)))
    assert 0.01 * (1 - 1e-4) < alone <= 0.01


@pytest.mark.parametrize("fast", [True, False])
def test_the_physical_batch_changes_memory_and_not_the_result(fast: bool) -> None:
    x, target = batch(7)
    results = []
    for physical in (64, 3, 1):
        model = small()
        norms = engine(model, physical_batch=physical, fast=fast).step(x, target)
        results.append([*gradients(model), norms])
    for other in results[1:]:
        assert distance(other, results[0]) < 1e-5


@pytest.mark.parametrize("fast", [True, False])
def test_no_more_records_than_the_physical_batch_are_taken_at_once_and_no_patient_is_split(fast: bool) -> None:
    taken: list[int] = []

    def noted(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        taken.append(len(y))
        return cross_entropy(y, t)

    for views, physical, chunks in ((2, 5, [4, 4, 4]), (2, 12, [12]), (3, 2, [3, 3, 3, 3])):
        private = engine(small(), loss=noted, views=views, physical_batch=physical, fast=fast)
        private.tested_with(*batch(12))
        taken.clear()
        private.step(*batch(12))
        # torch.func sees one patient's records at a time, once for each chunk
        assert taken == (chunks if fast else [views] * len(chunks))


@pytest.mark.parametrize("fast", [True, False])
def test_the_views_of_a_patient_are_averaged_before_the_clip(fast: bool) -> None:
    # gradients of w * x: patient one has (3 + 5) / 2 = 4, clipped to 1; patient two (1 - 0.6) / 2 = 0.2
    model = nn.Linear(1, 1, bias=False)
    private = engine(model, loss=lambda y, t: y[:, 0] * t, expected_batch=10, views=2, fast=fast)
    norms = private.step(torch.tensor([[3.0], [5.0], [1.0], [-0.6]]), torch.ones(4))
    assert norms.tolist() == pytest.approx([4.0, 0.2])
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(0.12, rel=1e-5)
    with pytest.raises(PrivacyError, match="got 3 records, expected 2 of every patient"):
        private.step(torch.ones(3, 1), torch.ones(3))


@pytest.mark.parametrize("fast", [True, False])
def test_views_change_neither_the_bound_of_a_patient_nor_the_loop_and_chunks_keep_them_together(fast: bool) -> None:
    x, target = batch(12)
    x[9:] *= 1e4
    found = []
    for physical in (64, 7, 1):
        model = small()
        private = engine(model, clip_norm=0.01, expected_batch=1, views=3, physical_batch=physical, fast=fast)
        private.step(x[:9], target[:9])
        without = [gradient.clone() for gradient in gradients(model)]
        norms = private.step(x, target)
        assert norms.shape == (4,)
        found.append(gradients(model))
        moved = [a - b for a, b in zip(found[-1], without, strict=True)]
        assert math.sqrt(sum(float(m.double().square().sum()) for m in moved)) == pytest.approx(0.01, rel=1e-3)
        assert distance(found[-1], loop(model, cross_entropy, x, target, 0.01, 3)[0]) < 1e-4
    assert distance(found[1], found[0]) < 1e-5
    assert distance(found[2], found[0]) < 1e-5


def test_an_empty_batch_is_noise_alone_with_the_accounted_variance() -> None:
    model = nn.Linear(300, 300)
    private = engine(model, clip_norm=0.5, noise_multiplier=2.0, expected_batch=8)
    norms = private.step(torch.empty(0, 300), torch.empty(0, dtype=torch.long))
    assert norms.shape == (0,)
    values = torch.cat([gradient.flatten() for gradient in gradients(model)])
    # standard deviation 2 * 0.5 / 8 = 0.125; 90,300 numbers estimate it within 0.25 % (one sigma)
    assert values.std().item() == pytest.approx(0.125, rel=0.02)
    first = values.clone()
    private.step(torch.empty(0, 300), torch.empty(0, dtype=torch.long))
    assert not (torch.cat([gradient.flatten() for gradient in gradients(model)]) == first).any()


def test_noise_is_added_once_a_step_whatever_the_number_of_chunks() -> None:
    x, target = batch(6, 300)
    found = []
    for noise_multiplier, physical in ((0.0, 6), (1.0, 6), (1.0, 1)):
        torch.manual_seed(0)
        model = nn.Linear(300, 300)
        engine(model, noise_multiplier=noise_multiplier, physical_batch=physical).step(x, target)
        found.append(torch.cat([gradient.flatten() for gradient in gradients(model)]))
    for noised in found[1:]:
        assert (noised - found[0]).std().item() == pytest.approx(1 / 4, rel=0.02)


def test_the_same_seeded_noise_gives_the_same_bits() -> None:
    x, target = batch(6)
    results = []
    for _ in range(2):
        model = small()
        private = engine(model, noise_multiplier=1.0, noise=seeded_noise(9))
        private.step(x, target)
        private.step(x[:0], target[:0])
        results.append(gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("fast", [True, False])
def test_frozen_parameters_and_frozen_batch_norms_are_left_alone(fast: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    private = engine(model, fast=fast)
    model.train()
    private.step(*batch(5))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["3.weight", "3.bias"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[1].training


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, affine=False),
    ],
)
def test_a_batch_norm_that_would_mix_patients_is_refused_by_name(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(PrivacyError, match="'1' is a batch norm"):
        engine(model)


def test_a_batch_norm_of_which_a_part_is_trained_is_not_taken_for_a_frozen_one() -> None:
    norm = nn.BatchNorm2d(4)
    norm.weight.requires_grad_(False)
    with pytest.raises(PrivacyError, match="'1' is a batch norm"):
        engine(nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(144, 3)))


def test_an_instance_norm_that_keeps_statistics_is_refused_by_name_unless_they_are_fixed() -> None:
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(PrivacyError, match="'1' keeps running statistics of its patients"):
        engine(model)
    norm.eval()
    engine(model).step(*batch(4))


def test_a_batch_norm_put_back_into_training_later_is_refused_too() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()
    private = engine(model)
    private.step(*batch(5))
    model.train()
    with pytest.raises(PrivacyError, match="'1' is a batch norm"):
        private.step(*batch(5))


class Counting(nn.Module):
    """Keeps the mean of what it saw, as a statistic layer would."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.get_buffer("seen").add_(x.detach().mean())
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def test_a_layer_that_keeps_statistics_of_patients_is_refused() -> None:
    with pytest.raises(PrivacyError, match="buffer 'seen' changed"):
        engine(Counting()).step(*batch(4))


class Mixing(nn.Module):
    """Subtracts the mean over the batch: every record depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x - 0.5 * x.mean(0)).flatten(1))  # type: ignore[no-any-return]


def test_a_model_that_mixes_its_records_fails_the_self_test() -> None:
    with pytest.raises(PrivacyError, match=r"differ by .* from a loop over the records"):
        engine(Mixing()).step(*batch(4))


@pytest.mark.parametrize("clip_norm", [1.0, 1e-4])
def test_sums_of_the_wrong_sign_fail_the_self_test_however_small_they_are(
    clip_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bookkeeping.clipped_sum

    def wrong(*words: object) -> tuple[list[torch.Tensor], torch.Tensor]:
        sums, norms = real(*words)  # type: ignore[arg-type]
        return [-total for total in sums], norms

    monkeypatch.setattr(bookkeeping, "clipped_sum", wrong)
    with pytest.raises(PrivacyError, match=r"clipped sum by bookkeeping differ by 2\.0e\+00"):
        engine(small(), clip_norm=clip_norm).step(*batch(4))


def test_the_comparison_runs_once_for_each_kind_of_model_and_again_for_another_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    real = PrivateGradient._test_gradients

    def noted(self: PrivateGradient, x_B: torch.Tensor, target_B: torch.Tensor) -> None:
        seen.append(type(self.model).__name__)
        real(self, x_B, target_B)

    monkeypatch.setattr(PrivateGradient, "_test_gradients", noted)
    monkeypatch.setattr(dp_engine, "_PASSED", {})
    x, target = batch(4)
    for _ in range(2):  # two visits: an engine each
        engine(small()).step(x, target)
        engine(small()).step(x, target)
    assert len(seen) == 1
    engine(small()).step(x.to(memory_format=torch.channels_last).expand(-1, 1, -1, -1), target)
    thawed = small()
    thawed[0].requires_grad_(False)
    engine(thawed).step(x, target)
    engine(small(), views=2).step(x, target)
    engine(small(), loss=lambda y, t: 2 * cross_entropy(y, t)).step(x, target)
    engine(small()).step(*batch(4, 1, 9, 9))
    assert len(seen) == 5
    for _ in range(2):  # what failed is asked again
        with pytest.raises(PrivacyError, match="differ by"):
            engine(Mixing()).step(x, target)
    assert seen[5:] == ["Mixing", "Mixing"]


def test_the_self_test_leaves_gradients_as_they_were_and_needs_a_record() -> None:
    model, (x, target) = small(), batch(4)
    private = engine(model, noise_multiplier=1.0)
    with pytest.raises(PrivacyError, match="the self-test needs a record"):
        private.self_test(x[:0], target[:0])
    private.self_test(x, target)
    assert gradients(model) == []


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 0, 1]])
def test_whether_the_self_test_passes_says_nothing_of_the_patients_labels(
    labels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dp_engine, "_PASSED", {})
    model = small()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():  # weights of a coordinator that wants to know: no patient of class 0 has a gradient
        head.weight.zero_()
        head.bias.zero_()
        head.bias[0] = 200.0
    x, _ = batch(4)
    engine(model).step(x, torch.tensor(labels))


@pytest.mark.parametrize("fast", [True, False])
def test_a_loss_that_is_not_one_number_a_record_is_refused(fast: bool) -> None:
    with pytest.raises(PrivacyError, match=r"reduction='none'"):
        engine(small(), loss=F.cross_entropy, fast=fast).step(*batch(4))


def counting_ones(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return y[:, 0] * t  # the gradient of w * x is x


def test_the_clip_norm_follows_the_quantile_by_hand() -> None:
    # One of two is within 1: 1 - 2 / 2 = 0, so the share is one half, whatever the batch was expected to be.
    for quantile, expected in ((0.5, 1.0), (0.9, math.exp(0.2 * 0.4)), (0.1, math.exp(-0.2 * 0.4))):
        private = engine(nn.Linear(1, 1, bias=False), loss=counting_ones, expected_batch=10, clip_quantile=quantile)
        private.step(torch.tensor([[3.0], [0.5]]), torch.ones(2))
        assert private.clip_norm == pytest.approx(expected)
    fixed = engine(nn.Linear(1, 1, bias=False), loss=counting_ones)
    fixed.step(torch.tensor([[3.0], [0.5]]), torch.ones(2))
    assert fixed.clip_norm == 1.0


def test_the_clip_norm_reaches_the_quantile_of_the_norms_under_noise() -> None:
    x = torch.linspace(1, 100, 200)[:, None]
    private = engine(
        nn.Linear(1, 1, bias=False), loss=counting_ones, expected_batch=200, clip_quantile=0.7, noise_multiplier=1.0,
        physical_batch=500,
    )  # fmt: skip
    for _ in range(150):
        private.step(x, torch.ones(200))
    assert private.clip_norm == pytest.approx(70, rel=0.1)  # from 1


@pytest.mark.parametrize("sigma", [0.5, 1.0, 7.0])
def test_gradient_and_count_together_are_one_mechanism_of_the_accounted_noise(sigma: float) -> None:
    model = nn.Linear(200, 200)
    private = engine(model, clip_norm=1.0, noise_multiplier=sigma, expected_batch=1000, clip_quantile=0.5)
    moves, spread = [], []
    for _ in range(300):
        before = private.clip_norm
        private.step(torch.empty(0, 200), torch.empty(0, dtype=torch.long))
        moves.append(math.log(private.clip_norm / before) / -0.2)
        spread.append(model.weight.grad[0].std().item() / before * 1000)  # type: ignore[index]
    count_noise = 1000 * float(torch.tensor(moves).std())
    gradient_noise = sum(spread) / len(spread)
    # a patient moves the gradient by the clip norm and the count by one half
    together = 1 / math.sqrt(1 / gradient_noise**2 + 0.5**2 / count_noise**2)
    assert together == pytest.approx(sigma, rel=0.02)
    assert gradient_noise == pytest.approx(sigma * math.sqrt(16 / 15), rel=0.01)


def test_one_patient_moves_the_count_by_one_half_whoever_it_is() -> None:
    for extra in (0.5, 3.0, math.nan):
        moved = []
        for rows in ([0.2, 4.0], [0.2, 4.0, extra]):
            private = engine(nn.Linear(1, 1, bias=False), loss=counting_ones, expected_batch=10, clip_quantile=0.5)
            private.step(torch.tensor(rows)[:, None], torch.ones(len(rows)))
            moved.append(math.log(private.clip_norm) / -0.2 * 10)
        assert abs(moved[1] - moved[0]) == pytest.approx(0.5)


class Faulty:
    """Noise that is wrong by a factor."""

    secret = True

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        return self.factor * torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=like.dtype)

    def uniform(self, count: int) -> object:
        raise NotImplementedError


class Given:
    """Noise of one number."""

    secret = True

    def __init__(self, number: float) -> None:
        self.number = number

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, self.number)

    def uniform(self, count: int) -> object:
        raise NotImplementedError


@pytest.mark.parametrize(("number", "share"), [(1.0, 0.7), (9.0, 1.0), (-9.0, 0.0)])
def test_the_noise_of_a_step_is_of_the_bound_before_it_moves_and_that_moves_by_a_share(
    number: float, share: float
) -> None:
    # Nobody is drawn, and the count is noise of 2 alone: 2 / 10 + 1 / 2, cut off at 0 and 1.
    model = nn.Linear(1, 1, bias=False)
    private = engine(model, noise_multiplier=1.0, expected_batch=10, clip_quantile=0.5, noise=Given(number))
    private.step(torch.empty(0, 1), torch.empty(0))
    assert private.clip_norm == pytest.approx(math.exp(-0.2 * (share - 0.5)))
    assert model.weight.grad.item() == pytest.approx(number * math.sqrt(16 / 15) / 10)  # type: ignore[union-attr]


@pytest.mark.parametrize("factor", [0.0, 1 / 8, 0.8, 1.3])
def test_noise_of_another_variance_than_accounted_fails_the_self_test(factor: float) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 3))
    with pytest.raises(PrivacyError, match="of the variance that is accounted"):
        engine(model, noise_multiplier=1.0, noise=Faulty(factor)).step(*batch(64))
    engine(model, noise_multiplier=1.0, noise=Faulty(1.0), clip_norm=0.1).step(*batch(64))


def test_no_noise_at_all_fails_the_self_test_of_a_network_too_small_to_tell_a_variance() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))  # of 195 numbers any variance from 0 to 2.1 is allowed
    with pytest.raises(PrivacyError, match=r"the noise has 0\.0000 of the variance that is accounted"):
        engine(model, noise_multiplier=1.0, noise=Faulty(0.0)).step(*batch(64))
    engine(model, noise_multiplier=1.0, noise=Faulty(1.0)).step(*batch(64))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e38])
def test_a_record_with_a_gradient_that_is_not_finite_contributes_exactly_zero(poison: float, fast: bool) -> None:
    x, target = batch(5)
    x[2] = poison
    model = small()
    norms = engine(model, fast=fast).step(x, target)
    assert not torch.isfinite(norms[2])
    assert torch.isfinite(norms[[0, 1, 3, 4]]).all()
    got = gradients(model)
    clean = small()
    keep = torch.tensor([0, 1, 3, 4])
    engine(clean, fast=fast).step(x[keep], target[keep])
    assert distance(got, gradients(clean)) < 1e-5
    lonely = small()
    engine(lonely, fast=fast).step(x[2:3], target[2:3])  # the first step: its self-test must not look at the record
    assert all((gradient == 0).all() for gradient in gradients(lonely))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("method", ["norms", "gram"])
def test_a_patient_who_is_not_finite_is_in_no_sum_that_is_formed_after_the_norms(
    method: str, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = method if views == 1 else "norms"  # a Gram matrix is of one view alone
    monkeypatch.setattr(layers, "convolution_method", lambda *_, **__: given)
    x, target = batch(6)
    x[2] = math.nan
    sums, norms = bookkeeping.clipped_sum(small(), cross_entropy, x, target, 0.01, views)
    assert norms.isfinite().tolist() == [patient != 2 // views for patient in range(6 // views)]
    rest = [record for record in range(6) if record // views != 2 // views]
    expected, _ = loop(small(), cross_entropy, x[rest], target[rest], 0.01, views)
    assert distance(sums, expected) < 1e-4


@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 5, 4, 3)])
def test_group_norm_is_booked_for_any_number_of_axes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(3, 6)
    nn.init.normal_(norm.weight)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(math.prod(shape), 3)).double()
    x, target = torch.randn(4, *shape).double(), torch.tensor([0, 1, 2, 0])
    sums, _ = loop(model, cross_entropy, x, target, 1.0)
    assert distance(bookkeeping.clipped_sum(model, cross_entropy, x, target, 1.0)[0], sums) < 1e-12


def test_a_batch_norm_with_fixed_statistics_is_booked() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm(torch.randn(8, 4, 6, 6) * 3 + 1)
    nn.init.normal_(norm.weight)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(144, 3)).double().eval()
    x, target = batch(5)
    sums, norms = loop(model, cross_entropy, x.double(), target, 1.0)
    got, got_norms = bookkeeping.clipped_sum(model, cross_entropy, x.double(), target, 1.0)
    assert distance(got, sums) < 1e-12
    assert distance([got_norms], [norms]) < 1e-12


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.head(self.inner(torch.tanh(self.inner(x))))  # type: ignore[no-any-return]


class Odd(nn.Module):
    """A parameter in a function without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.head = nn.Parameter(torch.full((64,), 0.3)), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.prelu(x.flatten(1), self.slope))  # type: ignore[no-any-return]


class Words(nn.Module):
    """An embedding whose rows occur more than once in a record, one of them without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = (x.flatten(1)[:, :20].abs() * 3).long().clamp(max=5)
        return self.head(torch.tanh(self.rows(ids)).sum(1))  # type: ignore[no-any-return]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)  # type: ignore[no-any-return]


class LouderWords(Words):
    """The same, out of a table that is made of a parameter."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, 10 * self.table.weight)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        Words,
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, (2, 4), padding="same", dilation=(2, 1)), nn.Flatten(), nn.Linear(256, 3)
        ),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(256, 3)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=2, padding_mode="circular"), nn.Flatten(), nn.Linear(400, 3)),
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6, stride=2),
            nn.Flatten(), nn.Linear(24, 3),
        ),
    ],
    ids=["embedding", "same", "reflect", "circular", "instance"],
)  # fmt: skip
def test_more_layers_are_booked_and_right(make: Callable[[], nn.Module], views: int) -> None:
    torch.manual_seed(0)
    model = make().double()
    x, target = batch(6)
    sums, norms = loop(model, cross_entropy, x.double(), target, 1.0, views)
    got, got_norms = bookkeeping.clipped_sum(model, cross_entropy, x.double(), target, 1.0, views)
    assert distance(got, sums) < 1e-12
    assert distance([got_norms], [norms]) < 1e-12


@pytest.mark.parametrize("part", [1, 1 << 11, 1 << 13])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("method", ["loop", "grouped", "unfold", "norms", "gram"])
def test_work_in_portions_gives_what_it_gives_at_once(
    method: str, views: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convolution_method(*_: object, gram: bool) -> str:
        return "norms" if method == "gram" and views > 1 else method

    monkeypatch.setattr(layers, "convolution_method", convolution_method)
    monkeypatch.setattr(layers, "_PART_BYTES", part)
    if method in ("norms", "gram"):
        monkeypatch.setattr(layers, "_KEPT_BYTES", 0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(2), nn.Linear(16, 5), nn.Tanh(),
        nn.Flatten(), nn.Linear(30, 3),
    ).double()  # fmt: skip
    x, target = batch(10)
    sums, norms = loop(model, cross_entropy, x.double(), target, 0.5, views)
    got, got_norms = bookkeeping.clipped_sum(model, cross_entropy, x.double(), target, 0.5, views)
    assert distance(got, sums) < 1e-12
    assert distance([got_norms], [norms]) < 1e-12


class Deciding(nn.Module):
    """Looks at a value to decide: no rule for its parameter, and nothing for torch.func either."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.head = nn.Parameter(torch.full((64,), 0.3)), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.prelu(x.flatten(1), self.slope)
        return self.head(y if y.sum().item() > 0 else -y)  # type: ignore[no-any-return]


def test_a_parameter_that_neither_way_can_take_is_refused_by_name() -> None:
    with pytest.raises(PrivacyError, match=r"no rule for prelu of 'slope', and torch.func cannot"):
        engine(Deciding()).step(*batch(4))


def test_an_error_that_is_not_for_want_of_a_rule_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for model, fast, error in ((small(), False, ValueError("odd")), (Twice(), True, torch.OutOfMemoryError("full"))):

        def fails(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(dp_engine, "vectorised", fails)
        with pytest.raises(type(error), match=str(error)):
            engine(model, fast=fast).step(*batch(4))


class TimeFirst(nn.Module):
    """Puts the records on the second axis: eight steps of B records, as recurrent code does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(x[:, 0].transpose(0, 1))).mean(0))  # type: ignore[no-any-return]


class Standardised(nn.Conv2d):
    """Weight standardisation by hand: the parameter is used several times, what is made of it once, as a view."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight.view(self.weight.shape), self.bias)


class Blended(nn.Module):
    """A weight that is made of a parameter and of the records."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(64, 64)), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        weight_B = self.weight * x.tanh().unsqueeze(1)
        return self.head(torch.bmm(weight_B, x.unsqueeze(2)).squeeze(2))  # type: ignore[no-any-return]


class Product(nn.Module):
    """Two parameters in one weight, and a third made from a scalar by torch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 8))
        self.gain, self.head = nn.Parameter(torch.tensor(0.4)), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(F.linear(x[:, 0], self.left @ self.right))  # at the eight rows of each record
        return self.head(y * torch.exp(self.gain)).mean(1)  # type: ignore[no-any-return]


class Halves(nn.Module):
    """A parameter that is cut into two tensors, which are put together again in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.head = nn.Parameter(torch.randn(6, 8)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        upper, lower = self.whole.chunk(2)
        y = torch.tanh(F.linear(x[:, 0], torch.cat([lower, upper])))
        return self.head(4 * y).mean(1)  # type: ignore[no-any-return]


def timm_layer(name: str) -> nn.Module:
    from common.timm_shim import ensure_light_timm

    ensure_light_timm()
    import timm.layers

    made = getattr(timm.layers, name)(1, 4, 3)
    if name == "ScaledStdConv2d":
        nn.init.normal_(made.gain)
    assert isinstance(made, nn.Module)
    return made


def with_head(first: nn.Module) -> nn.Module:
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    model(batch(1)[0])
    return model


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "norms"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: with_head(Standardised(1, 4, 3)),
        lambda: with_head(timm_layer("StdConv2d")),
        lambda: with_head(timm_layer("ScaledStdConv2d")),
        Product,
        Halves,
    ],
    ids=["by hand", "StdConv2d", "ScaledStdConv2d", "product", "halves"],
)
def test_a_weight_that_is_made_of_parameters_alone_is_booked_and_right(
    make: Callable[[], nn.Module], views: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(layers, "_KEPT_BYTES", 0)
    torch.manual_seed(0)
    model = make().double()
    x, target = batch(6)
    for order in (torch.contiguous_format, torch.channels_last):
        x = x.double().to(memory_format=order)
        sums, norms = loop(model, cross_entropy, x, target, 1.0, views)
        assert norms.max() > 1.0
        got, got_norms = bookkeeping.clipped_sum(model, cross_entropy, x, target, 1.0, views)
        assert distance(got, sums) < 1e-12
        assert distance([got_norms], [norms]) < 1e-12


@pytest.mark.parametrize("forgets", ["the sum over positions", "the weight"])
@pytest.mark.parametrize("size", [1e5, 1e7, 1e9])
def test_a_lone_patient_of_whose_gradient_rounding_alone_is_left_stays_within_the_bound(
    size: float, forgets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An image of one grey: the gradient of a kernel is constant, and a standardised weight forgets that; where the
    # output's gradients add up to 0, so is the kernel's. Rounding is another one in the norm than in the sum, which was
    # up to 6 and 120 times the bound.
    monkeypatch.setattr(layers, "convolution_method", lambda *_, **__: "norms")
    for seed in range(20):
        torch.manual_seed(seed)
        grey, gradient = torch.full((1, 1, 9, 9), size * float(torch.randn(()))), torch.randn(1, 4, 49)
        if forgets == "the weight":
            model: nn.Module = Standardised(1, 4, 3, bias=False)
        else:
            model, gradient = nn.Conv2d(1, 4, 3, bias=False), gradient - gradient.mean(2, keepdim=True)
        (total,), _ = bookkeeping.clipped_sum(model, lambda y, t: (y.flatten(2) * t).sum((1, 2)), grey, gradient, 1.0)
        assert float(total.double().norm()) <= 1.0


@pytest.mark.parametrize(
    "make",
    [
        Twice,
        Odd,
        LouderWords,
        TimeFirst,
        Blended,
        lambda: nn.Sequential(nn.ConvTranspose2d(1, 4, 3), nn.Flatten(), nn.Linear(400, 3)),
    ],
)
@pytest.mark.parametrize("count", [5, 8])
def test_what_book_keeping_has_no_rule_for_goes_the_general_way_and_is_right(
    make: Callable[[], nn.Module], count: int
) -> None:
    torch.manual_seed(0)
    model = make()
    x, target = batch(count)
    private = engine(model, expected_batch=1)
    private.step(x, target)
    assert private.way == "torch.func"
    sums, _ = loop(model, cross_entropy, x, target, 1.0)
    assert distance(gradients(model), sums) < 1e-4


class Halved(nn.Module):
    """Takes the halves of every record for records of their own, all the upper ones first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.LazyLinear(3)
        self(batch(1)[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.inner(torch.cat(x.chunk(2, 2)))
        return self.head(torch.cat(both.chunk(2), 1).flatten(1))  # type: ignore[no-any-return]


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((8,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.slope


class Signs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table((x > 0).long())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "inner",
    [
        lambda: nn.Conv2d(1, 2, 3), lambda: nn.Linear(8, 3), lambda: nn.GroupNorm(1, 1), lambda: nn.LayerNorm(8),
        lambda: nn.BatchNorm2d(1).eval(), Slope, Signs,
    ],
    ids=["convolution", "linear", "group norm", "layer norm", "fixed batch norm", "product", "embedding"],
)  # fmt: skip
def test_what_lies_on_the_first_axis_of_a_layer_without_being_the_records_is_not_booked_as_them(
    inner: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = Halved(inner())
    x, target = batch(4)
    private = engine(model, expected_batch=1)
    private.step(x, target)
    assert private.way == "torch.func"
    assert distance(gradients(model), loop(model, cross_entropy, x, target, 1.0)[0]) < 1e-4


class Using(nn.Module):
    """One function of a parameter and of four records, 1 x 8 x 8 each."""

    def __init__(self, use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.use, self.p = use, nn.Parameter(torch.ones(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.p, x).reshape(4, -1)


IDS = torch.tensor([[0], [1], [2], [0]])


@pytest.mark.parametrize(
    ("use", "shape"),
    [
        (lambda p, x: F.conv2d(p, x), (4, 1, 8, 8)),
        (lambda p, x: F.linear(p, x.flatten(1)), (4, 64)),
        (lambda p, x: F.group_norm(p, 1, x[:, 0, 0, 0]), (4, 4)),
        (lambda p, x: F.layer_norm(p, (64,), x[0].flatten()), (4, 64)),
        (lambda p, x: F.batch_norm(p, x[0, 0, 0], x[0, 0, 1].square(), x[0, 0, 2]), (4, 8)),
        (lambda p, x: p * p.sum() + x, (4, 1, 8, 8)),
    ],
)
def test_a_parameter_of_as_many_rows_as_records_is_not_taken_for_them(
    use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> None:
    with pytest.raises(NoRuleError):
        bookkeeping.clipped_sum(Using(use, *shape), cross_entropy, *batch(4), 1.0)


@pytest.mark.parametrize(
    ("use", "shape"),
    [
        (lambda p, x: F.conv2d(x[:, 0], p), (4, 4, 3, 3)),  # one record of four channels
        (lambda p, x: F.layer_norm(x, tuple(x.shape), p), (4, 1, 8, 8)),
        (lambda p, x: F.instance_norm(x[:, 0, 0], weight=p), (4,)),
        (lambda p, x: F.instance_norm(x, x[0, 0, 0, :1], x[0, 0, 1, :1], p), (1,)),
        (lambda p, x: F.batch_norm(x, None, None, p, training=True), (1,)),
        (lambda p, x: F.batch_norm(x, x[0, 0, 0, :1], x[0, 0, 1, :1] ** 2, p, training=True), (1,)),
        (lambda p, x: F.embedding(IDS, p, max_norm=1.0) + x[:, 0], (3, 8)),
        (lambda p, x: F.embedding(IDS, p, scale_grad_by_freq=True) + x[:, 0], (3, 8)),
        (lambda p, x: F.embedding(IDS, p, sparse=True) + x[:, 0], (3, 8)),
        (lambda p, x: p.expand(4, 8) * x[:, 0, 0], (4, 1)),  # another one for each record
        (lambda p, x: x[:, 0, 0] * p, (4, 1)),
        (lambda p, x: (p * x.sum()).expand(4, 3), ()),  # a number of all records
        (lambda p, x: F.linear(x.flatten(1).double(), p.double()), (4, 64)),
    ],
)
def test_a_use_that_is_not_one_for_each_record_has_no_rule(
    use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], shape: tuple[int, ...]
) -> None:
    with pytest.raises(NoRuleError):
        bookkeeping.clipped_sum(Using(use, *shape), cross_entropy, *batch(4), 1.0)


class Tokens(nn.Module):
    """Class token, position table, layer scale, a scalar gain and a view: every elementwise rule."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.place = nn.Parameter(torch.randn(1, 9, 8))
        self.gamma = nn.Parameter(torch.randn(8, 1))
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.shift = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x[:, 0]], 1) + self.place
        x = torch.tanh(self.gain * x) * self.gamma.reshape(1, 8)
        return self.head(torch.add(self.shift, x).square().mean(1))  # type: ignore[no-any-return]


def test_tokens_positions_and_scales_are_booked_and_right() -> None:
    torch.manual_seed(0)
    model = Tokens().double()
    x, target = batch(5)
    sums, norms = loop(model, cross_entropy, x.double(), target, 1.0)
    got, got_norms = bookkeeping.clipped_sum(model, cross_entropy, x.double(), target, 1.0)
    assert distance(got, sums) < 1e-12
    assert distance([got_norms], [norms]) < 1e-12


def test_per_sample_norms_are_those_of_opacus() -> None:
    from opacus.grad_sample import GradSampleModule

    x, target = batch(6)
    wrapped = GradSampleModule(small(inplace=False), loss_reduction="sum")  # its hooks fail on in-place layers
    cross_entropy(wrapped(x), target).sum().backward()
    expected = sum(p.grad_sample.flatten(1).square().sum(1) for p in wrapped.parameters()).sqrt()
    for fast in (True, False):
        torch.testing.assert_close(engine(small(), fast=fast).step(x, target), expected, rtol=1e-4, atol=1e-6)


def test_the_model_keeps_its_names_its_methods_and_has_no_hooks() -> None:
    model = small()
    names = list(model.state_dict())
    private = engine(model)
    x, target = batch(4)
    before = model(x)
    private.step(x, target)
    assert private.way == "bookkeeping"
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), before)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._backward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("fast", [True, False])
def test_dropout_differs_from_record_to_record(fast: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)).train()
    x, target = batch(1)
    norms = engine(model, fast=fast).step(x.expand(8, -1, -1, -1).clone(), target.expand(8).clone())
    assert len({round(float(norm), 5) for norm in norms}) > 1
    assert model.training
    assert model[1].training


LOW = [
    small,
    lambda: nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), nn.LayerNorm(8), nn.GELU(), nn.Flatten(), nn.Linear(8, 3)),
    lambda: with_head(Standardised(1, 4, 3)),
    lambda: build(recipe("monai", "vit", (8, 8))),
    Product,
]  # fmt: skip


def test_in_bfloat16_the_loss_is_of_float32() -> None:
    seen: list[torch.dtype] = []

    def noted(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(y.dtype)
        return cross_entropy(y, t)

    bookkeeping.clipped_sum(small(), noted, *batch(4), 1.0, low=torch.bfloat16)
    assert seen == [torch.float32]


@pytest.mark.parametrize("make", LOW, ids=["convolutions", "linear", "standardised", "vit", "product"])
def test_in_bfloat16_the_bound_holds_in_float32(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    x, target = batch(12)
    for i in range(len(x)):
        sums, norms = bookkeeping.clipped_sum(
            model, cross_entropy, x[i : i + 1], target[i : i + 1], 0.01, 1, torch.bfloat16
        )
        assert norms.min() > 0.01
        length = math.sqrt(sum(float(total.double().square().sum()) for total in sums))
        assert 0.01 * (1 - 1e-4) < length <= 0.01
        assert {total.dtype for total in sums} == {torch.float32}


@pytest.mark.parametrize("make", LOW, ids=["convolutions", "linear", "standardised", "vit", "product"])
def test_in_bfloat16_norms_and_sums_are_those_of_the_same_numbers_in_float64(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make()
    x, target = batch(6)
    low, low_norms = bookkeeping.clipped_sum(model, cross_entropy, x, target, 1e6, 1, torch.bfloat16)
    whole = [
        bookkeeping.clipped_sum(model, cross_entropy, x[i : i + 1], target[i : i + 1], 1e6, 1, torch.bfloat16)
        for i in range(6)
    ]
    # The norm that is booked is that of the record's own sum, in float64 and not clipped: no rounding to bfloat16.
    alone = [math.sqrt(sum(float(g.double().square().sum()) for g in sums)) for sums, _ in whole]
    for norm, length in zip((norms for _, norms in whole), alone, strict=True):
        assert float(norm) == pytest.approx(length, rel=2e-5)
    plain, plain_norms = loop(model, cross_entropy, x, target, 1e6)
    assert 1e-5 < distance([low_norms], [plain_norms]) < 0.05  # bfloat16 has 8 bits
    assert distance(low, plain) < 0.1


def test_a_step_in_bfloat16_is_close_to_one_in_float32_and_its_self_test_the_same() -> None:
    x, target = batch(8)
    exact, low = small(), small()
    engine(exact).step(x, target)
    private = engine(low, low=torch.bfloat16)
    private.step(x, target)
    assert private.way == "bookkeeping"
    assert 1e-5 < distance(gradients(low), gradients(exact)) < 0.05
    general = small()
    engine(general, low=torch.bfloat16, fast=False).step(x, target)  # torch.func stays at full precision
    assert distance(gradients(general), gradients(exact)) < 1e-5


def test_autocast_around_the_step_does_not_lower_its_precision() -> None:
    x, target = batch(4)
    plain, around = small(), small()
    engine(plain).step(x, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine(around).step(x, target)
    assert distance(gradients(around), gradients(plain)) < 1e-6


def test_an_unused_parameter_gets_noise_like_every_other() -> None:
    model = small()
    model.register_parameter("unused", nn.Parameter(torch.zeros(500)))
    engine(model, noise_multiplier=1.0).step(*batch(4))
    assert model.unused.grad.std().item() == pytest.approx(1 / 4, rel=0.2)
    engine(model).step(*batch(4))
    assert (model.unused.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"clip_norm": 0.0}, "clip_norm: got 0.0"),
        ({"clip_norm": math.inf}, "clip_norm: got inf"),
        ({"noise_multiplier": -1.0}, "noise_multiplier: got -1.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier: got nan"),
        ({"expected_batch": 0}, "expected_batch: got 0"),
        ({"physical_batch": 0}, "physical_batch: got 0"),
        ({"views": 0}, "views: got 0"),
        ({"clip_quantile": 1.0}, "clip_quantile: got 1.0"),
    ],
)
def test_settings_that_break_the_bound_are_refused(change: dict[str, object], why: str) -> None:
    with pytest.raises(PrivacyError, match=why):
        engine(small(), **change)


def test_a_model_without_trainable_parameters_and_unequal_batches_are_refused() -> None:
    with pytest.raises(PrivacyError, match="no trainable parameter"):
        engine(small().requires_grad_(False))
    x, target = batch(4)
    with pytest.raises(PrivacyError, match="4 records and 3 targets"):
        engine(small()).step(x, target[:3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fast", [True, False])
def test_a_gpu_gives_the_gradient_of_the_cpu(fast: bool) -> None:
    x, target = batch(6)
    cpu, gpu = small(), small().cuda()
    engine(cpu).step(x, target)
    engine(gpu, fast=fast).step(x.cuda(), target.cuda())
    assert distance([gradient.cpu() for gradient in gradients(gpu)], gradients(cpu)) < 1e-4
