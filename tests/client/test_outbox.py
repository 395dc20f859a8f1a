"""The reply that a site keeps: found for its own question alone, and replaced once the next one is written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from client.outbox import Outbox
from common.errors import StorageError
from common.exchange import RoundPlan, Update
from common.weights import Weights

RECIPE, OTHER = "a" * 64, "b" * 64


def plan(round_: int = 1, recipe_id: str = RECIPE, work: str = "train", start: float = 0.0) -> RoundPlan:
    weights = Weights({"w": np.full(2, start, np.float32)})
    return RoundPlan(recipe_id=recipe_id, round=round_, work=work, weights=weights)  # type: ignore[arg-type]


def update(asked: RoundPlan, moved: float = 1.0) -> Update:
    delta = Weights({"w": np.full(2, moved, np.float32)} if asked.work == "train" else {})
    return Update(
        site="north", recipe_id=asked.recipe_id, round=asked.round, base=asked.weights.digest, delta=delta, weight=1.0,
        steps=1,
    )  # fmt: skip


def found(box: Outbox, asked: RoundPlan) -> tuple[int, float] | None:
    kept = box.find(asked.recipe_id, asked.round, asked.weights.digest, asked.work)
    return None if kept is None else (kept.reservation, float(kept.update.delta.norm))


@pytest.fixture
def box(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox", lambda number: None)


def names(folder: Path, recipe_id: str = RECIPE) -> list[str]:
    return sorted(path.name.split(".", 1)[1] for path in folder.glob(f"outbox/{recipe_id[:16]}*"))


def test_a_kept_reply_is_found_for_its_own_question_alone(box: Outbox) -> None:
    assert found(box, plan()) is None
    kept = box.keep(plan(), update(plan(), 3.0), 7)
    assert kept.name.endswith(".7.bin")
    assert found(Outbox(kept.parent), plan()) == (7, pytest.approx(3 * 2**0.5))
    for other in (plan(2), plan(recipe_id=OTHER), plan(work="evaluate"), plan(start=1.0)):
        assert found(box, other) is None


def test_questions_that_begin_alike_are_told_apart(box: Outbox) -> None:
    # File names hold 16 characters of the recipe and of the weights.
    box.keep(plan(), update(plan()), 1)
    base = plan().weights.digest
    assert box.find(RECIPE, 1, base) is not None
    assert box.find(RECIPE[:16] + "c" * 48, 1, base) is None
    assert box.find(RECIPE, 1, base[:16] + "c" * 48) is None


def test_a_reply_takes_the_place_of_its_recipes_older_one_and_of_no_other(tmp_path: Path, box: Outbox) -> None:
    box.keep(plan(), update(plan()), 1)
    box.keep(plan(recipe_id=OTHER), update(plan(recipe_id=OTHER)), 2)
    box.keep(plan(2), update(plan(2)), 3)
    assert (names(tmp_path), names(tmp_path, OTHER)) == (["3.bin"], ["2.bin"])
    assert found(box, plan()) is None


def test_a_reply_that_cannot_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    Outbox(tmp_path / "outbox").keep(plan(), update(plan()), 1)
    with pytest.raises(StorageError, match="No space left"):
        Outbox(tmp_path / "outbox", full).keep(plan(2), update(plan(2)), 2)
    assert found(Outbox(tmp_path / "outbox"), plan()) is not None


def test_of_two_replies_to_a_question_the_one_that_was_reserved_last_is_sent(tmp_path: Path, box: Outbox) -> None:
    older = box.keep(plan(), update(plan(), 9.0), 9).read_bytes()
    newer = box.keep(plan(), update(plan(), 10.0), 10)
    newer.with_name(newer.name.replace(".10.", ".9.")).write_bytes(older)  # it died before it removed the older one
    assert found(box, plan()) == (10, pytest.approx(10 * 2**0.5))


def test_a_recipes_evaluations_are_counted_up_to_the_most_also_after_a_restart(tmp_path: Path, box: Outbox) -> None:
    def counted(boxes: Iterable[Outbox]) -> list[bool]:
        return [one.counted(RECIPE, 3) for one in boxes]

    assert counted([box, box]) == [True, True]
    assert counted([Outbox(tmp_path / "outbox")] * 3) == [True, False, False]
    assert (tmp_path / "outbox" / f"{RECIPE[:16]}.evaluations").read_bytes() == b"|||"
    assert box.counted(OTHER, 1)
    box.keep(plan(), update(plan()), 1)
    assert not box.counted(RECIPE, 3)  # no reply takes the place of the tally
    assert box.counted(RECIPE, 4)


def test_the_newest_readable_reply_comes_first(box: Outbox) -> None:
    kept = [(path := box.keep(plan(number), update(plan(number)), 0), path.read_bytes()) for number in (2, 10, 11)]
    for path, data in kept:
        path.write_bytes(data)  # none was removed
    assert [reply.round for reply in box.newest(RECIPE)] == [11, 10, 2]
    kept[2][0].write_bytes(b"cut off")
    path.with_name(path.name.replace("000011", "000012")).mkdir()  # cannot be read at all
    assert [reply.round for reply in box.newest(RECIPE)] == [10, 2]
    assert list(box.newest(OTHER)) == []
