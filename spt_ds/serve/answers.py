"""What a server says about a reply while it grows, and who can say it.

Either the base is here (`batcher.py`) or an inference server has it (`upstream.py`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from spt_ds.serve.ask import Ask, Refused, Rules


@dataclass(frozen=True)
class Chosen:
    """Comes first: which prompt answers, and why."""

    prompt: int | None  # None: all of them, or not known before the reply is
    scores: tuple[float, ...]  # [K] of the retriever


@dataclass(frozen=True)
class Answer:
    """Comes last: the whole reply."""

    text: str
    prompt: int | None
    scores: tuple[float, ...]
    context_tokens: int
    tokens: int  # new ones, end of sequence included
    finish: str  # `stop` or `length`
    dropped_turns: int  # oldest turns that did not fit


Item = Chosen | str | Answer


class Answers(Protocol):
    """Answers many callers at once."""

    rules: Rules

    def start(self) -> None:
        """Begin, inside the running event loop."""

    def answer(self, ask: Ask) -> AsyncGenerator[Item, None]:
        """Yield what was chosen, pieces of text (for a stream), and the answer.

        Closing it ends the reply. Raises Refused, before the first item or later.
        """

    async def close(self) -> None:
        """End what still runs."""


class Meters:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("spt_requests", "Requests by HTTP status", ["status"], **own)
        self.replies = Counter("spt_replies", "Replies by their prompt", ["prompt"], **own)
        self.tokens = Counter("spt_tokens", "New tokens of all replies", **own)
        self.steps = Counter("spt_steps", "Token steps, each of all running rows", **own)
        self.running = Gauge("spt_rows_running", "Replies that grow now", **own)
        self.waiting = Gauge("spt_rows_waiting", "Requests that wait for a place", **own)
        self.seconds = Histogram("spt_request_seconds", "From request to the last byte", **own)
        self.first = Histogram("spt_first_seconds", "From request to the first item", **own)


def busy(waiting: int, seconds: int) -> Refused:
    """The error of a full queue."""
    return Refused(
        f"{waiting} requests wait already; ask again in {seconds} s",
        status=429,
        kind="rate_limit_error",
        code="queue_full",
        retry_after=seconds,
    )


def too_late(seconds: float) -> Refused:
    """The error of a reply that takes too long."""
    return Refused(
        f"the reply was not done in {seconds:g} s; ask for fewer tokens, or again later",
        status=504,
        kind="timeout_error",
        code="timeout",
    )


def stopping() -> Refused:
    """The error of a server that is about to end."""
    return Refused("the server is stopping", status=503, kind="server_error", code="stopping")


def failed() -> Refused:
    """The error of a fault of ours, whose details are in the log alone."""
    return Refused("the server failed; its log says why", status=500, kind="server_error")
