"""The grid: every site answers once, in this process or in workers that may die, and only bytes cross."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from common import wire
from common.config import Recipe
from common.exchange import Failure, Hello, Question, RoundPlan, Update
from common.weights import Weights
from server.app import FlowerTransport
from simulations import grid as grid_module
from simulations.grid import InProcessGrid, Worker, become_node, context

SITES = ("east", "north", "south", "west")

# A module of its own, for a new process imports it by name. Its sites tell their process in place of a patient count.
APP = """
import os, time
from flwr.clientapp import ClientApp
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from common import wire
from common.exchange import Hello, Question, RoundPlan, Update

MARK = "from the file"

def make(settings):
    app = ClientApp()

    @app.query()
    def query(message, context):
        site = context.node_config["site"]
        context.state_count = getattr(context, "state_count", 0) + 1
        if settings == "slow" and site == "north":
            time.sleep(60)
        if settings == "broken" and site == "north":
            raise ValueError("SECRET")
        if settings == "odd" and site == "north":
            return Message(RecordDict(), reply_to=message)
        return Message(wire.encode(Hello(
            site=site, recipe_id=wire.decode(message.content, Question).recipe_id,
            versions={"asked": str(context.state_count), "mark": MARK}, patients={"train": os.getpid()},
            manifest="0" * 64
        )), reply_to=message)

    seen = []

    @app.train()
    def train(message, context):
        if not settings:
            raise ValueError("no training here")
        plan = wire.decode(message.content, RoundPlan)
        seen.append(plan)  # kept, so that no later one can have its address
        return Message(wire.hand(Update(
            site=context.node_config["site"], recipe_id=plan.recipe_id, round=plan.round, base=plan.weights.digest,
            delta=plan.weights * 2.0, weight=1.0, steps=len({id(part) for part in seen}),
        )), reply_to=message)

    return app
"""


Make = Callable[[str], ClientApp]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    (tmp_path / "fedicom_test_worker.py").write_text(APP)
    monkeypatch.syspath_prepend(str(tmp_path))
    import fedicom_test_worker  # type: ignore[import-not-found]

    yield fedicom_test_worker.make
    del sys.modules["fedicom_test_worker"]


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    made: list[Worker] = []
    yield made
    for worker in made:
        worker.stop()


ASKING = Question(recipe_id="a" * 64)


def question(grid: InProcessGrid, site: str, ttl: float | None = None) -> Message:
    return Message(wire.encode(ASKING), 1000 + SITES.index(site), "query", ttl=ttl)


def hello(reply: Message) -> Hello:
    return wire.decode(reply.content, Hello)


def ask_all(grid: InProcessGrid) -> dict[str, Message]:
    asked = [question(grid, site) for site in SITES]
    replies = {m.metadata.reply_to_message_id: m for m in grid.send_and_receive(asked)}
    return {site: replies[m.metadata.message_id] for site, m in zip(SITES, asked, strict=True)}


def test_every_site_answers_in_its_own_name_and_keeps_its_own_context(make: Make) -> None:
    told: list[str] = []
    grid = InProcessGrid(SITES, make(""), done=told.append)
    for times in ("1", "2"):
        found = {site: hello(reply) for site, reply in ask_all(grid).items()}
        assert {site: h.site for site, h in found.items()} == {site: site for site in SITES}
        assert {h.versions["asked"] for h in found.values()} == {times}
    assert sorted(told[:4]) == sorted(told[4:]) == list(SITES)


def test_a_site_that_raises_is_an_error_of_that_site_alone_and_its_text_stays(make: Make) -> None:
    replies = ask_all(InProcessGrid(SITES, make("broken")))
    assert [site for site, reply in replies.items() if reply.has_error()] == ["north"]
    assert "SECRET" not in replies["north"].error.reason


def test_workers_keep_their_sites_survive_a_raise_and_are_replaced_after_a_kill(
    make: Make,
    workers: list[Worker],
) -> None:
    workers += [Worker(make, "broken"), Worker(make, "broken")]
    grid = InProcessGrid(SITES, None, workers=workers)
    replies = ask_all(grid)
    assert [site for site, reply in replies.items() if reply.has_error()] == ["north"]
    first = {site: hello(replies[site]).patients["train"] for site in ("east", "south", "west")}
    assert first["east"] == first["south"] != first["west"]  # every second site lives in the same worker
    assert os.getpid() not in first.values()
    assert hello(ask_all(grid)["west"]).patients["train"] == first["west"]  # the raise ended no process

    os.kill(first["east"], signal.SIGKILL)
    time.sleep(0.2)
    after = ask_all(grid)
    found = [hello(after[site]).patients["train"] for site in ("east", "south", "west")]
    assert found[0] == found[1] != first["east"]
    assert found[2] == first["west"]


def test_a_worker_killed_while_it_works_is_a_failure_and_one_too_slow_is_ended(
    make: Make,
    workers: list[Worker],
) -> None:
    import threading

    workers.append(Worker(make, "slow"))
    grid = InProcessGrid(SITES, None, workers=workers)

    def kill() -> None:
        time.sleep(0.2)
        process = workers[0]._process
        assert process is not None
        os.kill(process.pid or 0, signal.SIGKILL)

    assert hello(workers[0].ask(question(grid, "east"), "east")).site == "east"
    threading.Thread(target=kill).start()
    reply = workers[0].ask(question(grid, "north"), "north")
    assert reply.error.reason == "worker process died"
    slow = workers[0].ask(question(grid, "north"), "north", timeout_s=0.1)
    assert slow.error.reason == "no answer within 0.1 s"
    assert workers[0]._process is None
    assert hello(workers[0].ask(question(grid, "south"), "south")).site == "south"
    workers[0].stop(for_good=True)
    assert workers[0].ask(question(grid, "south"), "south").has_error()


def test_a_message_lives_as_long_as_its_site_may_work(make: Make, workers: list[Worker]) -> None:
    workers += [Worker(make, "slow"), Worker(make, "slow")]
    grid = InProcessGrid(SITES, None, workers=workers)
    workers[1].ask(question(grid, "west"), "west")  # its process runs before the time does
    slow, quick = question(grid, "north", ttl=0.5), question(grid, "east", ttl=60)
    replies = {m.metadata.reply_to_message_id: m for m in grid.send_and_receive([slow, quick])}
    assert replies[slow.metadata.message_id].error.reason == "no answer within 0.5 s"
    assert hello(replies[quick.metadata.message_id]).site == "east"


def test_the_coordinator_sees_a_dead_worker_as_the_failure_of_its_sites(
    make: Make,
    workers: list[Worker],
) -> None:
    workers += [Worker(make, ""), Worker(make, "")]
    transport = FlowerTransport(InProcessGrid(SITES, None, workers=workers))
    recipe = Recipe(name="a")
    assert sorted(transport.hello(recipe, "")) == sorted(SITES)
    workers[0].stop(for_good=True)
    plan = RoundPlan(recipe_id=recipe.id, round=1, work="train", weights=Weights({"w": np.ones(2, np.float32)}))
    replies = list(transport.ask(plan, SITES, 30))
    assert sorted(reply.site for reply in replies) == list(SITES)
    assert all(isinstance(reply, Failure) for reply in replies)  # two died, the others know no training


def test_a_plan_for_many_sites_goes_to_a_worker_once_and_large_weights_come_back_whole(
    make: Make,
    workers: list[Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("simulations.grid._MOST_BYTES", 300_000)
    workers.append(Worker(make, "trains"))
    weights = Weights({"a": np.arange(500_000, dtype=np.float32), "b": np.ones((3, 4), np.float32)})
    plan = RoundPlan(recipe_id="a" * 64, round=1, work="train", weights=weights)
    given: list[int] = []
    give = grid_module._give
    monkeypatch.setattr(grid_module, "_give", lambda pipe, *parts: (given.append(1), give(pipe, *parts)))

    def asked(site: str, content: RecordDict) -> Update:
        reply = workers[0].ask(Message(content, 1000, "train"), site)
        return wire.decode(reply.content, Update)

    become_node(1)
    first = wire.hand(plan)
    updates = [asked(site, first) for site in SITES]
    assert [update.steps for update in updates] == [1] * 4  # one and the same plan
    assert len(given) == 1
    for site, update in zip(SITES, updates, strict=True):
        assert (update.site, update.base) == (site, weights.digest)
        assert update.delta.digest == (weights * 2.0).digest == Weights(dict(update.delta)).digest
    again = asked("east", wire.hand(replace(plan, round=2)))
    assert (again.round, again.steps, len(given)) == (2, 2, 2)
    workers[0].stop()  # another process knows none of it
    assert (asked("east", first).round, len(given)) == (1, 3)


def test_an_answer_that_is_none_of_our_messages_fails_its_site_and_ends_no_process(
    make: Make,
    workers: list[Worker],
) -> None:
    workers.append(Worker(make, "odd"))
    grid = InProcessGrid(SITES, None, workers=workers)
    before = hello(workers[0].ask(question(grid, "east"), "east")).patients["train"]
    failed = workers[0].ask(question(grid, "north"), "north").error
    assert failed.reason == "the site failed; simulation.log in the folder of the run says why"
    assert hello(workers[0].ask(question(grid, "east"), "east")).patients["train"] == before


FORKING = """
import os, sys, threading
from flwr.app import Message
from common import wire
from common.exchange import Hello, Question
import fedicom_test_worker
from simulations.grid import Worker, become_node

def asked(worker):
    content = wire.encode(Question(recipe_id="a" * 64))
    return wire.decode(worker.ask(Message(content, 1000, "query"), "east").content, Hello)

become_node(1)
fedicom_test_worker.MARK = "in memory"
begun = [Worker(fedicom_test_worker.make, "", fork=True) for _ in range(3)]
begun[0].begin()
threading.Thread(target=threading.Event().wait, daemon=True).start()
begun[1].begin()
first = asked(begun[0])
begun[0].stop()
print(first.versions["mark"], asked(begun[0]).versions["mark"], asked(begun[1]).versions["mark"], sep=",")
assert os.getpid() != first.patients["train"]
for worker in begun:
    worker.stop()
"""


def test_a_worker_is_forked_from_a_process_of_one_thread_alone_and_begins_afresh_after_its_death(
    make: Make, tmp_path: Path
) -> None:
    root = str(Path(grid_module.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", FORKING],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((root, str(tmp_path)))},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    expected = "in memory,from the file,from the file" if sys.platform == "linux" else ",".join(["from the file"] * 3)
    assert done.stdout.strip() == expected, done.stderr


def test_ctrl_c_in_the_terminal_is_left_to_the_parent(make: Make, workers: list[Worker]) -> None:
    workers.append(Worker(make, ""))
    grid = InProcessGrid(SITES, None, workers=workers)
    process = hello(workers[0].ask(question(grid, "east"), "east")).patients["train"]
    os.kill(process, signal.SIGINT)
    time.sleep(0.1)
    assert hello(workers[0].ask(question(grid, "east"), "east")).patients["train"] == process


def test_only_bytes_cross_the_pipe_and_nothing_of_a_message_is_unpickled(
    make: Make,
    workers: list[Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers.append(Worker(make, ""))
    grid = InProcessGrid(SITES, None, workers=workers)
    assert hello(workers[0].ask(question(grid, "east"), "east")).site == "east"

    def forbidden(*_: object, **__: object) -> None:
        pytest.fail("pickled")

    monkeypatch.setattr(pickle, "loads", forbidden)
    monkeypatch.setattr("multiprocessing.connection._ForkingPickler.dumps", forbidden)
    monkeypatch.setattr("multiprocessing.connection._ForkingPickler.loads", forbidden)
    assert hello(workers[0].ask(question(grid, "east"), "east")).versions["asked"] == "2"


def test_a_message_of_a_kind_that_the_app_does_not_know_is_an_error(make: Make) -> None:
    grid = InProcessGrid(SITES, make(""))
    (reply,) = grid.send_and_receive([Message(wire.encode(ASKING), 1000, "train.other")])
    assert reply.has_error()


# Sites of this process. `turn` is what `client.site.Site` holds while it trains.
BUSY = """
import threading, time
from flwr.app import Message
from flwr.clientapp import ClientApp
from common import wire
from common.exchange import Hello, Question

arrived, seen, turn = [], [], threading.Lock()

def make(settings):
    app = ClientApp()

    @app.query()
    def query(message, context):
        question = wire.decode(message.content, Question)
        arrived.append(context.node_config["site"])
        with turn:
            seen.append(question)
            if settings == "endless":
                while True:
                    time.sleep(0.01)
        return Message(wire.hand(Hello(
            site=context.node_config["site"], recipe_id=question.recipe_id, versions={}, patients={"train": 9},
            manifest="0" * 64
        )), reply_to=message)

    return app
"""


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "fedicom_test_busy.py").write_text(BUSY)
    monkeypatch.syspath_prepend(str(tmp_path))
    import fedicom_test_busy  # type: ignore[import-not-found]

    yield fedicom_test_busy
    del sys.modules["fedicom_test_busy"]


def test_in_one_process_the_very_object_is_handed_over_and_no_copy_of_it(busy: Any) -> None:
    grid = InProcessGrid(SITES, busy.make(""))
    (reply,) = grid.send_and_receive([Message(wire.hand(ASKING), 1000, "query")])
    assert busy.seen == [ASKING]
    assert busy.seen[0] is ASKING
    assert hello(reply) is hello(reply)
    grid.close()


def test_replies_are_given_as_they_come(busy: Any) -> None:
    grid = InProcessGrid(SITES, busy.make(""))
    ids = list(grid.push_messages([Message(wire.hand(ASKING), 1000 + n, "query") for n in range(4)]))
    came: list[str] = []
    while len(came) < 4:
        replies = list(grid.pull_messages(ids))
        assert replies
        came += [reply.metadata.reply_to_message_id for reply in replies]
    assert sorted(came) == sorted(ids)
    assert list(grid.pull_messages(ids)) == []  # nothing is under way: no waiting
    grid.close()


def test_closing_ends_a_site_in_the_middle_of_its_work(busy: Any) -> None:
    grid = InProcessGrid(SITES, busy.make("endless"), ahead=2)  # one works, one waits for its turn
    grid.push_messages([Message(wire.hand(ASKING), 1000 + n, "query") for n in range(4)])
    while not busy.seen:
        time.sleep(0.01)
    threads = grid._threads
    grid.close()
    assert not any(thread.is_alive() for thread in threads)
    assert len(busy.seen) <= 2  # the others never began


def test_one_site_works_at_a_time_unless_more_are_asked_for(busy: Any) -> None:
    # sites that share a model without taking turns would train on each other's weights
    grid = InProcessGrid(SITES, busy.make("endless"))
    grid.push_messages([Message(wire.hand(ASKING), 1000 + n, "query") for n in range(4)])
    while not busy.seen:
        time.sleep(0.01)
    assert len(grid._threads) == 1
    assert busy.arrived == ["east"]
    grid.close()


def test_a_context_names_its_site() -> None:
    become_node(1)
    assert context("north", 1003).node_config == {"site": "north"}
