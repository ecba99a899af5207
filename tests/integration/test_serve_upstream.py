"""`spt-ds serve --upstream`: the router's answers through a server that splices as vLLM does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from spt_ds import dist
from spt_ds.api import Bot, open_run
from spt_ds.engine.router import open_router
from spt_ds.errors import ConfigError, ModelError
from spt_ds.model.loading import load_base_config
from spt_ds.model.table import load_table
from spt_ds.serve.answers import Meters
from spt_ds.serve.ask import Rules
from spt_ds.serve.batcher import Limits
from spt_ds.serve.upstream import Upstream
from spt_ds.serve.upstream_kinds import kind_of
from tests.helpers.served import body_of, dialogues, embedded_run, served
from tests.helpers.tiny import tiny_lm
from tests.helpers.vllm_like import SIGN, Spliced, spliced

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
# name -> position of the prompt; those below `chat` are in the base's chat template
RUNS = {"prefix": "before_text", "suffix": "before_reply"}
CHATS = {"system": "system", "last_turn": "last_turn", "before": "before_reply"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("routed")
    base = folder / "base"
    shutil.copytree(str(resources.files("spt_ds") / "assets" / "base"), base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, position in {**RUNS, **CHATS}.items():
        chat = {"template": "chat"} if name in CHATS else {}
        embedded_run(folder / name, position, model={"base": str(base)}, data=chat)
    yield folder
    dist.shutdown()
    os.environ.clear()
    os.environ.update(before)


def router_of(run: Path, url: str, kind: str, **limits: float) -> tuple[Upstream, Meters]:
    router, meters = open_router(run, "best", ()), Meters()
    rules = Rules("bank", 4, router.config.generate, 90)
    kept: Any = {"rows": 8, "queue": 32, "seconds": 60, **limits}
    form = kind_of(kind, "base", router.config)
    return Upstream(router, rules, Limits(**kept), meters, form, url), meters


CASES = [(name, kind) for name in RUNS for kind in ("vllm-embeds", "sglang")]
CASES += [(name, "vllm-embeds") for name in CHATS] + [
    ("system", "vllm-chat"),
    ("last_turn", "vllm-chat"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_answers_are_those_of_the_run_itself(folder: Path, name: str, kind: str) -> None:
    bot = Bot(open_run(folder / name, "best", ()))
    with spliced(folder / "base") as (upstream, inner):
        router, meters = router_of(folder / name, upstream, kind)
        with served(router, meters) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
            for number, row in enumerate(dialogues(6)):
                forced = {"prompt_index": number % 4} if number % 2 else {}
                reply = bot.reply(row["persona"], row["history"], prompt=forced.get("prompt_index"))
                told = client.post(CHAT, json=body_of(row, **forced)).json()
                assert told["choices"][0]["message"]["content"] == reply.text
                assert told["spt"]["prompt"] == reply.prompt
                assert told["spt"]["scores"] == list(reply.scores)
                assert told["usage"]["completion_tokens"] == len(reply.tokens)
            stream = client.post(CHAT, json=body_of(row, stream=True, **forced)).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    pieces = [c["delta"].get("content", "") for event in events for c in event["choices"]]
    assert "".join(pieces) == reply.text
    assert len(list(filter(None, pieces))) >= min(3, len(reply.text.split()))
    if kind == "vllm-chat":  # P x D values travel, not the context's
        assert len(json.dumps(inner.asked[-1])) < 20_000


def test_a_template_that_takes_no_parts_gives_other_tokens(folder: Path) -> None:
    """What the documentation warns of is real: the stand-in does it as vLLM does."""
    bot, rows = Bot(open_run(folder / "system", "best", ())), dialogues(6)
    wanted = [bot.reply(row["persona"], row["history"]).text for row in rows]
    with spliced(folder / "base", joined_by="\n") as (upstream, _):
        router, meters = router_of(folder / "system", upstream, "vllm-chat")
        with served(router, meters) as (url, _):
            told = [httpx.post(url + CHAT, json=body_of(row), timeout=60).json() for row in rows]
    assert [one["choices"][0]["message"]["content"] for one in told] != wanted


def test_what_goes_wrong_there(folder: Path) -> None:
    row = dialogues(1)[0]
    with spliced(folder / "base") as (upstream, inner):
        router, meters = router_of(folder / "prefix", upstream, "vllm-embeds", seconds=1)
        with served(router, meters) as (url, _), httpx.Client(base_url=url, timeout=30) as client:
            for status, ours in ((400, 502), (500, 502), (503, 503), (429, 429)):
                inner.status = status
                response = client.post(CHAT, json=body_of(row))
                assert response.status_code == ours
                assert "secret" not in response.text
                assert response.headers.get("retry-after") == ("7" if ours != 502 else None)
            inner.status, inner.pause = 200, 0.3
            response = client.post(CHAT, json=body_of(row, max_tokens=50))
            assert response.status_code == 504
            end = time.monotonic() + 10
            while not inner.cancelled:  # the row there is freed too
                assert time.monotonic() < end
                time.sleep(0.02)
    router, meters = router_of(folder / "prefix", "http://127.0.0.1:9", "vllm-embeds")
    with served(router, meters) as (url, _):
        assert httpx.post(url + CHAT, json=body_of(row), timeout=30).status_code == 502


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("generate.mode=fuse", "under all prompts"),
        ("generate.mode=rank", "under all prompts"),
        ("generate.num_beams=2", "beams"),
        ("generate.repetition_penalty=1.2", "counts the context"),
        ("generate.no_repeat_ngram_size=2", "no such option"),
    ],
)
def test_what_no_server_can_give_is_refused(folder: Path, override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        open_router(folder / "prefix", "best", [override])


def test_a_run_that_does_not_fit_a_message_is_refused(folder: Path) -> None:
    for name, problem in (("prefix", "not the base's own"), ("before", "not inside a message")):
        config = open_router(folder / name, "best", ()).config
        with pytest.raises(ConfigError, match=problem):
            kind_of("vllm-chat", None, config)


def test_the_table_is_the_base_s_and_no_other_kind(folder: Path, tmp_path: Path) -> None:
    config = open_router(folder / "prefix", "best", ()).config.model
    table = load_table(config, load_base_config(config))
    assert torch.equal(table.weight, Spliced(folder / "base").lm.get_input_embeddings().weight)
    tiny_lm("opt", torch.float32).save_pretrained(tmp_path / "opt")
    opt = config.model_copy(update={"base": str(tmp_path / "opt")})
    assert load_table(opt, load_base_config(opt)).weight.shape == (61, 16)
    random = config.model_copy(update={"random_init": True})
    with pytest.raises(ModelError, match="random_init"):
        load_table(random, load_base_config(random))


def test_text_that_is_vllm_s_sign_is_refused(folder: Path) -> None:
    router, meters = router_of(folder / "system", "http://127.0.0.1:9", "vllm-chat")
    row = {"persona": ["I am <prompt_embeds>."], "history": ["hi"]}
    with served(router, meters) as (url, _):
        response = httpx.post(url + CHAT, json=body_of(row), timeout=30)
    assert response.status_code == 400
    assert "<prompt_embeds>" in response.json()["error"]["message"]
    assert SIGN not in response.text


MEMORY = """
import sys
from pathlib import Path
{how}
peak = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print("peak", int(peak[0].split()[1]) // 1024)
"""
HOW = {
    "router": "from spt_ds.engine.router import open_router; open_router(Path({!r}), 'best', ())",
    "whole": "from spt_ds.api import open_run; open_run(Path({!r}), 'best', ())",
}


def test_a_router_has_no_memory_of_the_layers(folder: Path, tmp_path: Path) -> None:
    """A base of 160 MiB, almost all of it layers."""
    run = tmp_path / "fat"
    shutil.copytree(folder / "prefix", run)
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    lm = tiny_lm(
        "llama",
        torch.float32,
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=27_000,
        max_position_embeddings=512,
    )
    lm.save_pretrained(base)
    assert (base / "model.safetensors").stat().st_size > 160 << 20
    text = (run / "config.yaml").read_text().replace(str(folder / "base"), str(base))
    (run / "config.yaml").write_text(text)
    peaks = {}
    for name, how in HOW.items():
        code = MEMORY.format(how=how.format(str(run)))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
        )
        peaks[name] = int(done.stdout.split("peak")[1])
    assert peaks["whole"] - peaks["router"] > 120, peaks
