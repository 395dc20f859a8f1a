"""Small objects go with their message: between two ends of ours, and past one that knows nothing of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from common import inline

ASKING = PullMessagesRequest.FromString(inline.asking(PullMessagesRequest()).SerializeToString())
HEAD, BODY, REST = b"head", b"body" * 100, b"rest" * 50_000


def key(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tree(*contents: bytes) -> ObjectTree:
    root, *others = contents
    return ObjectTree(object_id=key(root), children=[tree(other) for other in others])


def store(*contents: bytes) -> dict[str, bytes]:
    return {key(content): content for content in contents}


def over_the_wire(call: Any) -> Any:
    return type(call).FromString(call.SerializeToString())


@dataclass
class State:
    """What the handlers use of Flower's; it is its own object store."""

    objects: dict[str, bytes] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    full: bool = False
    open: int = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        self.open += 1
        yield
        self.open -= 1

    def store_object(self, run_id: int, session_id: str, object_id: str, content: bytes) -> bool:
        assert (run_id, session_id, self.open) == (7, "session", 1)
        if not self.full:
            self.objects[object_id] = content
        return not self.full

    @property
    def object_store(self) -> State:
        return self

    def delete(self, object_id: str) -> None:
        assert self.open == 1
        self.deleted.append(object_id)

    def get_object(self, run_id: int, object_id: str) -> bytes | None:
        assert run_id == 7
        return self.objects.get(object_id)


def handlers(*contents: bytes, once: bool = True) -> Any:
    """Flower's two, for a message of run 7 in objects of which nothing is there."""

    def push_messages(request: PushMessagesRequest, state: State) -> PushMessagesResponse:
        return PushMessagesResponse(objects_to_push=[key(content) for content in contents], session_id="session")

    def pull_messages(request: PullMessagesRequest, state: State, store: None) -> PullMessagesResponse:
        answer = PullMessagesResponse(message_object_trees=[tree(*contents)])
        answer.messages_list.add().metadata.run_id = 7
        return answer

    made = SimpleNamespace(push_messages=push_messages, pull_messages=pull_messages)
    inline.install(made, once=once)
    return made


def push(*contents: bytes, carried: dict[str, bytes]) -> PushMessagesRequest:
    request = PushMessagesRequest(message_object_trees=[tree(*contents)])
    request.messages_list.add().metadata.run_id = 7
    inline.add(request, carried.get)
    return over_the_wire(request)


def test_the_objects_of_a_pushed_message_are_stored_with_it_and_only_the_others_are_asked_for():
    state = State()
    request = push(HEAD, BODY, REST, carried=store(HEAD, BODY))
    answer = handlers(HEAD, BODY, REST).push_messages(request=request, state=state)
    assert state.objects == store(HEAD, BODY)
    assert list(answer.objects_to_push) == [key(REST)]


def test_a_site_that_sends_no_objects_along_is_asked_for_all_of_them():
    answer = handlers(HEAD, BODY).push_messages(push(HEAD, BODY, carried={}), State())
    assert list(answer.objects_to_push) == [key(HEAD), key(BODY)]


def test_an_object_that_was_not_announced_or_finds_no_room_is_not_taken():
    state = State()
    answer = handlers(HEAD).push_messages(push(HEAD, BODY, carried=store(HEAD, BODY)), state)
    assert (list(answer.objects_to_push), state.objects) == ([], store(HEAD))
    answer = handlers(HEAD).push_messages(push(HEAD, carried=store(HEAD)), State(full=True))
    assert list(answer.objects_to_push) == [key(HEAD)]


def test_an_object_has_the_name_of_its_bytes_whatever_it_was_sent_for():
    request = push(HEAD, carried={key(HEAD): BODY})
    assert inline.read(request) == {key(BODY): BODY}
    state = State()
    assert list(handlers(HEAD).push_messages(request, state).objects_to_push) == [key(HEAD)]
    assert not state.objects


def test_a_pulled_message_comes_with_the_objects_that_are_there_and_is_kept_for_the_others():
    state = State(store(HEAD, REST))
    answer = over_the_wire(handlers(HEAD, BODY, REST).pull_messages(ASKING, state, None))
    assert inline.read(answer) == store(HEAD, REST)
    assert not inline.whole(answer.message_object_trees[0], inline.read(answer))
    assert not state.deleted


@pytest.mark.parametrize(("once", "deleted"), [(True, [key(HEAD)]), (False, [])])
def test_a_message_that_went_whole_is_deleted_where_it_is_given_out_once(once, deleted):
    state = State(store(HEAD, BODY))
    answer = over_the_wire(handlers(HEAD, BODY, once=once).pull_messages(ASKING, state, None))
    assert inline.whole(answer.message_object_trees[0], inline.read(answer))
    assert state.deleted == deleted


def test_where_there_is_no_message_nothing_is_looked_up():
    made = SimpleNamespace(push_messages=None, pull_messages=lambda request, state: PullMessagesResponse())
    inline.install(made, once=True)
    assert made.pull_messages(ASKING, SimpleNamespace()) == PullMessagesResponse()


def test_one_who_does_not_read_what_comes_along_pulls_as_ever_and_finds_everything_there():
    state = State(store(HEAD, BODY))
    answer = handlers(HEAD, BODY).pull_messages(PullMessagesRequest(), state, None)
    assert (inline.read(answer), state.deleted) == ({}, [])
    assert [found.object_id for found in answer.message_object_trees] == [key(HEAD)]


@pytest.mark.parametrize(("most", "carried"), [(203, 0), (204, 1), (1_203, 1), (1_204, 2)])
def test_what_goes_along_is_bounded_and_ends_with_the_first_that_finds_no_room(monkeypatch, most, carried):
    monkeypatch.setattr(inline, "MOST_BYTES", most)
    contents = (b"a" * 204, b"b" * 1_000, b"c")
    assert len(inline.read(push(*contents, carried=store(*contents)))) == carried


def test_who_knows_nothing_of_it_reads_the_call_as_it_was():
    request = push(HEAD, BODY, carried=store(HEAD, BODY))
    request.DiscardUnknownFields()
    assert request == push(HEAD, BODY, carried={})


def test_a_client_sends_the_pieces_of_the_message_that_it_pushes(monkeypatch):
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    message = Message(RecordDict({"c": ConfigRecord({"answer": 42})}), 1, "query")
    sent = []
    client = inline.pushing(sent.append, inline.inside((message,), get_all_nested_objects))
    client(PushMessagesRequest(message_object_trees=[get_object_tree(message)]))
    (request,) = sent
    objects = get_all_nested_objects(message)
    assert len(objects) == 3
    assert inline.read(over_the_wire(request)) == {name: part.deflate() for name, part in objects.items()}
