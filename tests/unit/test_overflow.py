"""Personas and documents that are longer than the window: stop, cut, leave out, or look up."""

from __future__ import annotations

import builtins
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from spt_ds.data.dialogue import Example
from spt_ds.data.encode import ContextStyle, Encoded, Encoder
from spt_ds.data.overflow import Overflow
from spt_ds.data.shots import worked_examples
from spt_ds.data.sources import build_store
from spt_ds.data.template import TemplateStyle
from spt_ds.errors import DataError
from tests.helpers.chat_templates import FAMILIES
from tests.helpers.tokenizers import byte_tokenizer

SENTENCES = tuple(f"sentence number {n} says what {word} is." for n, word in enumerate("abcdefgh"))
WINDOW = 200


def encoder(overflow: Overflow, window: int = WINDOW, chat: str = "") -> Encoder:
    """Of bytes: a token is a character."""
    template = TemplateStyle("chat" if chat else "spt")
    tokenizer = FAMILIES[chat].tokenizer() if chat else byte_tokenizer()
    return Encoder(tokenizer, window, ContextStyle(template=template, overflow=overflow))


def example(persona: tuple[str, ...], *history: str, reply: str = "yes") -> Example:
    return Example("f:1", "f:1", len(history), persona, history, reply)


def text(encoded: Encoded) -> str:
    """What the bytes of a context say."""
    return bytes(token for token in encoded.context_ids if token < 256).decode()


def test_what_fits_is_read_as_ever() -> None:
    fitting = example(SENTENCES[:3], *["hi"] * 19)
    ways = ("error", "truncate", "drop")
    got = [encoder(way).example(fitting) for way in ways]  # type: ignore[arg-type]
    assert got[0] == got[1] == got[2]
    assert got[0].dropped_turns
    assert not got[0].cut


def test_by_default_a_long_persona_stops_and_the_message_names_the_option() -> None:
    with pytest.raises(DataError, match=r"set data\.overflow to truncate, drop or retrieve"):
        encoder("error").example(example(SENTENCES, "hi"))


def test_truncate_keeps_whole_sentences_from_the_beginning_and_half_for_the_dialogue() -> None:
    turns = [f"turn {n} of the dialogue" for n in range(11)]
    got = encoder("truncate").example(example(SENTENCES, *turns))
    assert got.cut
    assert got.persona == SENTENCES[: len(got.persona)]
    assert 1 <= len(got.persona) < len(SENTENCES)
    short = encoder("truncate").example(example(SENTENCES, "hi"))  # the dialogue needs no half
    assert len(short.persona) > len(got.persona)
    assert text(got).startswith("given persona: sentence number 0 says what a is.")
    room = WINDOW - len(got.response_ids)
    assert len(got.context_ids) <= room
    persona_alone = encoder("error", 4096).context("x", got.persona, (), 0)
    assert len(persona_alone.context_ids) <= room // 2
    assert "turn 10 of the dialogue R:" in text(got)
    assert "turn 9 of the dialogue" in text(got)


def test_a_long_sentence_is_cut_between_words_and_a_long_turn_keeps_its_end() -> None:
    document = " ".join(f"word{n}" for n in range(300))
    got = encoder("truncate").example(example((document,), document + " and the question?"))
    assert got.cut
    assert document.startswith(got.persona[0] + " ")
    assert "and the question? R:" in text(got)
    turn = text(got).partition("Q: ")[2].split()
    assert turn[0] in document.split()
    assert WINDOW - 20 < len(got.context_ids) + len(got.response_ids) <= WINDOW
    alone = encoder("truncate").example(example((), "x" * 5000 + " why?"))
    assert text(alone).endswith("x why? R:")


def test_drop_leaves_out_and_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"persona": list(SENTENCES), "history": ["hi"], "response": "yes"},
        {"persona": ["i ski."], "history": ["hi"], "response": "no"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    store = build(path, tmp_path, "drop")
    assert [store[n]["response"] for n in range(len(store))] == ["no"]
    assert (store.left_out, store.cut) == (1, 0)
    with pytest.raises(DataError, match="take more than 200 tokens; shorten them"):
        encoder("drop").context("dialogue", SENTENCES, ("hi",), 0)
    path.write_text(json.dumps(rows[0]), encoding="utf-8")
    with pytest.raises(DataError, match=r"none of its 1 examples fits into data\.max_tokens 200"):
        build(path, tmp_path, "drop")


def build(path: Path, folder: Path, overflow: Overflow, window: int = WINDOW) -> Any:
    return build_store(
        str(path),
        byte_tokenizer(),
        max_tokens=window,
        cache_dir=str(folder / "cache"),
        style=ContextStyle(overflow=overflow),
    )


def test_the_counts_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Logger:
        def info(self, words: str) -> None:
            told.append(words)

    monkeypatch.setattr("spt_ds.data.sources.get_logger", Logger)
    rows = [{"persona": list(SENTENCES[:n]), "history": ["hi"], "response": "y"} for n in (1, 8)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for overflow in ("truncate", "drop"):
        build(path, tmp_path, overflow)
    assert f"{path}: 1 of 2 examples had persona or last turn cut (data.overflow: truncate) to" in (
        "\n".join(told)
    )
    assert "1 of 2 examples were left out (data.overflow: drop) to fit data.max_tokens 200" in (
        "\n".join(told)
    )


def test_worked_examples_are_never_cut(tmp_path: Path) -> None:
    rows = [
        {"persona": list(SENTENCES), "history": ["hi"], "response": "long"},
        {"persona": ["i ski."], "history": ["hi"], "response": "short"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    store = build(path, tmp_path, "truncate")
    style = ContextStyle(overflow="truncate")
    ids = worked_examples(store, byte_tokenizer(), 1, WINDOW, 0, style)
    assert b"short" in bytes(token for token in ids if token < 256)


# BM25 --------------------------------------------------------------------------------------------

FACTS = (
    "my sister lives in Oslo.",
    "i play the violin every evening.",
    "my dog is called Rex and he is brown.",
    "i work at night in a bakery.",
    "we own two old cars.",
    "i never eat fish.",
)


def test_retrieve_keeps_the_nearest_sentences_in_their_order() -> None:
    pytest.importorskip("bm25s")
    for question, fact in (("what is your dog called?", 2), ("who lives in Oslo?", 0)):
        got = encoder("retrieve", 150).example(example(FACTS, "hi", "hello", question))
        assert got.cut
        assert FACTS[fact] in got.persona
        assert [FACTS.index(sentence) for sentence in got.persona] == sorted(
            FACTS.index(sentence) for sentence in got.persona
        )
    violin = encoder("retrieve", 150).example(example(FACTS, "Violin?"))
    assert FACTS[1] in violin.persona
    # Nothing to look for: as truncate does.
    for turns in ((), ("!?",)):
        assert encoder("retrieve", 150).example(example(FACTS, *turns)) == encoder(
            "truncate", 150
        ).example(example(FACTS, *turns))
    assert encoder("retrieve", 150).example(example(("!! " * 60, "?. " * 60), "hi there")).cut


def test_without_the_package_the_message_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = builtins.__import__

    def missing(name: str, *args: Any, **more: Any) -> Any:
        if name == "bm25s":
            raise ImportError(name)
        return plain(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match=r"pip install 'spt-ds\[retrieve\]'"):
        encoder("retrieve")
    encoder("truncate").example(example(SENTENCES, "hi"))


@pytest.mark.parametrize("overflow", ["truncate", "retrieve"])
@pytest.mark.parametrize("family", ["", "smollm2", "gemma", "mistral-3"])
def test_a_persona_of_128_k_tokens_fits(overflow: Overflow, family: str, tmp_path: Path) -> None:
    if overflow == "retrieve":
        pytest.importorskip("bm25s")
    draw = random.Random(0)
    words = ["tea", "dogs", "music", "run", "blue", "sea", "night", "work", "ski"]
    persona = tuple(" ".join(draw.choices(words, k=8)) + f" and number {n}." for n in range(8_000))
    tokenizer = FAMILIES[family].tokenizer() if family else byte_tokenizer()
    assert len(tokenizer(" ".join(persona))["input_ids"]) >= 128_000
    encode = encoder(overflow, 512, family)
    talk = [example(persona, *["hi", "hello"] * n, "who is number 4321?") for n in range(4)]
    began = time.monotonic()
    got = [encoded for _, encoded in encode.stream(talk)]
    assert time.monotonic() - began < 30
    for encoded in got:
        assert encoded.cut
        assert 400 < len(encoded.context_ids) + len(encoded.response_ids) <= 512
        assert (persona[4321] in encoded.persona) == (overflow == "retrieve")
