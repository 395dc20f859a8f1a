"""`prepare` gives what MONAI's transforms give, one after the other, and needs a fraction of their memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monai.data.meta_tensor import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms.croppad.array import ResizeWithPadOrCrop
from monai.transforms.intensity.array import GaussianSmooth, ScaleIntensityRange
from monai.transforms.spatial.array import Orientation, Resize, Spacing

from common.config import Preprocessing
from common.imaging import Image, Volume, prepare
from common.imaging.preprocess import _LABELS, _LPS_TO_RAS
from common.imaging.resample import Grid, widths
from tests.common.test_imaging_prepare import image, volume


def by_monai(item: Volume | Image, data: Preprocessing) -> Any:
    """The chain that `prepare` was, out of MONAI's own transforms."""
    flat = isinstance(item, Image)
    values = item.values_YX if flat else item.values_ZYX
    affine = np.diag([*(item.spacing_mm or (1.0, 1.0)), 1.0, 1.0]) if flat else _LPS_TO_RAS @ item.affine
    scaled = ScaleIntensityRange(data.low, data.high, 0.0, 1.0, clip=True)(torch.from_numpy(values.copy()))
    x = MetaTensor(torch.as_tensor(scaled)[None], affine=torch.from_numpy(affine))
    if not flat and data.orientation != "source":
        x = Orientation(axcodes=data.orientation[::-1], labels=_LABELS)(x)

    def smooth(ratio: Any) -> None:
        nonlocal x
        sigma = np.maximum((ratio - 1) / 2, 0)
        if sigma.max() >= 0.1:
            x = GaussianSmooth(sigma=sigma.tolist())(x)

    if data.spacing_mm is not None:
        ratio = np.array(data.spacing_mm) / np.asarray(affine_to_spacing(x.affine, r=len(data.size)))
        if not np.allclose(ratio, 1, rtol=1e-3):
            smooth(ratio)
            x = Spacing(pixdim=data.spacing_mm, mode="bilinear", padding_mode="border")(x)
    if tuple(x.shape[1:]) != data.size:
        if data.fit == "resize":
            smooth(np.array(x.shape[1:]) / np.array(data.size))
            x = Resize(spatial_size=data.size, mode="bilinear" if flat else "trilinear")(x)
        else:
            x = ResizeWithPadOrCrop(spatial_size=data.size, mode="constant", value=0.0)(x)
    return (x.numpy() - data.mean) / data.std


def told_apart(spacing: Any, wanted: Any) -> bool:
    """Both sides see one spacing, or both see two: MONAI's `Spacing` leaves up to 1.01e-3 alone, we up to 1e-3."""
    return wanted is None or not 0.999e-3 < np.abs(np.array(wanted) / spacing - 1).max() < 1.011e-3


edges = st.integers(2, 14)
steps = st.floats(0.4, 4.0)
sizes = st.integers(8, 20)
turns = st.permutations([0, 1, 2])
signs = st.tuples(*[st.sampled_from([1, -1])] * 3)


@given(
    shape=st.tuples(edges, edges, edges),
    spacing=st.tuples(steps, steps, steps),
    wanted=st.none() | st.tuples(steps, steps, steps),
    size=st.tuples(sizes, sizes, sizes),
    turn=turns,
    sign=signs,
    fit=st.sampled_from(["resize", "crop_pad"]),
    orientation=st.sampled_from(["LPS", "RAS", "source"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_a_volume_comes_out_as_from_monai(
    shape: Any, spacing: Any, wanted: Any, size: Any, turn: Any, sign: Any, fit: Any, orientation: Any, seed: int
) -> None:
    assume(told_apart(spacing, wanted))
    values = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
    affine = np.eye(4)
    # no axis exactly between two others: nibabel then takes the one or the other
    tip = np.array([[0.99, -0.1, 0.05], [0.1, 0.99, -0.02], [-0.05, 0.02, 0.99]])
    tip = np.linalg.qr(tip)[0]
    affine[:3, :3] = (tip[:, turn] * np.array(sign)) @ np.diag(spacing)
    affine[:3, 3] = (3, -40, 7)
    data = Preprocessing(
        size=size, spacing_mm=wanted, fit=fit, orientation=orientation, intensity="window", low=-2, high=2, mean=0.4,
        std=0.3,
    )  # fmt: skip
    item = volume(values, affine)
    np.testing.assert_allclose(prepare(item, data), by_monai(item, data), atol=2e-5)


@given(
    shape=st.tuples(edges, edges),
    spacing=st.tuples(steps, steps),
    wanted=st.none() | st.tuples(steps, steps),
    size=st.tuples(sizes, sizes),
    fit=st.sampled_from(["resize", "crop_pad"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None)
def test_an_image_comes_out_as_from_monai(
    shape: Any, spacing: Any, wanted: Any, size: Any, fit: Any, seed: int
) -> None:
    assume(told_apart(spacing, wanted))
    values = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
    data = Preprocessing(size=size, spacing_mm=wanted, fit=fit, intensity="window", low=-2, high=2)
    item = image(values, spacing)
    np.testing.assert_allclose(prepare(item, data), by_monai(item, data), atol=2e-5)


@pytest.mark.parametrize("shape", [(40, 256, 200), (30, 200, 256)])
def test_a_real_size_comes_out_as_from_monai_and_needs_a_third_of_the_volume_on_top(shape: Any) -> None:
    values = np.random.default_rng(1).normal(0, 300, shape).astype(np.float32)
    data = Preprocessing(size=(32, 64, 64), spacing_mm=(3, 1.2, 1.2), intensity="window", low=-1000, high=1000)
    item = volume(values, np.diag([-2.5, -0.8, 0.8, 1.0]))
    prepare(item, data)  # imports
    tracemalloc.start()
    try:
        made = prepare(item, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(made, by_monai(item, data), atol=2e-5)
    assert peak < values.nbytes / 3


def test_nothing_is_multiplied_where_nothing_changes() -> None:
    assert Grid.of((5, 6), (5, 6), (1, 1), (1.0004, 1), "resize").matrices() == [None, None]
    assert Grid.of((5, 6), (5, 8), (1, 1), None, "crop_pad").matrices()[0] is None
    assert widths([1.19, 1.0]).tolist() == [0, 0]  # 0.095 voxels: nothing worth smoothing


def test_what_rounding_leaves_of_a_tipped_spacing_decides_nothing() -> None:
    # 1.5 mm of 0.4 mm: a Gaussian of 1.375 voxels, whose fourfold ends between two voxels.
    straight = Grid.of((9,), (4,), (0.4,), (1.5,), "resize").matrices()[0]
    tipped = Grid.of((9,), (4,), (0.40000000000000013,), (1.5,), "resize").matrices()[0]
    assert straight.nnz == tipped.nnz
    np.testing.assert_allclose(straight.toarray(), tipped.toarray(), atol=1e-12)
