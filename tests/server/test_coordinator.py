"""A federation kept on disk: killed, resumed, joined, left."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest

from common.audit import AuditLog, verify
from common.config import EarlyStopping, Federation, Preprocessing, Privacy, Recipe
from common.errors import QuorumError, StorageError
from common.exchange import Failure, Hello, RoundPlan, Scores, Spent, Update
from common.identity import Signer
from common.vault import new_key_file
from common.weights import Weights
from server import coordinator
from server.conclude import _spent
from server.coordinator import coordinate

RECIPE = Recipe(
    name="small",
    rounds=4,
    data=Preprocessing(size=(8, 8)),
    federation=Federation(sites=3, quorum=2, timeout_s=0.05, strategy="fedadam"),
)


def hello(site: str, **changes) -> Hello:
    values = {"site": site, "recipe_id": RECIPE.id, "versions": {}, "patients": {"train": 9}, "manifest": "d" * 64}
    return Hello(**(values | changes))


def answer(plan: RoundPlan, site: str, **changes) -> Update:
    rng = np.random.default_rng([int(plan.weights.digest[:8], 16), ord(site[0])])
    delta = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in plan.weights.shapes.items()}
    values = {
        "site": site, "recipe_id": plan.recipe_id, "round": plan.round, "base": plan.weights.digest, "weight": 1.0,
        "delta": Weights(delta if plan.work == "train" else {}), "steps": 1, "audit_head": "e" * 64,
    }  # fmt: skip
    return Update(**(values | changes))


class Fake:
    """A transport to three sites in this process; `later` come ahead of the round that they are listed under."""

    def __init__(
        self, die_in_round: int = 0, silent: tuple[str, ...] = (), first=("east", "north", "west"), later=None
    ) -> None:
        self.asked: list[int] = []
        self.sites: list[tuple[str, ...]] = []
        self.questions = 0
        self.before: tuple[str, ...] = ()
        self._die, self._silent, self._first, self._later = die_in_round, silent, first, later or {}

    def hello(self, recipe, audit_head, before=(), *, quorum=None):
        self.questions += 1
        self.quorum = quorum
        self.before = tuple(before)
        return {site: hello(site) for site in self._first}

    def joined(self, recipe, audit_head):
        return {new.site: new for new in self._later.pop(len(self.asked) + 1, ())}

    def ask(self, plan, sites, timeout_s):
        self.asked.append(plan.round)
        self.sites.append(tuple(sites))
        if plan.round == self._die:
            raise KeyboardInterrupt
        return [
            Failure(site=site, round=plan.round, why="silent") if site in self._silent else answer(plan, site)
            for site in sites
        ]


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch):
    start = Weights({"w": np.ones((4, 3), np.float32), "mean": np.zeros(4, np.float32)})
    monkeypatch.setattr(coordinator, "build", lambda recipe: None)
    monkeypatch.setattr(coordinator, "get_weights", lambda model: start)
    monkeypatch.setattr(coordinator, "buffers", lambda model: frozenset({"mean"}))


KEY = Signer.temporary()


def run(out, transport, recipe=RECIPE, **options):
    return coordinate(recipe, transport, out, audit=AuditLog(out / "server.jsonl", KEY), **options)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fedavgm", "fedmedian"])
@pytest.mark.parametrize("killed", [1, 2, 4, 5])
def test_a_run_killed_in_any_round_and_resumed_ends_with_the_same_bits(tmp_path, strategy, killed):
    recipe = replace(RECIPE, federation=replace(RECIPE.federation, strategy=strategy))
    whole = run(tmp_path / "whole", Fake(), recipe)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Fake(die_in_round=killed), recipe)
    second = Fake()
    resumed = run(tmp_path / "cut", second, recipe, resume=True)
    assert second.asked == list(range(killed, 6))
    assert resumed.state.weights.digest == whole.state.weights.digest
    assert resumed.state.done


def test_a_checkpoint_that_could_not_be_written_ends_the_run_and_repeats_two_rounds(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", Fake())
    write = coordinator.checkpoint.write

    def full(state, folder, key):
        if state.round == 3:
            raise StorageError("full")
        return write(state, folder, key)

    with monkeypatch.context() as patch:
        patch.setattr(coordinator.checkpoint, "write", full)
        cut = Fake()
        with pytest.raises(StorageError):
            run(tmp_path / "cut", cut)
    again = Fake()
    assert run(tmp_path / "cut", again, resume=True).state.weights == whole.state.weights
    assert (cut.asked, again.asked) == ([1, 2, 3, 4], [3, 4, 5])


def test_the_last_checkpoint_too_is_on_the_disk_or_it_is_said_that_it_is_not(tmp_path, monkeypatch):
    write = coordinator.checkpoint.write

    def full(state, folder, key):
        if state.done:
            raise StorageError("full")
        return write(state, folder, key)

    monkeypatch.setattr(coordinator.checkpoint, "write", full)
    with pytest.raises(StorageError, match="full"):
        run(tmp_path, Fake())


def test_resuming_a_finished_run_asks_for_no_round(tmp_path):
    first = run(tmp_path, Fake())
    again = Fake()
    second = run(tmp_path, again, resume=True)
    assert second.state.weights == first.state.weights
    assert second.hellos == first.hellos
    assert (again.asked, again.questions) == ([], 0)  # the sites may all have gone home


def test_a_folder_with_checkpoints_is_not_started_over(tmp_path):
    run(tmp_path, Fake())
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(StorageError, match="resume=true"):
        run(tmp_path, Fake())
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def cut(out, killed, recipe=RECIPE):
    with pytest.raises(KeyboardInterrupt):
        run(out, Fake(die_in_round=killed), recipe)
    state = coordinator.checkpoint.load(out / "checkpoints", recipe.id)
    assert state is not None
    return state


@pytest.mark.parametrize("first", [("east", "north", "west"), ("north",), ()])
@pytest.mark.parametrize("killed", [2, 5])
def test_a_run_that_is_ended_takes_the_model_of_its_last_round_and_asks_who_is_there_for_measures(
    tmp_path, killed, first
):
    trained = cut(tmp_path, killed)
    net = Fake(first=first)
    state = run(tmp_path, net, resume=True, end=True).state
    assert (net.asked, net.sites, net.quorum) == ([killed], [first], 0)
    assert (state.done, state.ended, state.round) == (True, True, killed - 1)
    assert state.weights.digest == trained.weights.digest
    assert (state.history[-1].work, tuple(state.history[-1].accepted)) == ("evaluate", first)
    said = next(event for event in verify(tmp_path / "server.jsonl") if event.kind == "training ended")
    assert (said.facts["round"], said.facts["before"], said.facts["after"]) == (
        killed - 1, state.weights.digest, state.weights.digest,
    )  # fmt: skip
    for end in (False, True):
        again = run(tmp_path, Fake(), resume=True, end=end)
        assert again.state == state
        assert list(again.hellos) == ["east", "north", "west"]
    assert sum(event.kind == "training ended" for event in verify(tmp_path / "server.jsonl")) == 1


def test_an_end_that_was_ordered_and_killed_is_ordered_again_or_taken_back(tmp_path):
    trained = cut(tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fake(die_in_round=3), resume=True, end=True)
    assert coordinator.checkpoint.load(tmp_path / "checkpoints", RECIPE.id) == trained
    assert run(tmp_path, Fake(), resume=True).state.round == 4


def test_with_a_moving_average_it_is_the_model_and_the_log_says_so(tmp_path):
    recipe = replace(RECIPE, federation=replace(RECIPE.federation, ema_decay=0.9))
    trained = cut(tmp_path, 4, recipe)
    state = run(tmp_path, Fake(first=()), recipe, resume=True, end=True).state
    assert trained.average is not None
    assert state.weights.digest == trained.average.digest != trained.weights.digest
    said = next(event for event in verify(tmp_path / "server.jsonl") if event.kind == "training ended")
    assert (said.facts["before"], said.facts["after"]) == (trained.weights.digest, state.weights.digest)


def test_with_early_stopping_the_better_earlier_model_is_taken(tmp_path):
    stopping = EarlyStopping(patience_rounds=3)
    recipe = replace(RECIPE, federation=replace(RECIPE.federation, early_stopping=stopping))
    scores = {1: 0.5, 2: 0.9, 3: 0.6}

    class Scored(Fake):
        def ask(self, plan, sites, timeout_s):
            replies = super().ask(plan, sites, timeout_s)
            values = {"auroc": scores.get(plan.round, 0.4)}
            return [replace(reply, validation=Scores(patients=9, values=values)) for reply in replies]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Scored(die_in_round=4), recipe)
    best = coordinator.checkpoint.load(tmp_path / "checkpoints", recipe.id).best
    for first in (("east",), ()):
        out = tmp_path / str(len(first))
        shutil.copytree(tmp_path / "checkpoints", out / "checkpoints")
        net = Scored(first=first)
        state = run(out, net, recipe, resume=True, end=True).state
        assert state.weights.digest == best.digest == state.history[0].after
        assert net.asked == [4, 4]  # the last model, and the one that is taken

    class Dying(Scored):
        def ask(self, plan, sites, timeout_s):
            if self.asked:
                raise KeyboardInterrupt
            return super().ask(plan, sites, timeout_s)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Dying(first=()), recipe, resume=True, end=True)
    net = Scored(first=())  # the closing evaluation has begun: the order is not taken back any more
    state = run(tmp_path, net, recipe, resume=True).state
    assert (net.quorum, net.asked, state.done, state.weights.digest) == (0, [4], True, best.digest)


def test_a_run_without_a_round_on_disk_cannot_be_ended(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fake(die_in_round=1))
    with pytest.raises(StorageError, match="there is no model to conclude with"):
        run(tmp_path, Fake(), resume=True, end=True)


@pytest.mark.parametrize(("killed", "before"), [(1, ("east", "north", "west")), (3, ("east", "north"))])
def test_a_resumed_run_tells_whom_to_wait_for(tmp_path, killed, before):
    first = Fake(die_in_round=killed, silent=("west",))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first)
    assert first.before == ()
    second = Fake(die_in_round=killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, second, resume=True)
    assert sorted(second.before) == sorted(before)  # of the last round, or who was there for the first


def test_a_run_below_quorum_is_in_the_log_and_can_be_resumed(tmp_path):
    with pytest.raises(QuorumError):
        run(tmp_path, Fake(silent=("east", "west")))
    last = verify(tmp_path / "server.jsonl")[-1]
    assert (last.kind, last.facts["round"]) == ("round failed", 1)
    assert "'east': 'silent'" in last.facts["why"]
    assert run(tmp_path, Fake(), resume=True).state.done


def test_the_log_tells_the_run_and_anchors_the_sites(tmp_path):
    result = run(tmp_path, Fake(silent=("west",)))
    events = verify(tmp_path / "server.jsonl", KEY.public)
    kinds = ["log started", "run started", "sites present", *["round aggregated"] * 4, "evaluation received"]
    assert [event.kind for event in events] == kinds
    assert events[3].facts["refused"] == {"west": "silent"}
    assert events[3].facts["heads"] == {"east": "e" * 64, "north": "e" * 64}
    assert events[-2].facts["after"] == result.state.weights.digest


PAID = replace(RECIPE, privacy=Privacy(mechanism="dp_sgd", epsilon=8, delta=1e-5))
MASKED = replace(
    RECIPE,
    privacy=Privacy(secure_aggregation=True),
    federation=replace(RECIPE.federation, quorum=3, strategy="fedavg", max_update_norm=100),
)
ROUNDED = replace(RECIPE, federation=replace(RECIPE.federation, compression="int8"))


def test_a_round_that_no_site_gives_twice_is_on_disk_before_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(coordinator, "_repeats", lambda recipe: False)
    seen = []
    run(
        tmp_path,
        Fake(),
        on_round=lambda state, report: seen.append(
            coordinator.checkpoint.load(tmp_path / "checkpoints", RECIPE.id) == state
        ),
    )
    assert seen == [True] * 5


def test_which_recipes_wait_for_their_checkpoints():
    assert [coordinator._repeats(recipe) for recipe in (RECIPE, PAID, MASKED, ROUNDED)] == [True, False, False, False]


def test_another_round_is_written_while_the_next_one_is_under_way_and_before_the_one_after(tmp_path, monkeypatch):
    write, asked, late = coordinator.checkpoint.write, threading.Semaphore(0), []

    def waiting(state, folder, key):
        if state.round < 4:  # the last training round and the evaluation are followed by at most one
            late.append(not asked.acquire(timeout=20))
        return write(state, folder, key)

    class Watching(Fake):
        def ask(self, plan, sites, timeout_s):
            if plan.round > 1:
                asked.release()
            if plan.round > 2:
                found = coordinator.checkpoint.load(tmp_path / "checkpoints", RECIPE.id)
                assert found is not None
                assert found.round >= plan.round - 2
            return super().ask(plan, sites, timeout_s)

    monkeypatch.setattr(coordinator.checkpoint, "write", waiting)
    found = run(tmp_path, Watching())
    assert late == [False] * 3
    assert coordinator.checkpoint.load(tmp_path / "checkpoints", RECIPE.id) == found.state


def test_a_site_that_was_silent_at_the_end_still_shows_what_it_spent(tmp_path):
    private = replace(RECIPE, privacy=Privacy(mechanism="dp_sgd", epsilon=8, delta=1e-5))

    class Spending(Fake):
        def ask(self, plan, sites, timeout_s):
            spent = Spent(
                epsilon=plan.round, delta=1e-5, noise_multiplier=1, clip_norm=1, sampling_rate=0.1, steps=plan.round
            )
            replies = [answer(plan, site, spent=spent) for site in sites]
            return replies if plan.work == "train" else [reply for reply in replies if reply.site != "west"]

    state = run(tmp_path, Spending(), private).state
    assert {site: spent.epsilon for site, spent in _spent(state).items()} == {"east": 5, "north": 5, "west": 4}


def test_a_site_that_joins_between_two_rounds_takes_part_from_then_on(tmp_path):
    net = Fake(first=("east", "north"), later={3: [hello("west")]})
    result = run(tmp_path, net)
    assert net.sites == [("east", "north")] * 2 + [("east", "north", "west")] * 3
    assert [sorted(report.accepted) for report in result.state.history] == [list(sites) for sites in net.sites]
    assert list(result.hellos) == ["east", "north", "west"]
    joined = next(event for event in verify(tmp_path / "server.jsonl") if event.kind == "sites joined")
    assert list(joined.facts["sites"]) == ["west"]


def test_a_site_that_leaves_is_left_out_and_the_others_go_on(tmp_path):
    class Leaving(Fake):
        def ask(self, plan, sites, timeout_s):
            self._silent = ("west",) if plan.round >= 3 else ()
            return super().ask(plan, sites, timeout_s)

    result = run(tmp_path, Leaving())
    assert [sorted(report.accepted) for report in result.state.history] == [
        *[["east", "north", "west"]] * 2,
        *[["east", "north"]] * 3,
    ]
    # the same as if it had not been asked any more: what counts is who was admitted
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Fake(die_in_round=3))
    without = run(tmp_path / "cut", Fake(first=("east", "north")), resume=True)
    assert without.state.weights.digest == result.state.weights.digest


def test_a_site_that_had_gone_when_the_run_was_resumed_is_still_in_the_account(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fake(die_in_round=3))
    second = Fake(first=("east", "north"))
    result = run(tmp_path, second, resume=True)
    assert second.sites == [("east", "north")] * 3
    assert list(result.hellos) == ["east", "north", "west"]


COUNTED = replace(RECIPE, federation=replace(RECIPE.federation, site_weights="patients"))


@pytest.mark.parametrize(("declared", "admitted"), [(9.0, True), (10.0, False), (1.0, False)])
def test_an_update_weighs_what_the_site_said_when_it_came_and_nothing_else(tmp_path, declared, admitted):
    class Counted(Fake):
        def ask(self, plan, sites, timeout_s):
            given = {"west": declared} if plan.work == "train" else {}
            return [answer(plan, site, weight=given.get(site, 9.0)) for site in sites]

    history = run(tmp_path, Counted(), COUNTED).state.history
    assert all(("west" in report.accepted) is admitted for report in history if report.work == "train")
    if not admitted:
        assert "the site came with 9 training patients" in history[0].refused["west"]


def test_a_site_that_comes_back_with_more_patients_weighs_more_from_then_on(tmp_path):
    class Growing(Fake):
        def ask(self, plan, sites, timeout_s):
            self.asked.append(plan.round)
            return [answer(plan, site, weight=9.0 if site != "west" or plan.round < 3 else 12.0) for site in sites]

    net = Growing(later={3: [hello("west", patients={"train": 12})]})
    history = run(tmp_path, net, COUNTED).state.history
    assert [report.accepted["west"].weight for report in history[:4]] == [9, 9, 12, 12]


def test_checkpoints_under_a_key_are_sealed_and_a_run_goes_on_from_them(tmp_path):
    key = new_key_file(tmp_path / "key")
    whole = run(tmp_path / "whole", Fake())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Fake(die_in_round=3), key=key)
    assert {path.suffix for path in (tmp_path / "cut" / "checkpoints").glob("round-*")} == {".sealed"}
    with pytest.raises(StorageError, match="encrypted"):
        run(tmp_path / "cut", Fake(), resume=True)
    assert run(tmp_path / "cut", Fake(), resume=True, key=key).state.weights == whole.state.weights
