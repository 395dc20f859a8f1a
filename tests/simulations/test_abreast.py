"""Sites that train in one pass: what they end with, who trains with whom, and when it is not done."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from client.cohort import Cohort
from client.dp import Sampling, seeded_noise
from client.train import Private, Trained, mixes, train
from common.config import Augmentation, ModelConfig, Preprocessing, Privacy, Recipe, Simulation, Task, Training
from common.errors import ConfigError, DivergedError
from common.models import build, get_weights
from common.samples import Samples
from common.weights import Weights
from simulations import abreast as module
from simulations.abreast import Abreast, Visit, alike, train_abreast
from simulations.grid import InProcessGrid, _StoppedError
from simulations.run import simulate
from tests.test_federation import SEEDED, hospitals, no_export, settings_of, weights_of

__all__ = ["hospitals", "no_export"]

CPU = torch.device("cpu")
PRIVATE = Privacy(mechanism="dp_sgd", epsilon=8.0, delta=1e-3, unsafe_seeded_noise=True)
SMALL = ModelConfig(family="monai", name="resnet10", width=0.125, stem="small")
LINEAR = ModelConfig(family="scattering", name="linear")
FLAT = Preprocessing(size=(16, 16))


def recipe_of(**parts: Any) -> Recipe:
    training = Training(optimizer="sgd", lr=0.05, momentum=0.9, batch_size=5, local_epochs=2)
    given = {"name": "tiny", "seed": 3, "rounds": 4, "data": FLAT, "model": SMALL, "training": training}
    return Recipe(**(given | parts))


def cohort_of(site: int, patients: int = 12, size: tuple[int, ...] = (16, 16), images: int = 1) -> Cohort:
    rng = np.random.default_rng([5, site])
    patient_N = np.repeat(np.arange(patients), images)
    targets_N = ((patient_N + site) % 3 == 0).astype(np.int64)  # another share at each site
    targets_N[-1] = 1
    x_N = rng.normal(size=(len(patient_N), 1, *size)).astype(np.float32)
    x_N[:, :, 4:9, 4:9] += 2.0 * targets_N.reshape(-1, *[1] * (x_N.ndim - 1))
    names = tuple(f"p{n}" for n in range(patients))
    return Cohort(Samples(x_N, targets_N, patient_N, names, {}, ""), np.full(patients, "train"), "", {}, 2)


def visit_of(recipe: Recipe, weights: Weights, site: int, patients: int = 12, images: int = 1) -> Visit:
    private = None
    if recipe.privacy.active:
        # The site's own stream: who is drawn, and the noise.
        private = Private(sampling=Sampling(rate=0.4, steps=3), noise_multiplier=0.5, noise=seeded_noise(site))
    cohort = cohort_of(site, patients, recipe.data.size, images)
    return Visit(weights=weights, cohort=cohort, round=2, site=f"s{site}", private=private)


def both(recipe: Recipe, images: int = 1) -> list[tuple[Trained, Trained]]:
    """Each site trained alone, and all abreast; of different sizes, where that can be."""
    model, weights = build(recipe), get_weights(build(recipe))
    sizes = (12, 12, 12, 12) if mixes(model.train()) else (12, 14, 11, 13)

    def visits() -> list[Visit]:
        return [visit_of(recipe, weights, site, patients, images) for site, patients in enumerate(sizes)]

    assert len({alike(model, recipe, visit) for visit in visits()}) == 1
    alone = [
        train(model, v.weights, v.cohort, recipe, round_=v.round, site=v.site, device=CPU, private=v.private)
        for v in visits()
    ]
    found = train_abreast(model, recipe, visits(), CPU)
    assert all(isinstance(result, Trained) for result in found)
    return list(zip(alone, found, strict=True))  # type: ignore[arg-type]


def away(a: Weights, b: Weights) -> float:
    return (a - b).norm / b.norm


RECIPES = {
    "batch norms, momentum": recipe_of(),
    "every extra of a plain step": recipe_of(
        model=replace(SMALL, norm="group"),
        data=replace(FLAT, augmentation=Augmentation(noise_std=0.1, rotate_deg=5.0)),
        training=Training(
            lr=0.01, weight_decay=0.1, batch_size=5, layer_lr_decay=0.7, proximal_mu=0.5, gradient_clip=0.3,
            class_weights="balanced", loss="focal", label_smoothing=0.1,
        ),
    ),
    "volumes": recipe_of(
        task=Task(dimensions=3),
        data=Preprocessing(size=(8, 8, 8)),
        model=replace(SMALL, dimensions=3),
        training=Training(optimizer="sgd", batch_size=6, lr=0.01),
    ),
    "a head on a fixed network": recipe_of(),
    "privacy": recipe_of(privacy=PRIVATE),
    "privacy, a clip norm that follows": recipe_of(privacy=replace(PRIVATE, clip_quantile=0.5)),
    "privacy, a linear layer over scattering": recipe_of(
        privacy=PRIVATE,
        model=LINEAR,
        training=Training(optimizer="sgd", lr=0.5, batch_size=5, class_weights=(0.5, 2.0)),
    ),
    "privacy, a head on a fixed network": recipe_of(privacy=PRIVATE, model=replace(SMALL, norm="group")),
    "privacy, two views, scattering": recipe_of(
        privacy=replace(PRIVATE, views=2), model=LINEAR
    ),
}  # fmt: skip


def on_fixed(recipe: Recipe, folder: Path) -> Recipe:
    """Only the head is trained."""
    file = folder / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in build(recipe).state_dict().items()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return replace(
        recipe, model=replace(recipe.model, trainable="head", weights_file=str(file), weights_sha256=digest)
    )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_sites_abreast_end_where_each_ends_alone(name: str, tmp_path: Path) -> None:
    recipe = on_fixed(RECIPES[name], tmp_path) if "fixed" in name else RECIPES[name]
    found = both(recipe, images=3 if "views" in name else 1)
    for alone, together in found:
        assert away(together.delta, alone.delta) < (1e-3 if recipe.training.optimizer == "adamw" else 1e-4)
        assert together.steps == alone.steps
        for one, other in ((together.loss, alone.loss), (together.clip_norm, alone.clip_norm)):
            assert (one is None) == (other is None)
            assert one is None or one == pytest.approx(other, rel=1e-4)
        assert list(together.delta) == list(alone.delta)
    # and the sites differ from each other by far more, or this would show nothing
    assert away(found[0][1].delta, found[1][1].delta) > 0.05


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_where_a_linear_layer_is_all_that_is_trained_no_gradient_of_a_patient_is_formed_and_the_sums_are_the_same(
    views: int, broken: bool, weighted: bool
) -> None:
    recipe, random = recipe_of(privacy=PRIVATE, model=LINEAR), torch.Generator().manual_seed(4)
    model = build(recipe).train()
    values = {name: torch.randn(2, *value.shape, generator=random) for name, value in module.trainable(model).items()}
    x = torch.randn(2, 5, views, 1, 16, 16, generator=random)
    if broken:
        x[1, 3, views - 1] = torch.nan
    target = torch.randint(2, (2, 5, views), generator=random)
    weights = torch.tensor([[0.5, 2.0], [1.0, 3.0]]) if weighted else None
    drawn = module._Drawn(model, recipe, values, weights, x, target)
    found, expected = module._of_linear(drawn), module._of_patients(drawn)
    assert found is not None
    finite = torch.isfinite(expected[0])
    assert finite.tolist() == [[True] * 5, [True, True, True, not broken, True]]
    torch.testing.assert_close(found[0], expected[0], equal_nan=True, rtol=1e-5, atol=0)
    factors = torch.where(finite, torch.rand(2, 5, generator=random), 0)
    sums, right = (summed(factors, not broken) for _, summed in (found, expected))
    assert sums.keys() == right.keys() == {"fc.weight", "fc.bias"}
    for name, value in right.items():
        torch.testing.assert_close(sums[name], value, rtol=1e-4, atol=1e-6)


def test_a_linear_layer_at_many_places_of_an_image_or_beside_others_takes_the_usual_way() -> None:
    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x[:, 0]).mean(1)

    recipe, random = recipe_of(privacy=PRIVATE), torch.Generator().manual_seed(4)
    for model in (Tokens(), build(recipe_of(model=replace(SMALL, norm="group")))):
        values = {
            name: torch.randn(2, *value.shape, generator=random) for name, value in module.trainable(model).items()
        }
        x, target = torch.randn(2, 3, 1, 1, 16, 16, generator=random), torch.zeros(2, 3, 1, dtype=torch.int64)
        assert module._of_linear(module._Drawn(model, recipe, values, None, x, target)) is None
        assert not list(getattr(model, "fc", model)._forward_hooks)


def test_one_that_leaves_the_finite_numbers_fails_alone() -> None:
    recipe = recipe_of()
    weights = get_weights(build(recipe))
    visits = [visit_of(recipe, weights, site) for site in range(3)]
    visits[1].cohort.samples.x_N[3] = np.inf  # type: ignore[index]
    found = train_abreast(build(recipe), recipe, visits, CPU)
    assert [type(result) for result in found] == [Trained, DivergedError, Trained]


def test_a_private_step_in_which_no_site_draws_anybody_is_noise_alone() -> None:
    recipe = recipe_of(privacy=PRIVATE)
    weights = get_weights(build(recipe))

    def visits() -> list[Visit]:
        found = [visit_of(recipe, weights, site) for site in range(2)]
        nobody = Sampling(rate=1e-9, steps=2)
        return [replace(v, private=replace(v.private, sampling=nobody)) for v in found]  # type: ignore[type-var]

    together = train_abreast(build(recipe), recipe, visits(), CPU)
    for v, result in zip(visits(), together, strict=True):
        alone = train(build(recipe), weights, v.cohort, recipe, round_=2, site=v.site, device=CPU, private=v.private)
        assert isinstance(result, Trained)
        assert away(result.delta, alone.delta) < 1e-6


# Who trains with whom


def trainer(tmp_path: Path, recipe: Recipe, width: int = 4, **faster: float) -> Abreast:
    known = {key.removeprefix("of"): (value, "") for key, value in faster.items()}
    (tmp_path / "abreast.json").write_text(json.dumps(known))
    return Abreast(build(recipe), recipe, CPU, width=width, out=tmp_path)


def all_at_once(found: Abreast, visits: list[Visit], *, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    results: dict[str, Any] = {}

    def one(visit: Visit) -> None:
        try:
            if visit.site not in leave:
                results[visit.site] = found.train(
                    visit.weights, visit.cohort, round_=visit.round, site=visit.site, private=visit.private
                )
        except Exception as error:
            results[visit.site] = error
        finally:
            found.left(visit.site)

    found.expect([visit.site for visit in visits])
    threads = [threading.Thread(target=one, args=(visit,)) for visit in visits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_only_sites_of_one_size_train_together_and_one_that_refuses_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, passes = recipe_of(), []
    real = module.train_abreast

    def seen(model: Any, recipe: Any, visits: Any, device: Any) -> Any:
        passes.append([visit.site for visit in visits])
        return real(model, recipe, visits, device)

    monkeypatch.setattr(module, "train_abreast", seen)
    weights = get_weights(build(recipe))
    visits = [visit_of(recipe, weights, site, patients) for site, patients in enumerate((12, 10, 12, 12, 12, 9))]
    results = all_at_once(trainer(tmp_path, recipe, width=6, of4=2.0), visits, leave=("s3",))
    assert passes == [["s0", "s2", "s4"]]
    assert {site: type(result) for site, result in results.items()} == dict.fromkeys(
        ("s0", "s1", "s2", "s4", "s5"), Trained
    )
    alone = train(build(recipe), weights, visits[1].cohort, recipe, round_=2, site="s1", device=CPU)
    assert results["s1"].delta.digest == alone.delta.digest  # the one of its size: to the bit


def test_a_pass_that_fails_fails_for_each_of_its_sites_and_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "train_abreast", broken)
    recipe = recipe_of()
    weights = get_weights(build(recipe))
    results = all_at_once(trainer(tmp_path, recipe, of2=2.0), [visit_of(recipe, weights, site) for site in range(2)])
    assert sorted(type(result).__name__ for result in results.values()) == ["RuntimeError", "TrainingError"]


# When it is not done


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (recipe_of(model=ModelConfig(family="scattering", name="linear", dropout=0.5)), "random"),
        (recipe_of(model=replace(LINEAR, dropout=0.5), privacy=PRIVATE), "random"),
        (recipe_of(), "away from one that was trained alone"),
    ],
    ids=["dropout", "dropout under privacy", "other numbers"],
)
def test_where_it_cannot_be_right_they_train_one_after_another(
    recipe: Recipe, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "away" in why:

        def wrong(parameters: Any, anchor: Any, recipe: Any) -> None:
            for value in parameters.values():
                value.grad.mul_(1.1)

        monkeypatch.setattr(module, "_finish_gradients", wrong)
    weights = get_weights(build(recipe))
    visits = [visit_of(recipe, weights, site) for site in range(2)]
    results = all_at_once(trainer(tmp_path, recipe), visits)
    for fresh in (visit_of(recipe, weights, site) for site in range(2)):
        alone = train(
            build(recipe), weights, fresh.cohort, recipe, round_=2, site=fresh.site, device=CPU, private=fresh.private
        )
        assert results[fresh.site].delta.digest == alone.delta.digest
    ((factor, reason),) = json.loads((tmp_path / "abreast.json").read_text()).values()
    assert factor == 0
    assert why in reason
    assert why in module.told(tmp_path)


def test_where_a_trial_has_found_no_gain_nobody_waits_for_anybody(tmp_path: Path) -> None:
    recipe = recipe_of()
    weights = get_weights(build(recipe))
    found, visit = trainer(tmp_path, recipe, of4=1.1), visit_of(recipe, weights, 0)
    found.expect(["s0", "s1"])  # and s1 never comes
    result = found.train(weights, visit.cohort, round_=2, site="s0", private=None)
    alone = train(build(recipe), weights, visit.cohort, recipe, round_=2, site="s0", device=CPU)
    assert result.delta.digest == alone.delta.digest


def test_it_is_told_what_became_of_the_wish(tmp_path: Path) -> None:
    assert "no two" in module.told(tmp_path)
    for factor, said in ((0.4, "would be 0.4 times as fast"), (1.9, "Up to 4 sites trained abreast, 1.9 times")):
        (tmp_path / "abreast.json").write_text(json.dumps({"4": (factor, "")}))
        assert said in module.told(tmp_path)


def test_what_a_trial_draws_comes_from_no_site(tmp_path: Path) -> None:
    recipe = recipe_of(privacy=PRIVATE)
    weights = get_weights(build(recipe))
    found = trainer(tmp_path, recipe, width=2)
    results = all_at_once(found, [visit_of(recipe, weights, site) for site in range(2)])
    assert set(json.loads((tmp_path / "abreast.json").read_text())) == {"2"}  # a trial was made
    for site in range(2):
        v = visit_of(recipe, weights, site)
        alone = train(build(recipe), weights, v.cohort, recipe, round_=2, site=v.site, device=CPU, private=v.private)
        assert away(results[v.site].delta, alone.delta) < 1e-4


def test_more_processes_and_sites_abreast_exclude_each_other(tmp_path: Path, hospitals: Path) -> None:
    settings = settings_of(tmp_path / "out", hospitals)
    wrong = replace(settings, simulation=replace(settings.simulation, abreast=3, workers=2))
    with pytest.raises(ConfigError, match=r"simulation\.abreast is 3.*workers=1"):
        simulate(wrong)


# A whole federation


@pytest.mark.parametrize("privacy", [Privacy(), SEEDED], ids=["plain", "private"])
def test_a_federation_abreast_ends_with_the_weights_of_one_after_another(
    privacy: Privacy, tmp_path: Path, hospitals: Path, no_export: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 8, 12 and 20 patients: two of them take equally many steps
    parts = {"training": Training(optimizer="sgd", lr=0.05, batch_size=20), "model": replace(SMALL, norm="group")}
    monkeypatch.setattr(Abreast, "_measured", lambda self, visits: module._Trial(2.0, ""))  # as if it won
    passes: list[int] = []
    real = module.train_abreast

    def seen(model: Any, recipe: Any, visits: Any, device: Any) -> Any:
        passes.append(len(visits))
        return real(model, recipe, visits, device)

    monkeypatch.setattr(module, "train_abreast", seen)
    one, three = (settings_of(tmp_path / name, hospitals, privacy, **parts) for name in ("one", "three"))
    three = replace(three, simulation=Simulation(hospitals=str(hospitals), device="cpu", threads=1, abreast=3))
    simulate(one)
    assert not passes
    simulate(three)
    assert passes
    assert max(passes) > 1
    start = get_weights(build(one.recipe))
    moved = weights_of(one) - start
    assert away(weights_of(three) - start, moved) < 1e-3
    assert "2.0 times" in module.told(tmp_path / "three")
    first = weights_of(three)
    simulate(replace(three, overwrite=True))
    assert weights_of(three).digest == first.digest  # the same passes, whoever comes first


def test_a_simulation_that_stops_frees_those_who_wait_for_others(tmp_path: Path) -> None:
    recipe = recipe_of()
    found = trainer(tmp_path, recipe, width=2)
    weights = get_weights(build(recipe))
    waits = threading.Event()

    def app(message: Any, context: Any) -> Any:
        visit = visit_of(recipe, weights, 0)
        waits.set()
        return found.train(visit.weights, visit.cohort, round_=1, site=context.node_config["site"], private=None)

    grid = InProcessGrid(["s0", "s1"], app, abreast=found)  # type: ignore[arg-type]
    found.expect(["s0", "s1"])

    def visit() -> None:
        with suppress(_StoppedError):
            grid._local(_letter())

    thread = threading.Thread(target=visit, daemon=True)
    grid._threads.append(thread)
    thread.start()
    assert waits.wait(30)
    grid.close()
    assert not thread.is_alive()


def _letter() -> Any:
    from flwr.app import Message, RecordDict

    return Message(RecordDict(), 1000, "train")
