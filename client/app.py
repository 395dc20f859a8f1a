"""Flower's ClientApp: a message becomes a plan, the site's answer becomes a message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common import wire
from common.errors import ExchangeError
from common.exchange import Hello, Question, Refusal, RoundPlan, Update
from common.identity import Signer


class Node(Protocol):
    """What answers at a site."""

    def hello(self, question: Question) -> Hello | Refusal:
        """Who this is, or why it will not work on that recipe."""

    def visit(self, plan: RoundPlan) -> Update | Refusal:
        """Does what the plan asks, or says why not."""

    def misunderstood(self, why: str) -> Refusal:
        """The answer to a message that is none of ours."""


def client_app(
    node_of: Callable[[Context], Node], *, coordinator: Callable[[], str] | None = None, signer: Signer | None = None
) -> ClientApp:
    """The app that a hospital runs, deployed or simulated.

    Args:
        node_of: Finds what answers for a Flower context; called at every message, so it must be cheap.
        coordinator: Gives the public key that every message must be signed by; None only where both sides are one
            process.
        signer: Signs every answer.
    """
    app = ClientApp()

    def answer(message: Message, context: Context, work: Literal["question", "train", "evaluate"]) -> Message:
        node = node_of(context)
        try:
            if coordinator is not None:
                wire.check_signature(message.content, coordinator())
            reply: Hello | Update | Refusal
            if work == "question":
                reply = node.hello(wire.decode(message.content, Question))
            else:
                plan = wire.decode(message.content, RoundPlan)
                if plan.work != work:
                    raise ExchangeError(f"a plan to {plan.work} came as a message to {work}")
                reply = node.visit(plan)
        except ExchangeError as error:
            reply = node.misunderstood(str(error))
        return Message(wire.encode(reply, signer), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, "train")

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, "evaluate")

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return answer(message, context, "question")

    return app
