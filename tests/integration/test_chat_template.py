"""A run in a chat template: training, generation and conversation read the same ids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spt_ds
from spt_ds import dist
from spt_ds.config.generation import GenerateConfig
from spt_ds.config.load import load_config
from spt_ds.engine.session import open_split, open_untrained
from spt_ds.errors import ConfigError
from spt_ds.generate import main as generate
from spt_ds.train import main as train
from tests.helpers.chat_templates import FAMILIES
from tests.helpers.tiny import tiny_lm

OWN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
POSITIONS = ("before_text", "system", "last_turn", "before_reply")
DIALOGUES = [
    {
        "persona": ["i ski."],
        "turns": ["hi", "hello", "so: what?", "tea"],
        "first_speaker": "partner",
    },
    {"persona": [], "turns": ["hello", "a <|im_end|> b", "why"], "first_speaker": "self"},
    {
        "persona": ["i run.", "tea"],
        "turns": ["x " * 20, "y", "z", "ok"],
        "first_speaker": "partner",
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny instruct base and dialogues; the process group of one ends with the module."""
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = FAMILIES["smollm2"].tokenizer()
    lm = tiny_lm("llama", torch.float32, vocab_size=448, max_position_embeddings=200)
    lm.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    text = "".join(json.dumps(row) + "\n" for row in DIALOGUES)
    (folder / "talk.jsonl").write_text(text, encoding="utf-8")
    yield folder
    dist.shutdown()
    os.environ.clear()
    os.environ.update(before)


def options(folder: Path, name: str, *more: str) -> list[str]:
    talk = folder / "talk.jsonl"
    given = [
        f"model.base={folder / 'base'}",
        "model.base_bits=32",
        *(f"data.{split}={talk}" for split in ("train", "valid", "test")),
        f"data.cache_dir={folder / 'cache'}",
        "data.max_tokens=190",
        "data.workers=0",
        "data.template=chat",
        "prompts.tokens=2",
        "train.max_steps=2",
        "train.global_batch=3",
        "generate.max_new_tokens=6",
        *more,
    ]
    words = [word for option in given for word in ("--set", option)]
    return ["--config", "demo", "--run-dir", str(folder / name), *words]


@pytest.mark.parametrize("position", POSITIONS)
def test_training_generation_and_conversation_read_the_same(folder: Path, position: str) -> None:
    assert train(options(folder, position, f"prompts.position={position}")) == 0
    assert generate([str(folder / position)]) == 0
    bot = spt_ds.load(folder / position, generate__max_new_tokens=6)
    session, reserved = bot._session, GenerateConfig(max_new_tokens=6)
    stores = {split: open_split(session, split) for split in ("train", "valid", "test")}
    lines = (folder / position / "generate" / "predictions.jsonl").read_text(encoding="utf-8")
    for row, line in enumerate(map(json.loads, lines.splitlines())):
        batch, _ = bot._batch(tuple(line["persona"]), tuple(line["history"]), reserved)
        for store in stores.values():
            assert store[row]["context_ids"] == batch.context_ids.tolist()
            assert store[row]["prompt_at"] == batch.prompt_at[0]
        reply = bot.reply(line["persona"], line["history"])
        assert (reply.text, len(reply.tokens)) == (line["reply"], line["new_tokens"])


def test_a_conversation_reads_what_precedes_the_prompt_once(folder: Path) -> None:
    if not (folder / "last_turn").exists():
        assert train(options(folder, "last_turn", "prompts.position=last_turn")) == 0
    bot = spt_ds.load(folder / "last_turn", generate__max_new_tokens=4)
    history: list[str] = []
    for message in ("hi", "so?", "and?"):
        history.append(message)
        reply = bot.reply(["i ski."], history)
        fresh = spt_ds.load(folder / "last_turn", generate__max_new_tokens=4)
        assert fresh.reply(["i ski."], history).tokens == reply.tokens
        history.append(reply.text or "ok")


def test_a_run_keeps_the_text_of_its_jinja_file(folder: Path) -> None:
    file = folder / "own.jinja"
    file.write_text(OWN, encoding="utf-8")
    words = options(folder, "own", f"data.template={file}")
    assert train(words) == 0
    file.write_text(OWN.replace("[assistant]", "[other]"), encoding="utf-8")
    bot = spt_ds.load(folder / "own")
    assert bot._session.config.data.template == OWN
    batch, _ = bot._batch((), ("hi",), GenerateConfig())
    assert bot._session.tokenizer.decode(batch.context_ids) == "[user] hi<|im_end|>[assistant]"
    # The same command would continue another run.
    assert train(words) == 2


def test_a_stop_text_ends_each_reply_of_a_batch_by_itself(folder: Path) -> None:
    if not (folder / "before_text").exists():
        assert train(options(folder, "before_text")) == 0
    bot = spt_ds.load(folder / "before_text", generate__max_new_tokens=24)
    plain = bot.reply(["i ski."], ["hi"])
    assert len(plain.text) > 4
    stop = plain.text[2:4]
    out, more = folder / "stopped", ["generate.max_new_tokens=24", f"generate.stop={[stop]!r}"]
    words = [word for option in more for word in ("--set", option)]
    assert generate([str(folder / "before_text"), "--out", str(out), *words]) == 0
    stopped = spt_ds.load(
        folder / "before_text", generate__max_new_tokens=24, generate__stop=[stop]
    )
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert any(stop in bot.reply(r["persona"], r["history"]).text for r in map(json.loads, lines))
    for line in map(json.loads, lines):
        whole = bot.reply(line["persona"], line["history"])
        reply = stopped.reply(line["persona"], line["history"])
        assert line["clean"] == "none"
        assert line["reply"] == reply.text == whole.text.partition(stop)[0].strip()
        assert tuple(whole.tokens[: line["new_tokens"]]) == reply.tokens
        pieces = "".join(stopped.stream(line["persona"], line["history"]))
        assert pieces == reply.text


@pytest.mark.parametrize("template", ["chat", "spt"])
def test_prompts_begin_as_the_template_writes_a_persona(folder: Path, template: str) -> None:
    texts, tokens = ("i ski.", "i teach music at night, and i run."), 16
    words = [
        "data.max_tokens=180",
        f"data.template={template}",
        "prompts.init=template",
        "prompts.count=2",
        f"prompts.tokens={tokens}",
        f"prompts.init_texts={json.dumps(texts)}",
    ]
    own = [word for word in options(folder, "init", *words) if "=" in word]
    bot = open_untrained(load_config("demo", own), None, dist.init(60))
    bank = bot.spt.trainables.bank.weight.detach()
    table = load_file(folder / "base" / "model.safetensors")["model.embed_tokens.weight"]
    tokenizer = FAMILIES["smollm2"].tokenizer()
    before = "<|im_start|>system\n" if template == "chat" else "given persona: "
    sizes = []
    for prompt, text in zip(bank, texts, strict=True):
        ids = tokenizer(before + text, add_special_tokens=False)["input_ids"]
        sizes.append(len(ids))
        # A short text is repeated, a long one cut.
        assert torch.equal(prompt, table[[ids[n % len(ids)] for n in range(tokens)]])
    assert sizes[0] < tokens < sizes[1], "the case must have both"
    assert not torch.equal(bank[0], bank[1])
    bot.sharding.close()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.template=none.jinja"], "neither spt nor chat, and no Jinja file of that name"),
        (["data.template=README.md"], "holds no Jinja template"),
        (["data.instructions=Be brief."], "template: spt has no place for it"),
        (["data.template_variables.a=1"], "template: spt has no place for it"),
        (["prompts.position=system"], "a place in a chat template, and data.template is spt"),
        (["prompts.position=middle"], "prompts.position"),
        (["data.template=chat", "data.template_variables={a: [1]}"], "template_variables"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(spt_ds.__file__).parents[1])
    with pytest.raises(ConfigError) as caught:
        load_config("demo", overrides)
    assert words in str(caught.value)


def test_an_option_of_several_values_is_one_option() -> None:
    from spt_ds.config.load import options_of

    config: Any = load_config(
        "demo", ["data.template=chat", "data.template_variables.enable_thinking=false"]
    )
    assert options_of(config)["data.template_variables"] == {"enable_thinking": False}
