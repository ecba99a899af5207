"""What is called typical of a prompt."""

from __future__ import annotations

from typing import Any

import pytest

from spt_ds.report.runs import Reply
from spt_ds.report.typical import (
    Corpus,
    Word,
    central,
    context,
    distinctive,
    lead,
    surest,
    words,
)
from spt_ds.run.predictions import PredictionInDialogue
from tests.helpers.report_runs import prediction


def reply(index: int, scores: list[float], **fields: Any) -> Reply:
    row = {**prediction(index, "a reply", 0), "history": [str(index)], "scores": scores, **fields}
    return Reply(PredictionInDialogue.model_validate(row), "a reply", 0.0)


def test_words_of_several_scripts() -> None:
    assert words("I'm HERE, it\N{RIGHT SINGLE QUOTATION MARK}s 3 o'clock! 😀") == [
        "i'm",
        "here",
        "it\N{RIGHT SINGLE QUOTATION MARK}s",
        "3",
        "o'clock",
    ]
    assert words("שלום, עולם") == ["שלום", "עולם"]


def test_distinctive_words_lead_in_their_share_of_texts() -> None:
    own = ["the tea is hot", "tea tea tea", "the cup", "a cup"]
    others = ["the dog", "the cat", "the tea", "the bird"]
    both = Corpus.of(own + others)
    assert distinctive(own, both, 9) == [Word("cup", 0.5, 0.0), Word("tea", 0.5, 0.25)]
    assert distinctive(own, both, 1) == [Word("cup", 0.5, 0.0)]
    assert distinctive(own, Corpus.of(own), 1)[0].others == 0.0
    assert distinctive(["once only"], Corpus.of(["once only", *others]), 9) == []


def test_the_most_central_text_is_first_and_none_comes_twice() -> None:
    texts = ["", "i like cats", "i like dogs", "Stocks fell!", "i like dogs.", "i like dogs a lot"]
    order = central(texts, Corpus.of(texts))
    assert order[0] == 2  # two others say nearly the same
    assert sorted(order) == [0, 1, 2, 3, 5]  # 4 has the words of 2
    assert order[-1] == 0  # it has no words


def test_a_rare_word_weighs_more() -> None:
    corpus = Corpus.of(["the a", "the b", "the c"])
    assert corpus.weight("a") > corpus.weight("the") > 0.0


def test_the_surest_choice_leads_by_most() -> None:
    replies = [reply(0, [0.5, 0.45]), reply(1, [0.9, 0.89]), reply(2, [0.4, 0.1]), reply(3, [0.3])]
    again = reply(4, [0.6, 0.5], history=["2"])  # the context of number 2, less surely
    assert [one.row.index for one in surest([*replies, again], 0)] == [2, 0, 1, 3]
    assert lead(replies[0], 1) == pytest.approx(-0.05)
    assert lead(replies[3], 0) == 0.0  # nothing to be ahead of


def test_a_context_is_the_persona_and_the_last_utterance() -> None:
    one = reply(0, [0.1], persona=["i sing ."], history=["one", "two"])
    assert context(one) == "i sing .\ntwo"
