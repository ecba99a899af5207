"""`spt_ds.load`, its replies and the terminal conversation on tiny random bases, against
evaluation's own decoding.
"""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import spt_ds
from spt_ds import api, chat, dist
from spt_ds.api import Bot, Reply
from spt_ds.batch import Batch
from spt_ds.config.load import dump_config, load_config
from spt_ds.config.schema import Config
from spt_ds.data.encode import encode_context
from spt_ds.display import shown
from spt_ds.engine.generator import Generator, decode_batch
from spt_ds.engine.session import open_split
from spt_ds.errors import CheckpointError, ConfigError, DataError, EngineError, SptError
from spt_ds.model.conversation import ReplyHooks
from spt_ds.model.decode import Decoded
from spt_ds.run import checkpoint
from spt_ds.run.folder import ReplyFolder
from tests.helpers.tiny import tiny_backbone, tiny_lm, tiny_spt
from tests.helpers.tokenizers import byte_tokenizer

ARCHS = ["opt", "llama", "gemma2"]  # gemma2: every second layer sees a sliding window of 64 tokens
NEW_TOKENS, PROMPT_TOKENS, WINDOW = 12, 2, 300
PERSONA = ("i like dogs.", "i work at night.")
MESSAGES = ("hi, how are you today?", "what do you do for a living?", "nice", "and your dogs?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Bases and runs named ARCH-PLACEMENT; the process group of one and its variables end with the
    module.
    """
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("runs")
    for arch in ARCHS:
        backbone = tiny_backbone(arch, torch.float32, vocab_size=258, max_position_embeddings=320)
        tiny_lm(arch, torch.float32, vocab_size=258, max_position_embeddings=320).save_pretrained(
            folder / arch
        )
        byte_tokenizer().save_pretrained(folder / arch)
        for placement, position in (("prefix", "before_text"), ("suffix", "before_reply")):
            config = Config.model_validate(
                {
                    "model": {"base": str(folder / arch), "base_bits": 32},
                    "prompts": {"count": 3, "tokens": PROMPT_TOKENS, "position": position},
                    "data": {
                        "max_tokens": WINDOW,
                        "test": str(folder / "test.jsonl"),
                        "cache_dir": str(folder / "c"),
                    },
                    "generate": {"max_new_tokens": NEW_TOKENS, "batch_size": 3, "perplexity": True},
                }
            )
            run = folder / f"{arch}-{placement}"
            run.mkdir()
            (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
            spt = tiny_spt(backbone, count=3, tokens=PROMPT_TOKENS, dtype=torch.float32)
            state = {"step": 7, "run": {"best_step": 7}}
            saved = checkpoint.Checkpoint(dict(spt.trainables.named_parameters()), {}, state)
            checkpoint.save(run / "checkpoints", saved)
    yield folder
    dist.shutdown()
    os.environ.clear()
    os.environ.update(before)


class Reads:
    """Tokens that each call of the base read, since the last `take`."""

    def __init__(self, bot: Bot) -> None:
        self.calls: list[int] = []
        lm: Any = bot._session.backbone.lm
        lm.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: object, args: object, kwargs: dict[str, Any]) -> None:
        given = (
            kwargs["inputs_embeds"]
            if kwargs.get("inputs_embeds") is not None
            else kwargs["input_ids"]
        )
        self.calls.append(given.shape[1])

    def take(self) -> list[int]:
        calls, self.calls = self.calls, []
        return calls


def context_of(bot: Bot, persona: tuple[str, ...], history: list[str]) -> list[int]:
    ids = encode_context(
        persona, history, bot._session.tokenizer, WINDOW, reserved=NEW_TOKENS
    ).context_ids
    return list(ids)


def fresh(bot: Bot, persona: tuple[str, ...], history: list[str], mode: str = "select") -> Decoded:
    """What evaluation decodes for this context, with nothing kept from before."""
    ids = context_of(bot, persona, history)
    batch = Batch(np.array(ids), np.zeros(0, dtype=np.int64), (len(ids),), (0,), (0,), (1.0,))
    options = bot._session.config.generate.model_copy(update={"mode": mode, "perplexity": False})
    return decode_batch(bot._session, batch, options)


def same(reply: Reply, decoded: Decoded) -> None:
    assert list(reply.tokens) == decoded.tokens[0]
    assert reply.prompt == decoded.chosen[0]
    assert reply.scores == tuple(decoded.scores[:, 0].tolist())


@pytest.mark.parametrize("arch", ARCHS)
def test_conversation_reads_its_context_once(folder: Path, arch: str) -> None:
    """Suffix: each turn reads what is new and the prompt; the tokens are those of a decode from
    nothing.
    """
    bot = spt_ds.load(folder / f"{arch}-suffix")
    reads = Reads(bot)
    history: list[str] = []
    known: list[int] = []
    for turn, message in enumerate(MESSAGES):
        history.append(message)
        prompt = (
            None if turn != 2 else (bot.reply(PERSONA, history).prompt or 0) ^ 1
        )  # another prompt than the best
        if turn == 2:
            known = context_of(bot, PERSONA, history)
        reads.take()
        reply = bot.reply(PERSONA, history, prompt=prompt)
        first, *others = reads.take()
        context = context_of(bot, PERSONA, history)
        assert context[: len(known)] == known
        assert first == len(context) - len(known) + PROMPT_TOKENS
        assert others == [1] * (len(reply.tokens) - 1)
        same(reply, fresh(bot, PERSONA, history, "select" if prompt is None else f"fixed:{prompt}"))
        history.append(reply.text)
        known = context


def test_penalties_see_the_reply_and_not_the_kept_context(folder: Path) -> None:
    options: dict[str, Any] = {
        "generate__repetition_penalty": 3.0,
        "generate__no_repeat_ngram_size": 2,
    }
    bot = spt_ds.load(folder / "llama-suffix", **options)
    plain = spt_ds.load(folder / "llama-suffix")
    history: list[str] = []
    changed = 0
    for message in MESSAGES:
        history.append(message)
        reply = bot.reply(PERSONA, history)
        same(reply, fresh(bot, PERSONA, history))
        changed += reply.tokens != plain.reply(PERSONA, history).tokens
        history.append(reply.text)
    assert changed


def test_prefix_reads_all_again(folder: Path) -> None:
    """The prompt stands before the context there, so nothing of it can be kept."""
    bot = spt_ds.load(folder / "llama-prefix")
    reads = Reads(bot)
    history: list[str] = []
    for message in MESSAGES[:2]:
        history.append(message)
        reply = bot.reply(PERSONA, history)
        assert reads.take()[0] == PROMPT_TOKENS + len(context_of(bot, PERSONA, history))
        same(reply, fresh(bot, PERSONA, history))
        reads.take()
        history.append(reply.text)


@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_another_dialogue_keeps_what_it_shares(folder: Path, arch: str) -> None:
    bot = spt_ds.load(folder / f"{arch}-suffix")
    long = ["hello " * 12, "fine", "what " * 12, "ok", "bye"]
    asked: list[tuple[tuple[str, ...], list[str]]] = [
        (PERSONA, ["hi", "hello", "you?"]),
        (PERSONA, ["hi"]),  # earlier in the same dialogue
        (PERSONA, ["hi"]),  # the same again
        (PERSONA[:1], ["hi"]),  # another persona
        (PERSONA, long),
        (PERSONA, [*long, "so " * 30, "more?"]),  # the oldest turns no longer fit
    ]
    replies = [bot.reply(persona, history) for persona, history in asked]
    for reply, (persona, history) in zip(replies, asked, strict=True):
        same(reply, fresh(bot, persona, history))
    assert [bool(reply.dropped_turns) for reply in replies] == [False] * 5 + [True]


def test_failure_forgets_the_context(folder: Path) -> None:
    bot = spt_ds.load(folder / "llama-suffix")
    bot.reply(PERSONA, ["hi"])
    lm: Any = bot._session.backbone.lm

    def fail(*_: object) -> None:
        raise MemoryError

    hook = lm.base_model.layers[1].register_forward_pre_hook(
        fail
    )  # the first layer has its new keys by then
    with pytest.raises(MemoryError):
        bot.reply(PERSONA, ["hi", "hello", "you?"])
    with pytest.raises(MemoryError):
        list(bot.stream(PERSONA, ["hi", "hello", "you?"]))
    hook.remove()
    same(bot.reply(PERSONA, ["hi", "hello", "you?"]), fresh(bot, PERSONA, ["hi", "hello", "you?"]))


@pytest.mark.parametrize("run", ["opt-prefix", "llama-suffix"])
def test_replies_are_those_of_generate(folder: Path, run: str, tmp_path: Path) -> None:
    histories = [MESSAGES[:1] * (2 * n + 1) for n in range(3)]
    histories += [("so " * 40, "fine", "no " * 30, "ok", "bye")] * 2  # the oldest turns do not fit
    rows = [
        {"persona": PERSONA[: n % 3], "history": history, "response": "ok " * (1 + 20 * (n == 4))}
        for n, history in enumerate(histories)
    ]
    (folder / "test.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    bot = spt_ds.load(folder / run)
    assert not bot._session.config.generate.perplexity, "a conversation has no reference reply"
    store = open_split(bot._session, "test")
    lines = (
        Generator(bot._session, store, ReplyFolder(tmp_path), "test", "step-7")
        .run()
        .read_text(encoding="utf-8")
        .splitlines()
    )
    for line in map(json.loads, lines):
        reply = bot.reply(line["persona"], line["history"])
        assert (reply.text, reply.prompt, len(reply.tokens)) == (
            line["reply"].strip(),
            line["prompt"],
            line["new_tokens"],
        )
        assert [round(score, 6) for score in reply.scores] == pytest.approx(
            line["scores"], abs=2e-6
        )
    assert len(lines) == 5


def test_a_reference_reply_beyond_the_positions_is_refused(folder: Path) -> None:
    row = {"persona": PERSONA, "history": ["so " * 60, "fine", "no " * 30], "response": "ok " * 80}
    (folder / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    bot = spt_ds.load(folder / "opt-prefix")
    config = load_config(str(folder / "opt-prefix" / "config.yaml"))
    assert config.generate.perplexity
    with pytest.raises(
        ConfigError, match=r"context and reference reply: .* the base has 320 positions"
    ):
        open_split(replace(bot._session, config=config), "test")


@pytest.mark.parametrize(
    "options",
    [{}, {"generate__mode": "fuse"}, {"generate__mode": "rank"}, {"generate__num_beams": 2}],
    ids=str,
)
def test_stream_is_the_reply(folder: Path, options: dict[str, Any]) -> None:
    bot = spt_ds.load(folder / "opt-suffix", checkpoint=7, generate__max_new_tokens=24, **options)
    for message in MESSAGES:
        pieces = bot.stream(PERSONA, [message])
        shown = []
        while True:
            try:
                shown.append(next(pieces))
            except StopIteration as end:
                reply = end.value
                break
        assert reply == bot.reply(PERSONA, [message])
        assert "".join(shown) == reply.text
        assert (reply.prompt is None) == (options == {"generate__mode": "fuse"})


@pytest.mark.parametrize(
    ("said", "pieces"),
    [
        ("  hello there,  you ", ["hello", " there,", "  you"]),
        ("hello there Q: and you", ["hello", " there"]),
        ("i rise at 5:30 now", ["i", " rise", " at", " 5"]),
        ("\nhello\nthere", []),
        ("a café R: x", ["a", " café"]),
        ("Summary: no", []),
        ("", []),
    ],
)
def test_pieces_are_whole_words_and_end_where_the_reply_is_cut(
    said: str, pieces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    tokens = [*said.encode(), tokenizer.eos_token_id]

    def scripted(session: object, batch: object, options: object, hooks: Any) -> Decoded:
        if hooks.streamer is not None:
            hooks.streamer.put(
                torch.zeros(1, 0, dtype=torch.long)
            )  # as transformers does, the context's ids: none
            for token in tokens:
                hooks.streamer.put(torch.tensor([token]))
            hooks.streamer.end()
        return Decoded([tokens], [0], torch.zeros(3, 1), None)

    monkeypatch.setattr(api, "decode_batch", scripted)
    config = Config.model_validate({"data": {"max_tokens": 200}})
    special = (tokenizer.eos_token_id,)
    session: Any = SimpleNamespace(
        config=config, tokenizer=tokenizer, ends=special, spt=SimpleNamespace(suffix=False)
    )
    bot = Bot(session)
    assert list(bot.stream([], ["hi"])) == pieces
    assert bot.reply([], ["hi"]).text == "".join(pieces)


@pytest.mark.parametrize(
    ("said", "ends", "text"),
    [
        ("i like dogs Q", False, "i like dogs"),
        ("i like dogs Q", True, "i like dogs Q"),
        ("plan Q: x R", False, "plan"),
        ("Q", False, ""),
    ],
)
def test_the_limit_of_tokens_leaves_no_half_marker(
    said: str, ends: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    tokens = [*said.encode(), *[tokenizer.eos_token_id] * ends]

    def scripted(session: object, batch: object, options: object, live: Any) -> Decoded:
        if live.streamer is not None:
            for token in tokens:
                live.streamer.put(torch.tensor([token]))
            live.streamer.end()
        return Decoded([tokens], [0], torch.zeros(3, 1), None)

    monkeypatch.setattr(api, "decode_batch", scripted)
    config = Config.model_validate({"data": {"max_tokens": 200}})
    special = (tokenizer.eos_token_id,)
    session: Any = SimpleNamespace(
        config=config, tokenizer=tokenizer, ends=special, spt=SimpleNamespace(suffix=False)
    )
    assert "".join(Bot(session).stream([], ["hi"])) == text
    assert Bot(session).reply([], ["hi"]).text == text


def test_stopped_reply_ends_early_and_leaves_the_context_right(folder: Path) -> None:
    bot = spt_ds.load(folder / "llama-suffix")
    ids = context_of(bot, PERSONA, ["hi"])
    batch = Batch(np.array(ids), np.zeros(0, dtype=np.int64), (len(ids),), (0,), (0,), (1.0,))
    options = bot._session.config.generate.model_copy(update={"perplexity": False})

    class StopAtThird(BaseStreamer):
        count = 0

        def put(self, value: torch.Tensor) -> None:
            self.count += value.numel()
            if self.count == 3:
                hooks.stopped.set()

        def end(self) -> None:
            pass

    hooks = ReplyHooks(bot._context, StopAtThird())
    stopped = decode_batch(bot._session, batch, options, hooks).tokens[0]
    whole = fresh(bot, PERSONA, ["hi"])
    # Versions of transformers differ in whether the stop is looked for before or after a token is
    # streamed.
    assert stopped in (whole.tokens[0][:3], whole.tokens[0][:4])
    same(bot.reply(PERSONA, ["hi"]), whole)


def test_terminal_from_pipe_with_ctrl_c(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Ctrl-C in the middle of a long reply comes back to the input; the same question is then
    answered whole.
    """
    persona, saved = tmp_path / "persona.txt", tmp_path / "talk.jsonl"
    persona.write_text("\n".join(PERSONA), encoding="utf-8")
    calls = 0

    def press(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            ident = threading.main_thread().ident
            assert ident is not None
            signal.pthread_kill(ident, signal.SIGINT)
            time.sleep(1.0)  # a key pressed during a token that takes long

    opened = api.open_bot

    def watched(*args: Any) -> Bot:
        bot = opened(*args)
        bot._session.backbone.lm.register_forward_pre_hook(press)  # type: ignore[union-attr]
        return bot

    # A shell's background job ignores SIGINT, and Python then leaves it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(api, "open_bot", watched)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hi\n/retry\nmore\n/save {saved}\n"))
    argv = [
        str(folder / "opt-suffix"),
        "--persona",
        str(persona),
        "--set",
        "generate.max_new_tokens=60",
    ]
    assert chat.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("[stopped") == 1
    assert out.count("; scores ") == 2
    lines = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert [tuple(line["persona"]) for line in lines] == [PERSONA, PERSONA]
    bot = opened(folder / "opt-suffix", "best", ["generate.max_new_tokens=60"])
    for line in lines:
        assert line["response"] == bot.reply(PERSONA, line["history"]).text
    assert lines[1]["history"] == ["hi", lines[0]["response"], "more"]


def test_what_a_user_can_get_wrong(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = folder / "opt-prefix"
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        spt_ds.load(tmp_path)
    with pytest.raises(CheckpointError, match="step-00000007"):
        spt_ds.load(run, checkpoint=8)
    with pytest.raises(ConfigError, match="did you mean 'top_p'"):
        spt_ds.load(run, generate__topp=0.5)
    bot = spt_ds.load(run)
    with pytest.raises(ConfigError, match="the bank has 3; give 0 to 2"):
        bot.reply(PERSONA, ["hi"], prompt=3)
    with pytest.raises(DataError, match="persona: expected a list"):
        bot.reply("i ski", ["hi"])
    with pytest.raises(DataError, match="the last turn does not fit"):
        bot.reply(PERSONA, ["hi", "hello", "so " * 100])
    with pytest.raises(DataError, match=r"response 12\).*allowed are 300"):
        list(bot.stream(["so " * 100], ["hi"]))
    reply = bot.reply(PERSONA, ["hi"])
    with pytest.raises(DataError, match="history: ends with this bot's own reply"):
        bot.reply(PERSONA, ["hi", reply.text])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match="one process, this is one of 2"):
        spt_ds.load(run)
    assert chat.main([str(run)]) == 2
    assert "start it without a launcher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("persona", "history", "prompt", "words"),
    [
        (None, ["hi"], None, "persona: expected a list of texts, got None"),
        (PERSONA, None, None, "history: expected a list of texts, got None"),
        (PERSONA, {"hi"}, None, "history: expected a list of texts, got {'hi'}"),
        (PERSONA, [5], None, r"history[0]: expected a text, got 5"),
        (b"ab", ["hi"], None, r"persona[0]: expected a text, got 97"),
        (PERSONA, ["hi", "a\udcffb", "c"], None, r"history[1]: 'a\udcffb' holds half a surrogate"),
        (PERSONA, ["hi"], True, "prompt True: expected a whole number; give 0 to 2"),
        (PERSONA, ["hi"], 1.0, "prompt 1.0: expected a whole number"),
        (PERSONA, ["hi"], "1", "prompt '1': expected a whole number"),
        (PERSONA, ["hi"], 10**5000, "the bank has 3; give 0 to 2"),
        (PERSONA, ["hi"], -1, "prompt -1: the bank has 3"),
    ],
    ids=shown,
)
def test_arguments_of_another_kind(
    folder: Path, persona: Any, history: Any, prompt: Any, words: str
) -> None:
    bot = spt_ds.load(folder / "opt-prefix")
    with pytest.raises(SptError) as caught:
        bot.reply(persona, history, prompt=prompt)
    assert words in str(caught.value)
    with pytest.raises(SptError) as caught:
        list(bot.stream(persona, history, prompt=prompt))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("run", "checkpoint", "options"),
    [
        (None, "best", {}),
        (5, "best", {}),
        ("x" * 5000, "best", {}),
        ("a\0b", "best", {}),
        (None, True, {}),
        (None, 1.5, {}),
        (None, 10**5000, {}),
        (None, "²", {}),
        (None, "9" * 5000, {}),
        (None, "../..", {}),
        (None, "best", {"generate__top_p": object}),
        (None, "best", {"generate__top_p": float("nan")}),
        (None, "best", {"generate__top_p": 10**5000}),
        (None, "best", {"generate__top_p": "\ud800"}),
        (None, "best", {"data__test": "\ud800"}),
        (None, "best", {"a=b": 1}),
    ],
    ids=shown,
)
def test_a_run_or_an_option_of_another_kind(
    folder: Path, run: Any, checkpoint: Any, options: dict[str, Any]
) -> None:
    good = run is None and (checkpoint != "best" or options)
    with pytest.raises(SptError) as caught:
        spt_ds.load(folder / "opt-prefix" if good else run, checkpoint, **options)
    assert len(str(caught.value)) < 3000


def test_sampled_replies_have_noise_of_their_own(folder: Path) -> None:
    options: dict[str, Any] = {"generate__do_sample": True, "generate__temperature": 3.0}
    bots = [spt_ds.load(folder / "opt-suffix", **options) for _ in range(2)]
    first, second = ([bot.reply(PERSONA, ["hi"]).tokens for _ in range(3)] for bot in bots)
    assert first == second
    assert len(set(first)) == 3
