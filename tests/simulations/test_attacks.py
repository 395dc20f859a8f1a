"""Attacks: statistics that can be worked out by hand, and pictures that come back, or do not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

import fedicom
from common.config import Phantom
from common.errors import DataError
from simulations.attacks.images import images_of, phantoms
from simulations.attacks.inversion import invert, secure_sum, similarity, update_of, victim
from simulations.attacks.membership import lira, success
from simulations.attacks.study import inversion, membership, recipe_of, table
from simulations.phantoms import make_phantoms

MEDMNIST = Path(__file__).parents[2].parent / "shared" / "data" / "medmnist"


# Membership


def test_lira_on_two_gaussians_has_the_area_that_theory_gives() -> None:
    rng = np.random.default_rng(0)
    inside = rng.random((40, 400)) < 0.5
    easy_N = rng.normal(size=400) * 5  # some patients are easier than others: a threshold does not see through it
    sure = easy_N + rng.normal(size=inside.shape) + 1.0 * inside
    found = success(lira(sure, inside, ~inside), inside)
    # two normal distributions one standard deviation apart
    assert found.auroc == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.02)
    assert success(sure, inside).auroc < 0.6


def test_lira_learns_nothing_where_there_is_nothing() -> None:
    rng = np.random.default_rng(1)
    inside = rng.random((20, 500)) < 0.5
    found = success(lira(rng.normal(size=inside.shape), inside, ~inside), inside)
    assert found.auroc == pytest.approx(0.5, abs=0.02)
    assert found.tpr < 0.01


def test_a_targets_scores_do_not_come_from_its_own_membership() -> None:
    rng = np.random.default_rng(2)
    inside, sure = rng.random((6, 30)) < 0.5, rng.normal(size=(6, 30))
    other = inside.copy()
    other[0] = ~other[0]
    assert np.array_equal(lira(sure, inside, ~inside)[0], lira(sure, other, ~other)[0])


def test_the_rate_at_one_in_a_thousand_is_counted_with_its_interval() -> None:
    inside = np.repeat([True, False], [100, 2000])[None]
    score = np.concatenate([np.full(30, 3.0), np.full(70, 0.5), [2.0, 1.0], np.zeros(1998)])[None]
    found = success(score, inside)  # 2 of 2,000 others may lie above
    assert found.tpr == 1.0
    assert found.negatives == 2000
    interval = binomtest(100, 100).proportion_ci(0.95, method="exact")
    assert (found.tpr_low, found.tpr_high) == (interval.low, interval.high)
    few = success(score[:, :600], inside[:, :600])  # 500 others: none may lie above
    assert few.tpr == 0.30
    assert few.negatives == 500


def test_federations_are_trained_and_attacked() -> None:
    images = phantoms(train=40, test=30)
    (row,) = membership(images, [None], patients=40, models=4, sites=2, seed=1)
    found = row.attacked
    assert len(found.utility) == 4
    assert found.lira.negatives == 4 * 20
    assert found.update.negatives == found.update_threshold.negatives == 4 * 20
    assert found.noise_multiplier is None
    assert found.threshold.auroc > 0.6, "twenty patients are learnt by heart"
    assert table([row], []).count("\n") == 3


# Inversion


@pytest.fixture(scope="module")
def picture() -> tuple[np.ndarray, int]:
    images = phantoms(train=4, test=1)
    return images.train_N[0], int(images.label_N[0])


def test_an_undefended_update_gives_the_picture_back(picture: tuple[np.ndarray, int]) -> None:
    truth, label = picture
    model, target = victim(28, 0), torch.tensor([label])
    update = update_of(model, torch.from_numpy(truth)[None, None], target, None)
    image = invert(model, update, target, 28, iterations=150, restarts=1)[0, 0].numpy()
    psnr, ssim = similarity(truth, image)
    assert psnr > 22
    assert ssim > 0.8


def test_a_private_update_does_not(picture: tuple[np.ndarray, int]) -> None:
    truth, label = picture
    model, target = victim(28, 0), torch.tensor([label])
    recipe = recipe_of(50.0)
    update = update_of(model, torch.from_numpy(truth)[None, None], target, recipe, noise_multiplier=0.5)
    image = invert(model, update, target, 28, iterations=100, restarts=1)[0, 0].numpy()
    assert similarity(truth, image)[1] < 0.2


def test_similarity_knows_the_same_picture_and_noise(picture: tuple[np.ndarray, int]) -> None:
    truth, _ = picture
    assert similarity(truth, truth)[1] == pytest.approx(1.0, abs=1e-5)
    off = np.clip(truth + np.float32(0.1), 0, 1)
    assert similarity(np.zeros_like(truth), np.full_like(truth, 0.1))[0] == pytest.approx(20.0, abs=1e-3)  # 10 lg 100
    assert similarity(truth, off)[1] > similarity(truth, np.random.default_rng(0).random((28, 28), np.float32))[1]


def test_of_a_secure_sum_the_coordinator_has_the_mean_and_otherwise_noise(picture: tuple[np.ndarray, int]) -> None:
    truth, label = picture
    model, target = victim(28, 0), torch.tensor([label])
    shown = [np.clip(truth * part, 0, 1).astype(np.float32) for part in (1.0, 0.7, 0.4)]
    updates = [update_of(model, torch.from_numpy(x)[None, None], target, None) for x in shown]
    masked, mean = secure_sum(updates)
    for got, parts in zip(mean, zip(*updates, strict=True), strict=True):
        assert got.numpy() == pytest.approx(torch.stack(parts).mean(0).numpy(), abs=1e-6)
    flat, true = (torch.cat([part.flatten() for part in update]) for update in (masked, updates[0]))
    # of 15,000 random numbers the cosine with anything has standard deviation 0.008
    assert abs(float(torch.nn.functional.cosine_similarity(flat, true, dim=0))) < 0.04
    image = invert(model, masked, target, 28, iterations=60, restarts=1)[0, 0].numpy()
    assert similarity(truth, image)[1] < 0.2


def test_medmnist_is_read_and_rebuilt() -> None:
    if not (MEDMNIST / "breastmnist.npz").is_file():
        pytest.skip(f"{MEDMNIST} is absent: the shared data sets are not on this machine")
    images = images_of(MEDMNIST / "breastmnist.npz")
    assert images.train_N.shape == (546, 28, 28)
    assert images.train_N.max() <= 1
    gallery = inversion(images, [], together=3, pictures=(0,), iterations=100)
    assert gallery.defences == (
        "none", "secure aggregation, the masked bytes of one site", "secure aggregation, the sum of 3 sites"
    )  # fmt: skip
    assert gallery.rows[0][0].ssim > 0.8
    assert gallery.rows[0][1].ssim < 0.2


def test_the_images_of_hospitals_are_read_as_sites_read_them(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "made", Phantom(patients=6, central_patients=5, size=32), 2)
    images = images_of(tmp_path / "made")
    assert images.train_N.shape[1:] == images.test_N.shape[1:] == (28, 28)
    patients = json.loads((tmp_path / "made" / "hospitals.json").read_text())["sites"]
    assert len(images.test_N) == patients["central"]["patients"]
    assert len(images.train_N) == sum(one["patients"] for name, one in patients.items() if name != "central")
    assert set(images.label_N) == {0, 1}
    assert 0 <= images.train_N.min() < images.train_N.max() <= 1
    again = images_of(tmp_path / "made")
    assert np.array_equal(again.train_N, images.train_N)
    with pytest.raises(DataError, match="holds no hospitals"):
        images_of(tmp_path)


def test_the_command_writes_a_page_with_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["privacy", "attack", "--models", "0", "--patients", "9999", "--epsilon", "8", "--iterations", "5"]
    assert fedicom.main([*words, "--out", str(tmp_path)]) == 0
    assert "| none |" in capsys.readouterr().out
    page = (tmp_path / "attacks.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * (1 + 4)
    assert "img-src data:" in page
    found = json.loads((tmp_path / "attacks.json").read_text())
    assert [one["defence"] for one in found["inversion"]["phantoms"][0]] == [
        "none", "secure aggregation, the masked bytes of one site", "secure aggregation, the sum of 5 sites",
        "epsilon 8",
    ]  # fmt: skip
    assert fedicom.main(["privacy", "attack", "--models", "2"]) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--epsilon 0", "got 0, expected a number from 1e-6 to 1e6, or none"),
        ("--patients 7", "--patients: got 7; 2 sites.* need at least 8"),
        ("--sites 0", "--sites: got 0, expected at least 1"),
        ("--pictures -1", "--pictures: got -1, expected at least 0"),
        ("--iterations 0", "--iterations: got 0, expected at least 1"),
        ("--seed -1", "--seed: got -1, expected at least 0"),
        ("--out {file}", "the folder of --out could not be written"),  # after minutes of attacks before
    ],
)
def test_an_attack_that_cannot_be_made_is_refused_in_words_before_it_begins(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("simulations.attacks.images.phantoms", lambda **_: pytest.fail("it began"))
    try:
        code = fedicom.main(["privacy", "attack", *words.format(file=tmp_path / "file").split()])
    except SystemExit as ended:
        code = ended.code
    assert code in (1, 2)
    assert re.search(says, capsys.readouterr().err)
