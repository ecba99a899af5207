"""The folder for vLLM, against a stand-in server that reads embeddings as vLLM's source does."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from spt_ds import dist
from spt_ds.api import load
from spt_ds.errors import DataError
from spt_ds.export import command
from spt_ds.export.vllm import Router
from spt_ds.export.vllm_client import post
from spt_ds.run.folder import RunFolder
from tests.helpers.chat_templates import FAMILIES
from tests.helpers.runs import make_run
from tests.helpers.tiny import tiny_lm

DIALOGUES = (
    ((), ("hi",)),
    (("i ski.",), ("hi there",)),
    (("i ski.", "i teach."), ("hi", "hello", "what do you do?")),
    (("i am old.",), ("no", "yes", "why?")),
)


def decoded(data: str) -> torch.Tensor:
    """As the server reads a part: base64 of what torch.save wrote, tensors alone."""
    tensor: torch.Tensor = torch.load(io.BytesIO(base64.b64decode(data)), weights_only=True)
    return tensor


def completed(lm: Any, decode: Any, embeds: torch.Tensor, body: dict[str, Any]) -> str:
    """The likeliest tokens after `embeds` [T, D], as text."""
    with torch.no_grad():
        out = lm.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
            max_new_tokens=body["max_tokens"],
            do_sample=False,
            eos_token_id=body["stop_token_ids"],
            pad_token_id=0,
        )
    return str(decode(out[0], skip_special_tokens=True))


class StandIn(HTTPServer):
    """Answers /v1/completions with the greedy tokens of a base that reads the embeddings."""

    def __init__(self, base: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.keys: list[str | None] = []
        self.decode: Any = None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def complete(self, body: dict[str, Any]) -> str:
        return completed(self.lm, self.decode, decoded(body["prompt_embeds"]), body)


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        self.server.keys.append(self.headers.get("Authorization"))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.path == "/v1/completions" and body["model"] == "some/base"
        text = self.server.complete(body) if known else "no such model"
        answer = json.dumps({"choices": [{"text": text}]}).encode()
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    yield make_run(tmp_path_factory.mktemp("vllm"), "llama", 3)
    dist.shutdown()


@pytest.fixture(scope="module")
def server(run: RunFolder) -> Iterator[StandIn]:
    started = StandIn(run.path.parent / "base")
    started.decode = load(run.path)._session.tokenizer.decode
    yield started
    started.shutdown()
    started.server_close()


def exported(run: RunFolder, out: Path, *options: str) -> Router:
    sets = [word for option in options for word in ("--set", option)]
    assert command.main(["vllm", str(run), str(out), "--base", "some/base", *sets]) == 0
    return Router(out, [f"model.base={run.path.parent / 'base'}"])


@pytest.mark.parametrize("position", ["before_text", "before_reply"])
def test_the_server_gives_our_replies(
    position: str, run: RunFolder, server: StandIn, tmp_path: Path
) -> None:
    router = exported(run, tmp_path / "out", f"prompts.position={position}")
    bot = load(run.path, prompts__position=position)
    for persona, history in DIALOGUES:
        for prompt in (None, 0, 1, 2):
            ours = bot.reply(persona, history, prompt=prompt)
            request = router.request("some/base", persona, history, prompt)
            assert request.path == "/v1/completions"
            assert request.prompt == ours.prompt
            assert request.scores == pytest.approx(ours.scores, abs=1e-6)
            answer = {"choices": [{"text": server.complete(request.body)}]}
            assert router.reply(answer) == ours.text


def test_the_client_that_is_copied_answers(run: RunFolder, server: StandIn, tmp_path: Path) -> None:
    exported(run, tmp_path / "out")
    given = ["--base", str(run.path.parent / "base"), "--persona", "i ski.", "hi there"]

    client = [sys.executable, str(tmp_path / "out" / "client.py"), "--url", server.url, *given]
    done = subprocess.run(
        [*client, "--model", "some/base"], capture_output=True, text=True, timeout=120
    )
    ours = load(run.path).reply(["i ski."], ["hi there"])
    assert done.stdout.startswith(ours.text), done
    assert done.stdout.splitlines()[-1].startswith(f"  [prompt {ours.prompt}; scores"), done


def test_the_server_has_the_last_word(
    run: RunFolder, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    request = exported(run, tmp_path / "out").request("other", [], ["hi"])
    with pytest.raises(OSError, match="the server answered 404"):
        post(server.url, request, 30.0)
    assert server.keys[-1] == "Bearer secret"


# Takes messages in parts, as the templates of bases with pictures do.
IN_PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatted(lm: Any, tokenizer: Any, body: dict[str, Any]) -> str:
    """A chat completion as vLLM makes it: the template around a sign, which the part replaces."""
    sign, tensors = "\ufdd0", []
    for message in body["messages"]:
        for number, part in enumerate(message["content"]):
            if part["type"] == "prompt_embeds":
                tensors.append(decoded(part["data"]))
                message["content"][number] = {"type": "text", "text": sign}
    text = tokenizer.apply_chat_template(
        body["messages"], tokenize=False, add_generation_prompt=True
    )
    ends = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in text.split(sign)]
    table = lm.get_input_embeddings().weight
    before, after = (table[torch.tensor(ids, dtype=torch.int64)] for ids in ends)
    return completed(lm, tokenizer.decode, torch.cat([before, *tensors, after]), body)


@pytest.mark.parametrize("position", ["system", "last_turn"])
@pytest.mark.parametrize("family", ["in parts", "smollm2", "gemma", "llama-3.1"])
def test_a_prompt_inside_a_message(family: str, position: str, tmp_path: Path) -> None:
    """A content part only where the template takes parts. Gemma's takes no system message either,
    and that of Llama 3.1 writes today's date.
    """
    run = make_run(tmp_path, "llama", 3)
    tokenizer = FAMILIES["smollm2" if family == "in parts" else family].tokenizer()
    if family == "in parts":
        tokenizer.chat_template = IN_PARTS
    lm = tiny_lm("llama", torch.float32, vocab_size=len(tokenizer), max_position_embeddings=160)
    lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    for instructions in ("Be kind.", ""):
        options: dict[str, Any] = {"data.template": "chat", "data.instructions": instructions}
        options |= {"prompts.position": position, "data.max_tokens": 150}
        out = tmp_path / f"out-{bool(instructions)}"
        router = exported(run, out, *(f"{k}={json.dumps(v)}" for k, v in options.items()))
        bot = load(run.path, **{key.replace(".", "__"): value for key, value in options.items()})
        for persona, history in DIALOGUES:
            for prompt in (None, 0, 2):
                ours = bot.reply(persona, history, prompt=prompt)
                request = router.request("some/base", persona, history, prompt)
                assert request.prompt == ours.prompt
                if family == "in parts":
                    assert request.path == "/v1/chat/completions"
                    text = chatted(lm, tokenizer, request.body)
                    answer: Any = {"choices": [{"message": {"content": text}}]}
                else:
                    assert request.path == "/v1/completions"
                    embeds = decoded(request.body["prompt_embeds"])
                    text = completed(lm, tokenizer.decode, embeds, request.body)
                    answer = {"choices": [{"text": text}]}
                assert router.reply(answer) == ours.text


def test_embeddings_of_another_size_than_the_layers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "opt_project", 2)
    assert command.main(["vllm", str(run), str(tmp_path / "out"), "--base", "some/base"]) == 2
    assert "have 12 numbers, its layers 16" in capsys.readouterr().err


def test_what_one_request_cannot_say_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, told in (
        ("generate.mode=fuse", "generate.mode is fuse"),
        ("generate.do_sample=true", "generate.do_sample True"),
        ("reference.padded_pool=true", "scores a text by its padding"),
    ):
        given = ["vllm", str(run), str(tmp_path / "out"), "--base", "some/base", "--set", option]
        assert command.main(given) == 2
        assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_its_files_is_named(run: RunFolder, tmp_path: Path) -> None:
    exported(run, tmp_path / "out")
    (tmp_path / "out" / "table.json").write_text("{}")
    with pytest.raises(DataError, match="export vllm"):
        Router(tmp_path / "out", [f"model.base={run.path.parent / 'base'}"])


def test_the_folder_names_no_place_of_this_machine(run: RunFolder, tmp_path: Path) -> None:
    exported(run, tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert str(run.path.parent).encode() not in path.read_bytes(), path
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["data"]["test"] == "not-shared"
