"""Flower's ClientApp: a message becomes a plan, the site's answer becomes a message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common import wire
from common.blobs import Open
from common.errors import ExchangeError
from common.exchange import Answer, Ask, Hello, Masking, Question, Refusal, RoundPlan, Update
from common.identity import Signer


class Node(Protocol):
    """What answers at a site."""

    def hello(self, question: Question) -> Hello | Refusal:
        """Who this is, or why it will not work on that recipe."""

    def visit(self, plan: RoundPlan) -> Update | Refusal:
        """Does what the plan asks, or says why not."""

    def step(self, ask: Ask) -> Answer | Refusal:
        """Takes a step of a secure sum, or says why not."""

    def misunderstood(self, why: str) -> Refusal:
        """The answer to a message that is none of ours."""


def client_app(
    node_of: Callable[[Context], Node],
    *,
    coordinator: Callable[[], str] | None = None,
    signer: Signer | None = None,
    blobs: Open | None = None,
) -> ClientApp:
    """The app that a hospital runs, deployed or simulated.

    Args:
        node_of: Finds what answers for a Flower context; called at every message, so it must be cheap.
        coordinator: Gives the public key that every message must be signed by; None only where both sides are one
            process.
        signer: Signs every answer.
        blobs: Finds weights that travel beside the messages. None takes only plans that hold them.
    """
    app = ClientApp()

    def answer(message: Message, context: Context, work: Literal["query", "train", "evaluate"]) -> Message:
        node = node_of(context)
        try:
            if coordinator is not None:
                wire.check_signature(message.content, coordinator())
            asked = wire.decode_request(message.content, blobs)
            reply: Hello | Update | Answer | Refusal
            if (expected := _work(asked)) != work:
                raise ExchangeError(f"what belongs into a message to {expected} came as one to {work}")
            if isinstance(asked, Question):
                reply = node.hello(asked)
            elif isinstance(asked, RoundPlan):
                reply = node.visit(asked)
            else:
                reply = node.step(asked)
        except ExchangeError as error:
            reply = node.misunderstood(str(error))
        ticket = wire.ticket(message.content) if blobs is not None else None
        beside = blobs(ticket) if blobs is not None and ticket is not None else None
        return Message(wire.encode(reply, signer, beside) if signer else wire.hand(reply), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, "train")

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, "evaluate")

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return answer(message, context, "query")

    return app


def _work(asked: wire.Request) -> str:
    """The kind of Flower message that such a request comes in."""
    if isinstance(asked, RoundPlan):
        return asked.work
    return "train" if isinstance(asked, Masking) else "query"
