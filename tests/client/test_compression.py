"""Error feedback: what rounding leaves out of one update goes into the next, and nothing else is remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from client import site as module
from client.compression import Remainders
from client.train import Trained, train
from common.audit import verify
from common.compression import holds, quantised
from common.config import Federation, ModelConfig, Privacy
from common.errors import ExchangeError, StorageError
from common.exchange import RoundPlan, Update
from common.weights import Weights
from tests.client.test_site import House, recipe_of

START = Weights({"w": np.zeros((4, 300), np.float32), "b": np.zeros(4, np.float32)})
RECIPE = "a" * 64
SMALL = ("bfloat16", "int8")


def plan(round_: int, recipe: str = RECIPE) -> RoundPlan:
    return RoundPlan(recipe_id=recipe, round=round_, work="train", weights=START)


def change(seed: int, scale: float = 1.0) -> Weights:
    rng = np.random.default_rng(seed)
    return Weights({name: (scale * rng.standard_normal(a.shape)).astype(np.float32) for name, a in START.items()})


def wide(weights: Weights) -> dict[str, Any]:
    return {name: array.astype(np.float64) for name, array in weights.items()}


def left_in(folder: Path, round_: int) -> dict[str, Any]:
    return dict(load_file(folder / f"{RECIPE[:16]}-{round_:06d}.safetensors"))


@pytest.mark.parametrize("form", SMALL)
def test_what_was_sent_and_what_is_left_are_all_that_was_trained(tmp_path: Path, form: Any) -> None:
    remainders, trained, sent = Remainders(tmp_path, form), [], []
    for round_ in range(1, 20):
        trained.append(wide(change(round_)))
        sent.append(wide(remainders.rounded(plan(round_), change(round_))))
    left = left_in(tmp_path, 19)
    assert set(left) == {"w"}  # nothing is left of vectors
    total = sum(each["w"] for each in sent) + left["w"]
    assert np.abs(total - sum(each["w"] for each in trained)).max() < 19 * 2.0**-23 * 8  # one float32 addition a round
    assert all(np.array_equal(one["b"], other["b"]) for one, other in zip(trained, sent, strict=True))


def test_without_compression_nothing_is_changed_or_kept(tmp_path: Path) -> None:
    delta = change(1)
    assert Remainders(tmp_path / "remainders", "none").rounded(plan(1), delta) is delta
    assert not (tmp_path / "remainders").exists()


@pytest.mark.parametrize("form", SMALL)
def test_a_round_that_is_done_again_sends_the_same_bits(tmp_path: Path, form: Any) -> None:
    Remainders(tmp_path, form).rounded(plan(1), change(1))
    first = Remainders(tmp_path, form).rounded(plan(2), change(2))
    assert Remainders(tmp_path, form).rounded(plan(2), change(2)) == first  # another process: it remembers nothing
    assert first != quantised(change(2), form)
    third = Remainders(tmp_path, form).rounded(plan(5), change(3))  # it was not asked in between
    assert third == Remainders(tmp_path, form).rounded(plan(5), change(3))
    assert sorted(path.name[17:23] for path in tmp_path.iterdir()) == ["000002", "000005"]


def test_what_could_not_be_kept_does_not_leave(tmp_path: Path) -> None:
    (tmp_path / "remainders").write_text("no folder")
    with pytest.raises(StorageError):
        Remainders(tmp_path / "remainders", "int8").rounded(plan(1), change(1))


def test_recipes_remember_apart_and_are_forgotten_apart(tmp_path: Path) -> None:
    remainders = Remainders(tmp_path, "int8")
    remainders.rounded(plan(1), change(1))
    assert remainders.rounded(plan(2, "b" * 64), change(2)) == quantised(change(2), "int8")
    remainders.forget(RECIPE)
    assert [path.name[:16] for path in tmp_path.iterdir()] == ["b" * 16]


def test_a_file_that_does_not_hold_counts_as_none_and_one_of_another_network_is_refused(tmp_path: Path) -> None:
    remainders = Remainders(tmp_path, "int8")
    remainders.rounded(plan(1), change(1))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert remainders.rounded(plan(2), change(2)) == quantised(change(2), "int8")
    save_file({"w": np.ones((4, 300), np.int32)}, tmp_path / f"{RECIPE[:16]}-000002.safetensors")
    assert remainders.rounded(plan(3), change(3)) == quantised(change(3), "int8")
    with pytest.raises(ExchangeError, match="of another network"):
        remainders.rounded(plan(4), Weights({"w": np.ones((2, 2), np.float32)}))


@pytest.mark.parametrize("feedback", [True, False])
def test_int8_stalls_where_small_steps_share_a_block_with_large_ones_unless_they_are_remembered(
    tmp_path: Path, feedback: bool
) -> None:
    # Each round goes a tenth of the way to 0.05: steps of 0.005 and less. The first number swings by 1, so the unit of
    # the block is 1/64, and all of them are rounded to 0.
    remainders, at = Remainders(tmp_path, "int8"), np.zeros((1, 8), np.float32)
    for round_ in range(1, 81):
        step = (0.05 - at) / 10
        step[0, 0] = (-1.0) ** round_
        delta = Weights({"w": step})
        sent = remainders.rounded(plan(round_), delta) if feedback else quantised(delta, "int8")
        at = at + sent["w"]
    error = np.abs(at[0, 1:] - 0.05).max()
    if feedback:
        assert error < 1 / 64  # one unit
    else:
        assert error == pytest.approx(0.05)


# At a site


def compressed(form: str, **parts: Any) -> Any:
    federation = Federation(compression=form)  # type: ignore[arg-type]
    return recipe_of(parts.pop("privacy", Privacy()), federation=federation, **parts)


def visits(house: House, rounds: int = 3, **options: Any) -> list[Update]:
    site, found = house.open(**options), []
    for round_ in range(1, rounds + 1):
        update = site.visit(house.plan(round_))
        assert isinstance(update, Update)
        found.append(update)
    return found


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """What training gave, as it left the room of training."""
    deltas: list[Weights] = []

    def recording(*words: Any, **named: Any) -> Trained:
        trained = train(*words, **named)
        deltas.append(trained.delta)
        return trained

    monkeypatch.setattr(module, "train", recording)
    return deltas


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_what_leaves_is_of_the_form_and_the_log_says_its_bytes(tmp_path: Path, norm: Any) -> None:
    model = ModelConfig(family="monai", name="resnet10", width=0.125, stem="small", norm=norm)
    house = House(tmp_path, compressed("int8", model=model))
    updates = visits(house)
    facts = [event.facts for event in verify(house.log) if event.kind == "update sent"]
    for update, said in zip(updates, facts, strict=True):
        assert update.compression == said["compression"] == "int8"
        assert holds(update.delta, "int8")
        assert said["bytes"] == update.nbytes < update.delta.nbytes / 3.5
        assert (said["digest"], said["norm"]) == (update.delta.digest, update.delta.norm)
        vectors = [name for name, array in update.delta.items() if array.ndim == 1]
        assert any("running_var" in name for name in vectors) == (norm == "batch")


PRIVATE = Privacy(mechanism="dp_sgd", epsilon=8.0, delta=1e-3, unsafe_seeded_noise=True)


def test_privacy_costs_the_same_and_what_is_remembered_follows_from_noised_changes_alone(
    tmp_path: Path, recorded: list[Weights]
) -> None:
    plain = House(tmp_path / "plain", compressed("none", privacy=PRIVATE))
    small = House(tmp_path / "small", compressed("int8", privacy=PRIVATE))
    before = visits(plain, seeded_noise=True)
    noised = list(recorded)  # all that a site without compression sends
    assert [update.delta for update in before] == noised
    recorded.clear()
    after = visits(small, seeded_noise=True)
    assert recorded == noised  # seeded: the same noise, from the same plans
    assert [update.spent for update in after] == [update.spent for update in before]
    assert small.ledger.spent() == plain.ledger.spent()
    left: dict[str, Any] = {}
    for delta, update in zip(noised, after, strict=True):
        whole = Weights({name: array + left[name] if name in left else array for name, array in delta.items()})
        assert update.delta == quantised(whole, "int8")
        left = {name: whole[name] - update.delta[name] for name in whole if whole[name].ndim > 1}
    (path,) = (tmp_path / "small" / "remainders").glob("*-000003.safetensors")
    assert Weights(load_file(path)) == Weights(left)


@pytest.mark.parametrize("keep", [True, False])
def test_killed_after_any_file_of_a_round_a_site_sends_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    recipe = compressed("int8", rounds=2)
    never = visits(House(tmp_path / "never", recipe), 2, keep=keep)

    class KilledError(BaseException):
        """As SIGKILL: nothing of the site handles it."""

    def killing(real: Callable[..., Any], before: bool) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            if not before:
                real(*words, **named)
            raise KilledError

        return call

    places = [(Remainders, "rounded"), (module.Site, "_sent"), (module.Outbox, "keep")][: 3 if keep else 2]
    for number, (where, name) in enumerate(places):
        for before in (True, False):
            house = House(tmp_path / f"{number}-{before}", recipe)
            first = house.open(keep=keep).visit(house.plan(1))
            assert first == replace(never[0], audit_head=first.audit_head, train_loss=first.train_loss)
            with monkeypatch.context() as patched:
                patched.setattr(where, name, killing(getattr(where, name), before))
                with pytest.raises(KilledError):
                    house.open(keep=keep).visit(house.plan(2))
            again = house.open(keep=keep).visit(house.plan(2))
            assert isinstance(again, Update)
            assert again.delta == never[1].delta


def test_the_closing_evaluation_removes_what_was_left(tmp_path: Path) -> None:
    house = House(tmp_path, compressed("bfloat16", rounds=1))
    visits(house, 1)
    assert len(list((tmp_path / "remainders").iterdir())) == 1
    house.open().visit(house.plan(2, "evaluate"))
    assert list((tmp_path / "remainders").iterdir()) == []
