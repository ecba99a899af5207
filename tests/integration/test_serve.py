"""`spt-ds serve` on the shipped base: the replies of many callers, and what is refused."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import serving
from spt_ds import dist
from spt_ds.api import Bot, Reply, open_run
from spt_ds.serve.answers import Meters
from spt_ds.serve.ask import Rules
from spt_ds.serve.batcher import Batcher, Limits
from tests.helpers.served import NEW_TOKENS, body_of, dialogues, embedded_run, served

CHAT = "/v1/chat/completions"
PLACEMENTS = {"prefix": "before_text", "suffix": "before_reply"}
CALLERS = 64


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs named prefix and suffix."""
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("served")
    for name, position in PLACEMENTS.items():
        embedded_run(folder / name, position)
    yield folder
    dist.shutdown()
    os.environ.clear()
    os.environ.update(before)


class Server:
    """A run that is served from this process."""

    def __init__(self, run: Path, *overrides: str, **limits: float) -> None:
        self.session = open_run(run, "best", overrides)
        self.meters = Meters()
        options = self.session.config.generate
        rules = Rules("bank", self.session.config.prompts.count, options, 96)
        kept: Any = {"rows": 32, "queue": 128, "seconds": 60, **limits}
        self.batcher = Batcher(self.session, rules, Limits(**kept), self.meters)

    def bot(self, **generate: Any) -> Bot:
        """A bot of the same run under other options."""
        options = self.session.config.generate.model_copy(update=generate)
        config = self.session.config.model_copy(update={"generate": options})
        return Bot(replace(self.session, config=config))

    def gauge(self, name: str, **labels: str) -> float:
        return self.meters.registry.get_sample_value(name, labels) or 0.0


def want(bot: Bot, row: dict[str, Any], prompt: int | None = None) -> Reply:
    return bot.reply(row["persona"], row["history"], prompt=prompt)


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request, whole or put together from its stream."""
    if not body.get("stream"):
        response = await client.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        told: dict[str, Any] = response.json()
        return {
            "text": told["choices"][0]["message"]["content"],
            "finish": told["choices"][0]["finish_reason"],
            "tokens": told["usage"]["completion_tokens"],
            **told["spt"],
        }
    pieces, said = [], {}
    async with client.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200
        lines = [line[6:] async for line in response.aiter_lines() if line]
    assert lines[-1] == "[DONE]"
    for event in map(json.loads, lines[:-1]):
        said.update(event.get("spt", {}))
        if event.get("usage"):
            said["tokens"] = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            pieces.append(choice["delta"].get("content", ""))
            said["finish"] = choice["finish_reason"]
    return {"text": "".join(pieces), **said}


def gather(url: str, bodies: list[dict[str, Any]], at_once: int = 1000) -> list[dict[str, Any]]:
    async def work() -> list[dict[str, Any]]:
        gate = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

            async def one(body: dict[str, Any]) -> dict[str, Any]:
                async with gate:
                    return await ask(client, body)

            return list(await asyncio.gather(*map(one, bodies)))

    return asyncio.run(work())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_many_callers_get_what_each_would_get_alone(runs: Path, placement: str) -> None:
    server = Server(runs / placement)
    bodies, wanted = [], []
    for number, row in enumerate(dialogues(CALLERS)):
        # each prompt is forced for some; lengths differ, so that rows come and go
        forced = number % 5 if number % 5 < 4 else None
        limit = 3 + number % NEW_TOKENS
        more: dict[str, Any] = {"max_tokens": limit, "stream": number % 3 == 0}
        more["stream_options"] = {"include_usage": True}
        if forced is not None:
            more["prompt_index"] = forced
        bodies.append(body_of(row, **more))
        wanted.append(want(server.bot(max_new_tokens=limit), row, forced))
    with served(server.batcher, server.meters) as (url, _):
        got = gather(url, bodies)
    for reply, answer in zip(wanted, got, strict=True):
        assert answer["text"] == reply.text
        assert answer["tokens"] == len(reply.tokens)
        assert answer["prompt"] == reply.prompt
        assert answer["scores"] == list(reply.scores)
        assert answer["dropped_turns"] == reply.dropped_turns
    assert len({reply.prompt for reply in wanted}) == 4
    assert len({reply.text for reply in wanted}) > CALLERS // 2  # a mix-up would be seen
    assert server.gauge("spt_tokens_total") == sum(len(reply.tokens) for reply in wanted)
    # they did share steps
    assert server.gauge("spt_steps_total") < server.gauge("spt_tokens_total") / 5


def test_what_cannot_share_a_step_is_answered_by_itself(runs: Path) -> None:
    row = dialogues(1)[0]
    for mode in ("fuse", "rank"):
        server = Server(runs / "suffix", f"generate.mode={mode}")
        reply = want(server.bot(), row)
        with served(server.batcher, server.meters) as (url, _):
            bodies = [body_of(row), body_of(row, prompt_index=2), body_of(row, stream=True)]
            whole, forced, stream = gather(url, bodies)
        assert whole["text"] == stream["text"] == reply.text
        assert whole["prompt"] == reply.prompt
        assert forced["text"] == want(server.bot(), row, 2).text
    beams = Server(runs / "prefix", "generate.num_beams=3")
    with served(beams.batcher, beams.meters) as (url, _):
        (answer,) = gather(url, [body_of(row)])
    assert answer["text"] == want(beams.bot(), row).text


def test_stops_penalties_and_sampling_share_steps(runs: Path) -> None:
    server = Server(runs / "prefix", "generate.repetition_penalty=1.3", "generate.clean=none")
    rows = dialogues(6)
    plain = [want(server.bot(), row) for row in rows]
    stops = [reply.text.split()[1][:3] for reply in plain]
    with served(server.batcher, server.meters) as (url, _):
        cut = [body_of(row, stop=[stop]) for row, stop in zip(rows, stops, strict=True)]
        drawn = [body_of(row, temperature=1.5, seed=n) for n, row in enumerate(rows)]
        got = gather(url, cut + drawn + drawn + [body_of(row, temperature=0) for row in rows])
    for row, stop, answer in zip(rows, stops, got, strict=False):
        assert answer["text"] == want(server.bot(stop=(stop,)), row).text
        assert stop not in answer["text"]
        assert answer["finish"] == "stop"
    texts = [answer["text"] for answer in got]
    assert texts[6:12] == texts[12:18]  # the same seed draws the same, whoever else is there
    assert texts[6:12] != texts[18:]
    assert texts[18:] == [reply.text for reply in plain]


MALFORMED = [
    (b"{", 400, "invalid_json"),
    (b"[]", 400, "invalid_json"),
    (b'{"messages": [], "messages": []}', 400, "invalid_json"),
    (b"\xff\xfe", 400, "invalid_json"),
    (b'{"a":' * 5000, 400, "invalid_json"),
    (b"{}", 400, "invalid_value"),
    (b'{"messages": [{"role": "bot", "content": "x"}]}', 400, "invalid_value"),
    (b'{"messages": [{"role": "user", "content": 3}]}', 400, "invalid_value"),
    (b'{"messages": [{"role": "assistant", "content": "x"}]}', 400, "invalid_value"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, None),
    (b'{"messages": [], "max_tokens": 0}', 400, "invalid_value"),
    (b'{"messages": [], "max_tokens": 97}', 400, "invalid_value"),
    (b'{"messages": [], "max_tokens": true}', 400, "invalid_value"),
    (b'{"messages": [], "prompt_index": 4}', 400, "invalid_value"),
    (b'{"messages": [], "prompt_index": -1}', 400, "invalid_value"),
    (b'{"messages": [], "n": 2}', 400, "invalid_value"),
    (b'{"messages": [], "stop": [""]}', 400, "invalid_value"),
    (b'{"messages": [], "stream": "yes"}', 400, "invalid_value"),
    (b'{"messages": [], "top_p": 0.5}', 400, "invalid_value"),
    (b'{"messages": [], "tools": [{}]}', 400, "unsupported_parameter"),
    (b'{"messages": [], "response_format": {"type": "json_object"}}', 400, "unsupported_parameter"),
    (b'{"messages": [], "model": "gpt-4"}', 404, "model_not_found"),
    (
        b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"long " * 400),
        400,
        "context_length_exceeded",
    ),
]


def test_what_is_refused_says_why_in_openai_s_shape(runs: Path) -> None:
    server = Server(runs / "prefix")
    with served(server.batcher, server.meters, max_body=1 << 16) as (url, _):
        client = httpx.Client(base_url=url, headers={"content-type": "application/json"})
        for content, status, code in MALFORMED:
            response = client.post(CHAT, content=content)
            error = response.json()["error"]
            assert (response.status_code, error["code"] if code else None) == (status, code), error
            assert set(error) == {"message", "type", "param", "code"}
            assert len(error["message"]) > 10
        large = b" " * ((1 << 16) + 1)
        assert client.post(CHAT, content=large).status_code == 413
        assert client.post(CHAT, content=iter([large])).status_code == 413  # of unknown length
        assert (
            client.post(CHAT, content="{}", headers={"content-type": "text/plain"}).status_code
            == 415
        )
        assert client.get(CHAT).json()["error"]["message"] == "Method Not Allowed"
        assert client.get("/docs").status_code == 404
        # a page of another site that has its name point here
        assert client.get("/v1/models", headers={"host": "evil.example:80"}).status_code == 421
        assert client.get("/v1/models", headers={"host": "[::1]:80"}).status_code == 200
        (answer,) = gather(url, [body_of(dialogues(1)[0])])
    assert answer["text"] == want(server.bot(), dialogues(1)[0]).text


def test_a_key_is_asked_for(runs: Path) -> None:
    server = Server(runs / "prefix")
    with served(server.batcher, server.meters, key="k" * 20, local=False) as (url, _):
        client = httpx.Client(base_url=url)
        for given in ({}, {"authorization": "Bearer nope"}, {"authorization": "k" * 20}):
            for path in ("/v1/models", "/metrics", "/no-such"):
                response = client.get(path, headers=given)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/").headers["content-security-policy"].startswith("default-src 'none'")
        known = {"authorization": "Bearer " + "k" * 20}
        assert client.get("/v1/models", headers=known).json()["data"][0]["spt"]["prompts"] == 4
        assert "spt_rows_running 0.0" in client.get("/metrics", headers=known).text


def test_a_full_queue_asks_to_come_back(runs: Path) -> None:
    server = Server(runs / "prefix", rows=1, queue=2)
    body = body_of(dialogues(1)[0])

    async def work(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return list(await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(20))))

    with served(server.batcher, server.meters) as (url, _):
        responses = asyncio.run(work(url))
    states = [response.status_code for response in responses]
    assert states.count(200) >= 2
    assert set(states) == {200, 429}
    refused = next(response for response in responses if response.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"


def wait_for(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_slow_and_leaving_callers_free_their_rows(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(runs / "prefix", "generate.min_new_tokens=90", "generate.max_new_tokens=90")
    turn = server.batcher._turn

    def slow(*args: Any) -> Any:
        time.sleep(0.02)
        return turn(*args)

    monkeypatch.setattr(server.batcher, "_turn", slow)
    body = json.dumps(body_of(dialogues(1)[0], stream=True)).encode()
    head = (
        b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % CHAT.encode()
    )
    with served(server.batcher, server.meters, body_seconds=0.5) as (url, _):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        for content in (body, body.replace(b'"stream": true', b'"stream": false')):
            caller = socket.create_connection(address)
            caller.sendall(head + b"content-length: %d\r\n\r\n" % len(content) + content)
            wait_for(lambda: server.gauge("spt_rows_running") == 1)
            caller.close()
            wait_for(lambda: server.gauge("spt_rows_running") == 0, 1.5)
        assert server.gauge("spt_replies_total", prompt="0") == 0
        # a body that never comes
        caller = socket.create_connection(address)
        caller.sendall(head + b"content-length: 100\r\n\r\n{")
        assert b" 408 " in caller.recv(1000)


@pytest.mark.parametrize("mode", ["select", "fuse"])
def test_a_late_reply_is_given_up(runs: Path, mode: str) -> None:
    long = ("generate.min_new_tokens=90", "generate.max_new_tokens=90", f"generate.mode={mode}")
    server = Server(runs / "prefix", *long, seconds=0.05)
    row = dialogues(1)[0]
    with served(server.batcher, server.meters) as (url, _):
        client = httpx.Client(base_url=url, timeout=30)
        response = client.post(CHAT, json=body_of(row))
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        # of a stream the status may be sent already
        text = client.post(CHAT, json=body_of(row, stream=True)).text
        assert '"code": "timeout"' in text or '"code":"timeout"' in text
        wait_for(lambda: server.gauge("spt_rows_running") == 0)


def test_a_fault_gives_up_its_replies_and_no_others(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(runs / "prefix")
    row, rows = dialogues(1)[0], server.batcher._rows
    real = type(rows).join

    def broken(*args: Any) -> None:
        monkeypatch.setattr(type(rows), "join", real)
        raise RuntimeError("secret details")

    monkeypatch.setattr(type(rows), "join", broken)
    with served(server.batcher, server.meters) as (url, _):
        client = httpx.Client(base_url=url, timeout=30)
        response = client.post(CHAT, json=body_of(row))
        assert response.status_code == 500
        assert "secret" not in response.text
        (answer,) = gather(url, [body_of(row)])
    assert answer["text"] == want(server.bot(), row).text


def test_a_signal_lets_replies_finish_and_refuses_new_ones(runs: Path) -> None:
    command = [sys.executable, "-m", "spt_ds.cli", "serve", str(runs / "suffix"), "--port", "0"]
    command += ["--set", "generate.max_new_tokens=90", "--set", "generate.min_new_tokens=90"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[2]
        row = dialogues(1)[0]
        with (
            httpx.Client(base_url=url, timeout=60) as other,
            httpx.stream("POST", url + CHAT, json=body_of(row, stream=True), timeout=60) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: other.get("/healthz").status_code == 503)
            assert other.post(CHAT, json=body_of(row)).json()["error"]["code"] == "stopping"
            rest = list(lines)
        assert "data: [DONE]" in rest
        assert any('"finish_reason": "length"' in line for line in rest)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("more", "environment", "problem"),
    [
        (["--host", "0.0.0.0"], {}, "set a key in SPT_API_KEY"),
        ([], {"SPT_API_KEY": "short"}, "16 or more"),
        (["--port", "70000"], {}, "no such port"),
        (["--host", "no.such.host.invalid"], {"SPT_API_KEY": "k" * 16}, "no socket can be opened"),
    ],
)
def test_an_address_that_cannot_be(
    runs: Path,
    more: list[str],
    environment: dict[str, str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from spt_ds.serve.command import main

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([str(runs / "prefix"), *more]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_ten_thousand_requests_leave_memory_flat(runs: Path) -> None:
    rows = [row["mib"] for row in serving.memory(runs / "suffix", 10_000, CALLERS)]
    # the first thousand fill what is kept: threads, buffers, ids of texts
    assert max(rows[5:]) < max(rows[:5]) + serving.MOST_MIB


@pytest.mark.slow
def test_many_callers_cost_less_than_one_at_a_time(runs: Path) -> None:
    args = argparse.Namespace(
        run=runs / "suffix", callers=CALLERS, alone=12, together=128, rounds=1
    )
    row = serving.speed(args, 96)
    # Of the processor's time, which neighbours on the machine change less than the clock's.
    assert row["alone_cpu_ms"] > 4 * row["together_cpu_ms"], row
