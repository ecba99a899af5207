"""How the tokens of a reply become its text: stop texts, the rule of the cut, streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spt_ds.config.load import load_config
from spt_ds.engine.reply_text import ReplyText, before_stop, rule_of, without_half_stop
from spt_ds.errors import ConfigError, DataError
from spt_ds.evaluate.corpus_metrics import corpus_metrics
from spt_ds.model.conversation import Endings, StopAtText
from spt_ds.run.predictions import read_predictions
from tests.helpers.predictions import lines, write
from tests.helpers.tokenizers import byte_tokenizer

EOS = 257
LIST = "Sure! Here is my list: milk\n* tea"


def replies(rule: str, *stop: str) -> ReplyText:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return ReplyText(tokenizer, rule, stop, (EOS, 10))


def tokens(text: str, ends: bool = True) -> list[int]:
    return [*text.encode(), *([EOS] if ends else [])]


@pytest.mark.parametrize(
    ("template", "clean", "rule"),
    [
        ("spt", "auto", "spt"),
        ("chat", "auto", "none"),
        ("{{ messages }}", "auto", "none"),
        ("spt", "none", "none"),
        ("chat", "spt", "spt"),
    ],
)
def test_the_rule_follows_the_template(template: str, clean: str, rule: str) -> None:
    options = [f"data.template={template!r}", f"generate.clean={clean}"]
    assert rule_of(load_config("demo", options)) == rule


def test_a_reply_of_a_chat_template_keeps_its_colons_and_lines() -> None:
    assert replies("none").of_tokens(tokens(f" {LIST} ")) == (f" {LIST} ", LIST)
    assert replies("spt").of_tokens(tokens(LIST)) == (LIST, "Sure! Here is my list")
    assert replies("none").of_tokens(tokens("so Q", ends=False))[1] == "so Q"
    assert replies("spt").of_tokens(tokens("so Q", ends=False))[1] == "so"


def test_a_stop_text_ends_a_reply_before_itself() -> None:
    said = "tea\nUser: and you"
    assert replies("none", "\nUser:", "you").of_tokens(tokens(said)) == ("tea", "tea")
    assert before_stop("abc", ("x",)) == "abc"
    assert before_stop("", ("x",)) == ""
    assert before_stop("xa", ("x",)) == ""


@pytest.mark.parametrize("rule", ["spt", "none"])
@pytest.mark.parametrize("said", ["tea\nUser: hi", "tea\nUse", "\nUser:", "a: b\nUser:x", ""])
def test_what_is_streamed_is_never_taken_back(said: str, rule: str) -> None:
    text = replies(rule, "\nUser:")
    whole = text.of_tokens(tokens(said))[1]
    for size in range(len(said) + 1):
        assert whole.startswith(text.so_far(said[:size]))


def test_the_half_of_a_stop_text_is_kept_back() -> None:
    assert without_half_stop("so\nUs", ("\nUser:",)) == "so"
    assert without_half_stop("so\nUs.", ("\nUser:",)) == "so\nUs."
    assert without_half_stop("aa", ("aab", "x")) == ""


def test_tokens_end_with_the_one_that_completes_a_stop_text() -> None:
    endings = replies("none", "User:").endings
    assert endings.cut([*b"tea User: hi", 300]) == [*b"tea User:"]
    assert endings.cut([*b"tea User", 10, *b": hi"]) == [*b"tea User", 10]
    assert endings.cut([*b"tea"]) == [*b"tea"]
    assert replies("none").endings.said is None
    assert Endings((1, 2), 0).cut([5, 2, 1]) == [5, 2]


def test_each_row_stops_at_its_own_text() -> None:
    endings = replies("none", "ab").endings
    assert endings.said is not None
    rows = torch.tensor([[97, 98], [97, 97], [98, 97]])
    done = StopAtText(endings.said)(rows, torch.zeros(3, 1))
    assert done.tolist() == [True, False, False]


@pytest.mark.parametrize("stop", ["['']", "[3]"])
def test_a_stop_text_must_be_a_text(stop: str) -> None:
    with pytest.raises(ConfigError, match=r"generate\.stop"):
        load_config("demo", [f"generate.stop={stop}"])


def test_the_scores_cut_each_file_by_its_own_rule(tmp_path: Any) -> None:
    new = [{**row, "raw": LIST, "clean": "none"} for row in lines()]
    path = write(tmp_path / "new.jsonl", new)
    assert set(corpus_metrics(read_predictions(path)).replies) == {LIST}
    path = write(tmp_path / "old.jsonl", [{**row, "raw": LIST} for row in lines()])
    assert set(corpus_metrics(read_predictions(path)).replies) == {"Sure! Here is my list"}


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [("none", "spt", "cut by one rule"), ("all", "all", "expected spt or none")],
)
def test_a_file_has_one_rule(tmp_path: Any, first: str, second: str, words: str) -> None:
    rows = [{**row, "clean": rule} for row, rule in zip(lines(), (first, second), strict=False)]
    with pytest.raises(DataError, match=words):
        read_predictions(write(tmp_path / "p.jsonl", rows))
