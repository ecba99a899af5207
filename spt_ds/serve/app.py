"""The routes: OpenAI's chat completions and models, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from spt_ds.log import get_logger
from spt_ds.serve.answers import Answer, Answers, Chosen, Item, Meters, failed
from spt_ds.serve.ask import Ask, Refused, read_ask
from spt_ds.serve.guard import Guard, error_response

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/scores.js": ("scores.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
MODELS, CHAT, HEALTH, METRICS = "/v1/models", "/v1/chat/completions", "/healthz", "/metrics"


def create_app(answers: Answers, meters: Meters, guard: Guard) -> FastAPI:
    """The application; `guard` stands before every route."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        answers.start()
        yield
        await answers.close()

    # Its own pages of documentation load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    chat = Chat(answers, meters, guard)
    app.add_api_route(CHAT, chat.complete, methods=["POST"], response_model=None)
    app.add_api_route(MODELS, chat.models, methods=["GET"])

    async def health() -> JSONResponse:
        return JSONResponse(
            {"status": "stopping" if guard.stopping else "ok"}, 503 if guard.stopping else 200
        )

    async def metrics() -> Response:
        return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

    app.add_api_route(HEALTH, health, methods=["GET"])
    app.add_api_route(METRICS, metrics, methods=["GET"], response_model=None)
    for path, (name, kind) in PAGE.items():
        app.add_api_route(path, _file(name, kind), methods=["GET"], response_model=None)

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return error_response(error)

    async def no_route(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(Refused(f"{error.detail}", status=error.status_code))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, no_route)
    app.add_middleware(guard.around)
    return app


def _file(name: str, kind: str) -> Any:
    content = (resources.files("spt_ds") / "serve" / "page" / name).read_bytes()

    async def send() -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return send


class Chat:
    """Chat completions, whole or as a stream of server-sent events."""

    def __init__(self, answers: Answers, meters: Meters, guard: Guard) -> None:
        self._answers, self._meters, self._guard = answers, meters, guard
        self._began = int(time.time())

    async def models(self) -> dict[str, Any]:
        """The one model that is served; `spt` is what only this server has."""
        rules = self._answers.rules
        spt = {
            "prompts": rules.prompts,
            "mode": rules.options.mode,
            "max_tokens": rules.max_tokens,
            "default_max_tokens": rules.options.max_new_tokens,
        }
        model = {"id": rules.name, "object": "model", "created": self._began}
        return {"object": "list", "data": [{**model, "owned_by": "spt-ds", "spt": spt}]}

    async def complete(self, request: Request) -> Response:
        """Answer one request; a caller that goes away ends its reply."""
        began = time.monotonic()
        ask = read_ask(await self._guard.body(request), self._answers.rules)
        items = self._answers.answer(ask)
        # The first item comes before the status is sent: what is refused until then has its own.
        gone = asyncio.ensure_future(_disconnected(request))
        whole = asyncio.ensure_future(anext(items) if ask.stream else _last(items))
        await asyncio.wait({gone, whole}, return_when=asyncio.FIRST_COMPLETED)
        try:
            if not whole.done():
                whole.cancel()
                await asyncio.gather(whole, return_exceptions=True)
                await items.aclose()
                return Response(status_code=499)  # nobody reads it
            item = await whole
        finally:
            gone.cancel()
        self._meters.first.observe(time.monotonic() - began)
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self._answers.rules.name,
        }
        if not ask.stream:
            assert isinstance(item, Answer)
            return JSONResponse(_whole(head, item))
        events = self._events(head, ask, item, items)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )

    async def _events(
        self, head: dict[str, Any], ask: Ask, first: Item, items: AsyncGenerator[Item, None]
    ) -> AsyncGenerator[bytes, None]:
        head = {**head, "object": "chat.completion.chunk"}
        try:
            yield _event(_chunk(head, first))
            async for item in items:
                yield _event(_chunk(head, item))
                if isinstance(item, Answer) and ask.usage:
                    yield _event({**head, "choices": [], "usage": _usage(item)})
        except Refused as error:  # the status was sent long ago
            yield _event(error.body)
        except Exception:
            get_logger().exception("a stream failed")
            yield _event(failed().body)
        finally:
            # Also where the caller went away: this ends the reply.
            await items.aclose()
        yield b"data: [DONE]\n\n"


async def _last(items: AsyncGenerator[Item, None]) -> Item:
    async for item in items:
        last = item
    return last


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _spt(item: Chosen | Answer) -> dict[str, Any]:
    told: dict[str, Any] = {"prompt": item.prompt, "scores": list(item.scores)}
    if isinstance(item, Answer):
        told["dropped_turns"] = item.dropped_turns
    return told


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.context_tokens + answer.tokens
    return {
        "prompt_tokens": answer.context_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": total,
    }


def _whole(head: dict[str, Any], answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}
    return {
        **head,
        "object": "chat.completion",
        "choices": [choice],
        "usage": _usage(answer),
        "spt": _spt(answer),
    }


def _chunk(head: dict[str, Any], item: Item) -> dict[str, Any]:
    if isinstance(item, str):
        return {**head, "choices": [_delta({"content": item}, None)]}
    if isinstance(item, Chosen):
        delta = _delta({"role": "assistant", "content": ""}, None)
    else:
        delta = _delta({}, item.finish)
    return {**head, "choices": [delta], "spt": _spt(item)}


def _delta(delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish}
