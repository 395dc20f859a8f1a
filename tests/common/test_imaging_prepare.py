"""From a volume or image to the model's input, against hand numbers, highdicom and scipy."""

import math

import highdicom
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from common.config import Augmentation, Preprocessing
from common.errors import ConfigError, DataError
from common.imaging import Augmenter, Image, Source, Volume, augmentation, prepare

SOURCE = Source("P", "1", "2", "3", ("4",), "CT", "maker", "model", ())


def volume(values_ZYX: NDArray[np.generic], affine: NDArray[np.float64] | None = None) -> Volume:
    return Volume(np.asarray(values_ZYX, np.float32), np.eye(4) if affine is None else affine, SOURCE)


def image(values_YX: NDArray[np.generic], spacing_mm: tuple[float, float] | None = None) -> Image:
    return Image(np.asarray(values_YX, np.float32), spacing_mm, SOURCE)


def lps(spacing_mm: tuple[float, float, float] = (1, 1, 1)) -> NDArray[np.float64]:
    """Slices grow to S, rows to P, columns to L."""
    affine = np.eye(4)
    affine[:3, :3] = np.diag(spacing_mm)[::-1]
    return affine


# --- intensity


def test_a_window_maps_its_ends_to_zero_and_one_and_clips_outside() -> None:
    data = Preprocessing(size=(8, 8), intensity="window", low=-1000, high=1000, mean=0.5, std=0.25)
    values = np.zeros((8, 8))
    values[0, :4] = [-3024, -1000, 500, 3000]
    out = prepare(image(values), data)
    assert (out.shape, out.dtype) == ((1, 8, 8), np.float32)
    # (0 - .5) / .25, (0 - .5) / .25, (.75 - .5) / .25, (1 - .5) / .25; 0 HU is .5
    np.testing.assert_allclose(out[0, 0, :5], [-2, -2, 1, 2, 0], atol=1e-6)


def test_percentiles_are_of_the_image_itself_so_its_scale_does_not_matter() -> None:
    data = Preprocessing(size=(10, 10), low=0, high=90)
    values = np.arange(100.0).reshape(10, 10)
    out = prepare(image(values), data)
    np.testing.assert_allclose(out[0], np.minimum(values / 89.1, 1), atol=1e-6)  # 90 % of 0..99 is 89.1
    np.testing.assert_allclose(prepare(image(values * 17_000 - 5), data), out, atol=1e-5)


def test_a_constant_image_becomes_black_and_stays_finite() -> None:
    out = prepare(image(np.full((8, 8), 7.0)), Preprocessing(size=(8, 8), mean=0.5, std=0.5))
    np.testing.assert_array_equal(out, np.full((1, 8, 8), -1, np.float32))


def test_an_image_that_is_black_but_for_a_few_pixels_keeps_them() -> None:
    values = np.zeros((100, 100))
    values[3, 4] = 10  # 0.01 % of the pixels: both percentiles are 0
    out = prepare(image(values), Preprocessing(size=(100, 100)))
    assert out.max() == out[0, 3, 4] == 1


def test_the_input_is_left_as_it_was() -> None:
    values = np.random.default_rng(0).normal(size=(16, 12, 10)).astype(np.float32)
    item = volume(values.copy(), lps())
    prepare(item, Preprocessing(size=(8, 8, 8), spacing_mm=(2, 2, 2)))
    np.testing.assert_array_equal(item.values_ZYX, values)


# --- orientation


@pytest.mark.parametrize("orientation", ["LPS", "RAS"])
@pytest.mark.parametrize("seed", range(6))
def test_a_volume_acquired_along_any_axes_ends_up_in_the_recipes(orientation: str, seed: int) -> None:
    """A cloud of bright voxels in a cube, permuted and flipped with its affine by highdicom, gives one result."""
    rng = np.random.default_rng(seed)
    values = (rng.uniform(size=(8, 9, 10)) < 0.2).astype(np.float32)
    reference = highdicom.Volume(values, lps(), coordinate_system="PATIENT")
    turned = reference.permute_spatial_axes(rng.permutation(3).tolist())
    turned = turned.flip_spatial([axis for axis in range(3) if rng.uniform() < 0.5] or [0])
    data = Preprocessing(size=(8, 9, 10), orientation=orientation, intensity="window", low=0, high=1, fit="crop_pad")
    out = prepare(volume(turned.array, turned.affine), data)[0]
    want = values if orientation == "LPS" else values[:, ::-1, ::-1]
    np.testing.assert_array_equal(out, want)


def test_source_orientation_leaves_the_axes_as_acquired() -> None:
    values = np.random.default_rng(1).uniform(size=(8, 8, 8)).astype(np.float32)
    affine = lps() @ np.diag([-1.0, 1, -1, 1])
    out = prepare(volume(values, affine), Preprocessing(size=(8, 8, 8), orientation="source", low=0, high=100))
    np.testing.assert_allclose(out[0], (values - values.min()) / np.ptp(values), atol=1e-6)


# --- spacing and size


def test_resampling_to_half_the_spacing_doubles_the_voxels_and_keeps_a_ramp() -> None:
    ramp = np.broadcast_to(np.linspace(0, 1, 9)[None, :, None], (8, 9, 8))
    data = Preprocessing(size=(8, 17, 8), spacing_mm=(2, 0.5, 1), intensity="window", low=0, high=1, fit="crop_pad")
    out = prepare(volume(ramp, lps((2, 1, 1))), data)[0]
    np.testing.assert_allclose(out[4, :, 4], np.linspace(0, 1, 17), atol=0.04)


def test_a_ball_keeps_its_size_in_millimetres_from_every_scanner() -> None:
    """A ball of 12 mm radius, sampled at three spacings, covers 4/3 pi 12^3 = 7238 mm3 at 2 mm."""
    for spacing_mm in ((1.0, 1.0, 1.0), (3.0, 0.7, 0.7), (2.0, 2.0, 4.0)):
        shape = tuple(int(64 / s) for s in spacing_mm)
        z, y, x = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm, strict=True))
        ball = (z[:, None, None] ** 2 + y[:, None] ** 2 + x**2) < 12**2
        data = Preprocessing(size=(32, 32, 32), spacing_mm=(2, 2, 2), intensity="window", low=0, high=1, fit="crop_pad")
        out = prepare(volume(ball, lps(spacing_mm)), data)
        assert out.sum() * 8 == pytest.approx(7238, rel=0.03)


def test_shrinking_does_not_alias_fine_stripes() -> None:
    """Stripes of one pixel become even grey, as after scipy's low-pass, not stripes of another width."""
    stripes = np.zeros((225, 225))
    stripes[:, ::2] = 1
    out = prepare(image(stripes), Preprocessing(size=(28, 28), intensity="window", low=0, high=1))[0]
    want = ndimage.gaussian_filter(stripes, 3.5)[112, 112]
    np.testing.assert_allclose(out[4:-4, 4:-4], want, atol=0.02)


def test_resize_stretches_and_crop_pad_does_not() -> None:
    values = np.zeros((16, 8))
    values[4:12] = 1
    resized = prepare(image(values), Preprocessing(size=(8, 8), intensity="window", low=0, high=1))[0]
    assert resized[0].max() < 0.2
    assert resized[4].min() > 0.8
    cropped = prepare(image(values), Preprocessing(size=(8, 12), intensity="window", low=0, high=1, fit="crop_pad"))[0]
    np.testing.assert_array_equal(cropped, np.pad(np.ones((8, 8)), ((0, 0), (2, 2))))


def test_images_without_spacing_are_refused_where_spacing_is_asked_for() -> None:
    data = Preprocessing(size=(8, 8), spacing_mm=(1, 1))
    assert prepare(image(np.eye(8), (2.0, 2.0)), data).shape == (1, 8, 8)
    with pytest.raises(DataError, match="no pixel spacing"):
        prepare(image(np.eye(8)), data)


def test_a_volume_in_a_two_dimensional_recipe_is_refused() -> None:
    with pytest.raises(DataError, match="dimensions=3"):
        prepare(volume(np.zeros((8, 8, 8))), Preprocessing(size=(8, 8)))


def test_a_header_with_giant_voxels_does_not_fill_the_memory() -> None:
    with pytest.raises(DataError, match="voxels"):
        prepare(
            volume(np.eye(8)[None].repeat(8, 0), lps((900, 900, 900))),
            Preprocessing(size=(8,) * 3, spacing_mm=(0.5,) * 3),
        )


def _as_the_page_says(values: NDArray[np.float64], spacing_mm: list[float], data: Preprocessing) -> NDArray[np.float64]:
    """The steps of docs/data.md, written from the page alone; of an image that lies as `orientation` says."""
    low, high = data.low, data.high
    if data.intensity == "percentile":
        low, high = np.percentile(values, [low, high])
    values = np.clip((values - low) / (high - low), 0, 1)

    def smoothed(axis: int, sigma: float) -> NDArray[np.float64]:
        tail, root = int(4 * sigma + 0.5), sigma * math.sqrt(2)
        taps = [(math.erf((k + 0.5) / root) - math.erf((k - 0.5) / root)) / 2 for k in range(-tail, tail + 1)]
        return ndimage.correlate1d(values, taps, axis, mode="constant")

    def interpolated(axis: int, at: NDArray[np.float64]) -> NDArray[np.float64]:
        lines = values.shape[axis]
        return np.apply_along_axis(lambda line: np.interp(at, np.arange(lines), line), axis, values)

    def sampled(ratios: list[float], places: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        nonlocal values
        smooth = max((ratio - 1) / 2 for ratio in ratios) >= 0.1
        for axis, (ratio, at) in enumerate(zip(ratios, places, strict=True)):
            if smooth and ratio > 1:
                values = smoothed(axis, (ratio - 1) / 2)
            values = interpolated(axis, at)
        return values

    if data.spacing_mm is not None:
        r = [float(wanted) / given for wanted, given in zip(data.spacing_mm, spacing_mm, strict=True)]  # type: ignore[arg-type]
        made = [round((n - 1) / k + 1) for n, k in zip(values.shape, r, strict=True)]
        values = sampled(r, [np.arange(m) * k for m, k in zip(made, r, strict=True)])
    if data.fit == "resize":
        r = [n / m for n, m in zip(values.shape, data.size, strict=True)]
        values = sampled(r, [(np.arange(m) + 0.5) * k - 0.5 for m, k in zip(data.size, r, strict=True)])
    else:
        for axis, m in enumerate(data.size):
            n = values.shape[axis]
            wide = np.pad(
                values, [((m - n) // 2, m) if each == axis and n < m else (0, 0) for each in range(values.ndim)]
            )
            start = max(0, n // 2 - m // 2)
            values = wide.take(range(start, start + m), axis)
    return (values - data.mean) / data.std


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ((50, 37), Preprocessing(size=(28, 28), low=2, high=97, mean=0.5, std=0.25)),
        ((20, 41), Preprocessing(size=(32, 32), intensity="window", low=-1, high=1)),
        ((50, 37), Preprocessing(size=(40, 16), fit="crop_pad", mean=0.1)),
        ((12, 30, 33), Preprocessing(size=(16, 16, 16), spacing_mm=(2.0, 1.5, 0.7))),
        ((12, 30, 33), Preprocessing(size=(20, 15, 33), spacing_mm=(2.0, 1.7, 1.0), fit="crop_pad", std=0.3)),
    ],
)
def test_a_program_that_follows_the_page_gives_the_same_input(shape: tuple[int, ...], data: Preprocessing) -> None:
    values = np.random.default_rng(3).normal(size=shape)
    found = prepare(image(values) if len(shape) == 2 else volume(values, lps((2.5, 1.0, 1.0))), data)
    expected = _as_the_page_says(values.astype(np.float32).astype(float), [2.5, 1.0, 1.0][-len(shape) :], data)
    np.testing.assert_allclose(found[0], expected, atol=2e-6)


# --- augmentation


def augmenter(seed: int = 0, *, size: tuple[int, ...] = (28, 28), mean: float = 0.0, **settings: float) -> Augmenter:
    data = Preprocessing(size=size, mean=mean, augmentation=Augmentation(**settings))  # type: ignore[arg-type]
    made = augmentation(data, False, seed=seed)
    assert made is not None
    return made


EVERYTHING = {
    "flip_up_down": True, "flip_left_right": True, "rotate_deg": 20, "shift_fraction": 0.1, "zoom_fraction": 0.2,
    "intensity_shift": 0.3, "intensity_scale": 0.2, "noise_std": 0.05,
}  # fmt: skip


def test_a_recipe_without_augmentation_has_no_augmenter() -> None:
    assert augmentation(Preprocessing(), True, seed=0) is None
    assert augmentation(Preprocessing(augmentation=Augmentation(probability=0, noise_std=1)), True, seed=0) is None


def test_flips_that_would_swap_sides_are_refused() -> None:
    flip = Augmentation(flip_left_right=True)
    with pytest.raises(ConfigError, match="laterality"):
        augmentation(Preprocessing(augmentation=flip), True, seed=0)
    with pytest.raises(ConfigError, match="orientation"):
        augmentation(Preprocessing(size=(8, 8, 8), orientation="source", augmentation=flip), False, seed=0)


@pytest.mark.parametrize("size", [(28, 20), (12, 14, 16)])
def test_the_same_seed_gives_the_same_changes_and_the_global_generators_are_not_touched(size: tuple[int, ...]) -> None:
    x = torch.rand(8, 1, *size, generator=torch.Generator().manual_seed(0))
    before = x.clone(), torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, second, other = (augmenter(seed, size=size, **EVERYTHING) for seed in (1, 1, 2))
    a, b = first(x), first(x)
    assert torch.equal(a, second(x))
    assert torch.equal(b, second(x))
    assert not torch.equal(a, b)
    assert not torch.equal(a, other(x))
    assert torch.equal(x, before[0])
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_probability_is_the_share_of_changed_samples_and_the_others_stay_to_the_bit() -> None:
    x = torch.rand(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    out = augmenter(3, probability=0.3, rotate_deg=30)(x)
    changed = (out != x).flatten(1).any(1).float().mean().item()
    assert changed == pytest.approx(0.3, abs=0.04)  # 4 standard deviations of a binomial share


@pytest.mark.parametrize(("setting", "axis"), [("flip_left_right", -1), ("flip_up_down", -2)])
@pytest.mark.parametrize("size", [(9, 8), (10, 9, 8)])
def test_a_certain_flip_mirrors_its_axis(setting: str, axis: int, size: tuple[int, ...]) -> None:
    x = torch.rand(4, 1, *size)
    torch.testing.assert_close(augmenter(size=size, probability=1, **{setting: True})(x), x.flip(axis))


def test_a_rotation_is_rigid_on_a_grid_that_is_not_square() -> None:
    """Against scipy: the angle is found back by matching, and the picture agrees."""
    rng = np.random.default_rng(0)
    picture = ndimage.gaussian_filter(rng.normal(size=(40, 60)), 3)
    picture *= np.hanning(40)[:, None] * np.hanning(60)
    (out,) = augmenter(5, size=(40, 60), probability=1, rotate_deg=25)(torch.from_numpy(picture)[None, None])
    angles_deg = np.linspace(-25, 25, 501)
    errors = [np.abs(ndimage.rotate(picture, a, reshape=False, order=1) - out[0].numpy()).max() for a in angles_deg]
    assert min(errors) < 0.02 * np.abs(picture).max()
    assert abs(angles_deg[int(np.argmin(errors))]) > 1


@pytest.mark.parametrize("fit", ["crop_pad", "resize"])
def test_a_ball_that_is_turned_stays_a_ball_however_it_came_to_its_size(fit: str) -> None:
    spacing_mm, counts = (3.0, 1.0, 1.0), (32, 96, 96)  # 96 mm along every axis
    z, y, x = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(counts, spacing_mm, strict=True))
    ball = (z[:, None, None] ** 2 + y[:, None] ** 2 + x**2 < 24**2).astype(np.float32)
    size = counts if fit == "crop_pad" else (32, 32, 32)  # voxels of 3 x 1 x 1 mm, or of 3 mm
    data = Preprocessing(
        size=size, spacing_mm=spacing_mm, intensity="window", low=0, high=1, fit=fit,  # type: ignore[arg-type]
        augmentation=Augmentation(rotate_deg=45, probability=1),
    )  # fmt: skip
    turn = augmentation(data, True, seed=1)
    assert turn is not None
    out = turn(torch.from_numpy(prepare(volume(ball, lps(spacing_mm)), data))[None])[0, 0].numpy()
    at = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * 96 / n for n in size), indexing="ij")
    spread_mm = [float(np.sqrt((out * axis**2).sum() / out.sum())) for axis in at]
    assert spread_mm == pytest.approx([24 / math.sqrt(5)] * 3, rel=0.05)  # of a ball along any axis


def test_what_comes_into_view_from_outside_is_black() -> None:
    x = torch.full((64, 1, 16, 16), 3.0)
    out = augmenter(1, size=(16, 16), mean=0.5, probability=1, shift_fraction=0.5)(x)
    assert out.min().item() == pytest.approx(-0.5)  # black is (0 - mean) / std
    assert out.max().item() == pytest.approx(3.0)


def test_noise_and_intensity_have_the_declared_size() -> None:
    x = torch.zeros(500, 1, 16, 16)
    assert augmenter(1, probability=1, noise_std=0.1)(x).std().item() == pytest.approx(0.1, rel=0.02)
    shifted = augmenter(1, probability=1, intensity_shift=0.3)(x)
    assert 0.29 < shifted.abs().max().item() <= 0.3
    scaled = augmenter(1, probability=1, intensity_scale=0.2)(x + 1)
    assert 0.8 <= scaled.min().item() < 0.81
    assert 1.19 < scaled.max().item() <= 1.2
