"""Replies on their way, as the coordinator's Grid takes them from a SuperLink: whole ones, halves, and late ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.task_identity import TaskIdentity

from common.bell import Bell
from server.app import _Net
from server.link import _RunGrid

MIB = 1 << 20
NORTH, SOUTH = 11, 12


class SuperLink:
    """As much of a SuperLink as a Grid asks for replies."""

    def __init__(self) -> None:
        self.heads: dict[str, tuple[int, ObjectTree]] = {}
        """By question, until it is pulled."""
        self.pieces: dict[str, bytes] = {}
        self.trees: dict[str, ObjectTree] = {}
        self.asked: list[str] = []

    def reply(self, question: str, node: int, pieces: int = 9, *, whole: bool = False) -> None:
        """A node answers with pieces of a mebibyte; unless it is whole, the last one does not come."""
        if whole:
            message = Message(RecordDict({"c": ConfigRecord({"q": question})}), node, "query")
            message.metadata.__dict__["_reply_to_message_id"] = question
            tree = get_object_tree(message)
            self.pieces |= {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
        else:
            names = [f"{question}.{number}" for number in range(pieces)]
            tree = ObjectTree(object_id=names[-1], children=[ObjectTree(object_id=name) for name in names[:-1]])
            self.pieces |= {name: bytes(MIB) for name in names[:-1]} | {names[-1]: b""}
        self.heads[question], self.trees[tree.object_id] = (node, tree), tree

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        self.asked = list(request.message_ids)
        out = PullAppMessagesResponse()
        for question in set(self.asked) & set(self.heads):
            node, tree = self.heads.pop(question)
            head = out.messages_list.add().metadata
            head.message_id, head.reply_to_message_id, head.src_node_id = tree.object_id, question, node
            out.message_object_trees.append(tree)
        return out

    def PullObject(self, request: Any) -> PullObjectResponse:
        content = self.pieces.get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None, object_available=bool(content), object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:
        for part in iterate_object_tree(self.trees.pop(request.message_object_id)):
            del self.pieces[part.object_id]


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


@pytest.fixture
def grid(superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _RunGrid:
    made = object.__new__(_RunGrid)
    monkeypatch.setattr(_RunGrid, "client", superlink)
    monkeypatch.setattr(_RunGrid, "run", SimpleNamespace(run_id=1))
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    made.node, made._answered = Node(node_id=1), Bell(tmp_path / "bell")
    made._arriving, made._forgotten, made._largest = {}, set(), 45 * MIB
    return made


def held(grid: _RunGrid) -> int:
    return sum(reply.size for reply in grid._arriving.values()) // MIB


@pytest.fixture
def ask(grid: _RunGrid) -> tuple[_Net, Callable[[str], list[Message]]]:
    net = _Net(grid)

    def wait_for(question: str) -> list[Message]:
        heard: list[Message] = []
        net._waiting[question] = heard.append
        return heard

    return net, wait_for


def test_a_site_that_answers_thirty_questions_by_half_holds_no_memory_when_their_rounds_are_over(grid, superlink, ask):
    net, wait_for = ask
    for number in range(30):
        wait_for(f"q{number}")
        superlink.reply(f"q{number}", NORTH)
        net.collect()
        assert held(grid) == 8
        net.forget([f"q{number}"])
    wait_for("last")
    net.collect()
    assert (held(grid), superlink.pieces, grid._forgotten) == (0, {}, set())


def test_of_two_half_replies_of_a_site_the_older_one_is_refused_and_another_sites_stays(grid, superlink, ask):
    net, wait_for = ask
    first, second, other = map(wait_for, ("q1", "q2", "q3"))
    for question, node in (("q1", NORTH), ("q3", SOUTH), ("q2", NORTH)):
        superlink.reply(question, node)
        net.collect()
    assert [message.error.reason for message in first] == ["half a reply"]
    assert (second, other, held(grid)) == ([], [], 16)
    assert {name[:2] for name in superlink.pieces} == {"q2", "q3"}
    superlink.pieces["q3.8"] = b"the rest"  # and no message
    net.collect()
    assert [message.has_error() for message in other] == [True]
    assert held(grid) == 8


def test_two_whole_replies_of_a_site_that_come_at_once_are_both_taken(superlink, ask):
    net, wait_for = ask
    heard = [wait_for(question) for question in ("q1", "q2")]
    for question in ("q1", "q2"):
        superlink.reply(question, NORTH, whole=True)
    net.collect()
    assert [len(messages) for messages in heard] == [1, 1]
    assert not any(messages[0].has_error() for messages in heard)
    assert superlink.pieces == {}


def test_what_comes_too_late_is_asked_for_once_more_and_thrown_away(superlink, ask):
    net, wait_for = ask
    late, next_ = wait_for("q1"), wait_for("q2")
    net.collect()
    net.forget(["q1"])
    superlink.reply("q1", NORTH, whole=True)
    superlink.reply("q2", SOUTH, whole=True)
    net.collect()
    assert (late, len(next_)) == ([], 1)
    assert superlink.pieces == {}
    wait_for("q3")
    net.collect()
    assert superlink.asked == ["q3"]


def test_a_reply_that_is_too_large_is_refused_and_the_superlink_rid_of_it(grid, superlink, ask):
    net, wait_for = ask
    heard = wait_for("q1")
    superlink.reply("q1", NORTH, pieces=108)  # twice 45 MiB and 16 are taken, and not one more
    net.collect()
    assert [message.error.reason for message in heard] == ["ExchangeError"]
    assert (held(grid), superlink.pieces) == (0, {})
