"""A server that splices embeddings as vLLM and SGLang do, over transformers' own generate.

Its base is loaded by transformers alone, so that nothing of spt_ds helps it. Every request is kept.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

SIGN = "\ufdd0"  # never a character


class Spliced:
    """The base and what was asked of it."""

    def __init__(self, base: Path, joined_by: str = "") -> None:
        """`joined_by` is what stands between the parts of a message: vLLM puts a line end there
        for templates that do not take parts.
        """
        self.lm: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.joined_by = joined_by
        self.asked: list[dict[str, Any]] = []
        self.cancelled = 0
        self.status = 200
        self.pause = 0.0

    def app(self) -> FastAPI:
        app = FastAPI()
        app.post("/v1/completions")(self.completions)
        app.post("/v1/chat/completions")(self.chat)
        app.post("/generate")(self.generate)
        return app

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        return self._stream(body, unpacked(body["prompt_embeds"]), body, "completions")

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        parts: list[torch.Tensor] = []
        messages = []
        for message in body["messages"]:
            texts = message["content"]
            if isinstance(texts, list):
                parts += [unpacked(part["data"]) for part in texts if "data" in part]
                texts = self.joined_by.join(part.get("text", SIGN) for part in texts)
            messages.append({"role": message["role"], "content": texts})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        stretches = [
            self.tokenizer(stretch, add_special_tokens=False)["input_ids"]
            for stretch in text.split(SIGN)
        ]
        table = self.lm.get_input_embeddings()
        rows = [table(torch.tensor(stretches[0], dtype=torch.long))]
        for virtual, ids in zip(parts, stretches[1:], strict=True):
            rows += [virtual, table(torch.tensor(ids, dtype=torch.long))]
        return self._stream(body, torch.cat(rows), body, "chat")

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        settings = dict(body["sampling_params"])
        settings["max_tokens"] = settings.pop("max_new_tokens")
        return self._stream(body, torch.tensor(body["input_embeds"]), settings, "generate")

    def _stream(
        self, body: dict[str, Any], rows: torch.Tensor, settings: dict[str, Any], form: str
    ) -> Response:
        self.asked.append(body)
        if self.status != 200:
            return JSONResponse({"error": "inner secret"}, self.status, {"retry-after": "7"})
        assert settings["temperature"] == 0
        return StreamingResponse(self._events(rows, settings, form), media_type="text/event-stream")

    async def _events(
        self, rows: torch.Tensor, settings: dict[str, Any], form: str
    ) -> AsyncIterator[bytes]:
        said, count, finish = "", 0, None
        try:
            for text, count, finish, matched in self._spoken(rows, settings):
                await asyncio.sleep(self.pause)
                if form == "generate":
                    reason = finish and {"type": finish, "matched": matched}
                    about = {"completion_tokens": count, "finish_reason": reason}
                    yield event({"text": text, "meta_info": about})
                    continue
                more = text[len(said) :]
                part = {"delta": {"content": more}} if form == "chat" else {"text": more}
                yield event(
                    {"choices": [{**part, "finish_reason": finish, "stop_reason": matched}]}
                )
                said = text
            if form != "generate":
                yield event({"choices": [], "usage": {"completion_tokens": count}})
            yield b"data: [DONE]\n\n"
        finally:
            self.cancelled += finish is None

    @torch.no_grad()
    def _spoken(
        self, rows: torch.Tensor, settings: dict[str, Any]
    ) -> Iterator[tuple[str, int, str | None, Any]]:
        """Text so far, tokens, how it ended and by what, token by token."""
        cache = DynamicCache()
        given: dict[str, torch.Tensor] = {"inputs_embeds": rows[None].float()}
        tokens: list[int] = []
        while True:
            out = self.lm(**given, past_key_values=cache, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            stop = next((stop for stop in settings["stop"] if stop in text), None)
            if tokens[-1] in settings["stop_token_ids"]:
                yield text, len(tokens), "stop", tokens[-1]
            elif stop is not None:
                yield text[: text.index(stop)], len(tokens), "stop", stop
            elif len(tokens) == settings["max_tokens"]:
                yield text, len(tokens), "length", None
            else:
                if not text.endswith("\ufffd"):
                    yield text, len(tokens), None, None
                given = {"input_ids": torch.tensor([tokens[-1:]])}
                continue
            return


def unpacked(text: str) -> torch.Tensor:
    """As vLLM does it: a dense tensor of two dimensions, read without running anything."""
    rows = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)
    assert isinstance(rows, torch.Tensor)
    assert rows.dim() == 2
    return rows


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@contextmanager
def spliced(base: Path, joined_by: str = "") -> Iterator[tuple[str, Spliced]]:
    """Such a server on a free port."""
    inner = Spliced(base, joined_by)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(inner.app(), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", inner
    finally:
        server.should_exit = True
        thread.join(20)
