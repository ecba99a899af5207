"""Answers through a server that has the base: prompts are chosen here, tokens are made there.

Only the layout of a request and of its stream differ from kind to kind; see `upstream_kinds.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import httpx

from spt_ds.engine.router import Routed, Router
from spt_ds.errors import SptError
from spt_ds.log import get_logger
from spt_ds.model.conversation import whole_words
from spt_ds.serve.answers import Answer, Chosen, Item, Meters, busy, too_late
from spt_ds.serve.ask import Ask, Refused, Rules
from spt_ds.serve.batcher import Limits
from spt_ds.serve.upstream_kinds import Kind, Said

KEY = "SPT_UPSTREAM_KEY"
CONNECT_SECONDS = 10.0
T = TypeVar("T")


class Upstream:
    """See `Answers`."""

    def __init__(
        self, router: Router, rules: Rules, limits: Limits, meters: Meters, kind: Kind, url: str
    ) -> None:
        self.rules = rules
        self._router, self._limits, self._meters, self._kind = router, limits, meters, kind
        self._url = url.rstrip("/") + kind.path
        self._routing = ThreadPoolExecutor(1, thread_name_prefix="route")
        self._waiting = self._asked = 0

    def start(self) -> None:
        """Begin, inside the running event loop."""
        self._places = asyncio.Semaphore(self._limits.rows)
        key = os.environ.get(KEY)
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self._limits.seconds, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=self._limits.rows),
            # No proxy and no password of a file that the environment happens to name.
            trust_env=False,
        )

    async def close(self) -> None:
        """End what still runs."""
        await self._client.aclose()
        self._routing.shutdown()

    async def answer(self, ask: Ask) -> AsyncGenerator[Item, None]:
        """See `Answers`."""
        if self._waiting >= self._limits.queue:
            raise busy(self._waiting, 1)
        deadline = time.monotonic() + self._limits.seconds
        self._count(1)
        try:
            await _in_time(self._places.acquire(), deadline, self._limits.seconds)
        finally:
            self._count(-1)
        self._meters.running.inc()
        try:
            async with aclosing(self._answer(ask, deadline)) as items:
                async for item in items:
                    yield item
        finally:
            self._meters.running.dec()
            self._places.release()

    def _count(self, more: int) -> None:
        self._waiting += more
        self._meters.waiting.set(self._waiting)

    async def _answer(self, ask: Ask, deadline: float) -> AsyncGenerator[Item, None]:
        self._asked += 1
        key = self._asked if ask.seed is None else ask.seed
        work = partial(self._request, ask, key)
        try:
            routed, body = await asyncio.get_running_loop().run_in_executor(self._routing, work)
        except SptError as error:
            raise Refused(str(error), param="messages", code="context_length_exceeded") from error
        yield Chosen(routed.prompt, routed.scores)
        form = replace(self._router.text, stop=ask.options.stop)
        spoken, said = 0, Said()
        async with aclosing(self._said(body)) as stream:
            while (
                more := await _in_time(_next(stream), deadline, self._limits.seconds)
            ) is not None:
                said = more
                text = form.so_far(whole_words(said.text))
                if ask.stream and len(text) > spoken:
                    yield text[spoken:]
                    spoken = len(text)
        if said.finish is None:
            raise _broken("its stream ended before the reply did")
        text = form.of_text(said.text, said.ended)[1]
        if ask.stream and text[spoken:]:
            yield text[spoken:]
        self._meters.replies.labels(str(routed.prompt)).inc()
        self._meters.tokens.inc(said.tokens)
        counts = (routed.context_tokens, said.tokens)
        told = (routed.prompt, routed.scores)
        yield Answer(text, *told, *counts, said.finish, routed.dropped_turns)

    def _request(self, ask: Ask, key: int) -> tuple[Routed, bytes]:
        """Choose a prompt and lay the request out; in a thread of its own."""
        routed = self._router.route(ask.persona, ask.history, ask.options, key)
        body = self._kind.body(ask, routed, self._router)
        return routed, json.dumps(body).encode()

    async def _said(self, body: bytes) -> AsyncGenerator[Said, None]:
        """What the other server has said so far, each time that it says more."""
        headers = {"content-type": "application/json"}
        said = Said()
        try:
            async with self._client.stream(
                "POST", self._url, content=body, headers=headers
            ) as response:
                if response.status_code != 200:
                    raise _refused_there(response, await response.aread())
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        said = self._kind.read(json.loads(line[6:]), said)
                        yield said
        except httpx.HTTPError as error:
            raise _broken(f"{type(error).__name__} {error}".strip()) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _broken("its stream is not what was expected") from error


async def _next(stream: AsyncGenerator[Said, None]) -> Said | None:
    return await anext(stream, None)


async def _in_time(work: Coroutine[Any, Any, T], deadline: float, seconds: float) -> T:
    try:
        return await asyncio.wait_for(work, deadline - time.monotonic())
    except asyncio.TimeoutError as error:  # another class in Python 3.10
        raise too_late(seconds) from error


def _broken(problem: str) -> Refused:
    # The address and what the other server says stay in the log: callers need not know it.
    get_logger().warning(f"upstream: {problem}")
    return Refused(
        "the inference server behind this one does not answer", status=502, kind="server_error"
    )


def _refused_there(response: httpx.Response, content: bytes) -> Refused:
    if response.status_code in (429, 503):
        wait = response.headers.get("retry-after", "")
        seconds = int(wait) if wait.isdecimal() and len(wait) < 5 else 1
        return Refused(
            "the inference server behind this one is busy",
            status=response.status_code,
            kind="rate_limit_error",
            code="upstream_busy",
            retry_after=seconds,
        )
    return _broken(f"status {response.status_code}: {content[:300].decode(errors='replace')}")
