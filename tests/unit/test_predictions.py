"""Reading `predictions.jsonl`: every fault is one error with `file:line`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spt_ds.errors import DataError
from spt_ds.evaluate.scores_json import Scores, evaluate
from spt_ds.run.predictions import check_same_examples, read_predictions
from tests.helpers.predictions import changed, drop_field, lines, set_field, write

BAD_ROWS = [
    (
        drop_field(1, "reference"),
        ":2: field 'reference' is missing; it is a string with at least one word",
    ),
    (
        lambda rows: rows[1].update(row=rows[1].pop("raw")),
        ":2: field 'raw' is missing; did you mean 'raw' by 'row'?",
    ),
    (
        set_field(2, "reference", " "),
        ":3: field 'reference' is ' ', expected a string with at least one word",
    ),
    (set_field(2, "raw", None), ":3: field 'raw' is None, expected a string"),
    (set_field(0, "index", True), ":1: field 'index' is True, expected a whole number from 0 on"),
    (set_field(3, "index", 1), ":4: index 1 again, first on line 2"),
    (set_field(3, "index", 4), ":4: index 4, expected 3; an example is missing or out of order"),
    (set_field(0, "prompt", 4), ":1: field 'prompt' is 4, but 'scores' is over 4 prompts (0 to 3)"),
    (
        set_field(0, "scores", [0.1, "x"]),
        ":1: field 'scores' is [0.1, 'x'], expected a list of finite numbers",
    ),
    (
        set_field(0, "scores", [0.1, float("nan")]),
        ":1: field 'scores' is [0.1, nan], expected a list of finite numbers",
    ),
    (set_field(0, "scores", [10**400]), ":1: not JSON at column"),
    (set_field(4, "scores", [1.0] * 5), ":5: field 'scores' has 5 numbers, 4 on line 1"),
    (set_field(4, "prompt", None), ":5: field 'prompt' is on some lines and not on others"),
    (set_field(0, "nll_sum", 3.0), ":1: fields 'nll_sum' and 'nll_tokens' come together"),
    (
        lambda rows: rows[0].update(nll_sum=-1.0, nll_tokens=3),
        ":1: field 'nll_sum' is -1.0, expected a finite number",
    ),
    (
        lambda rows: rows[0].update(nll_sum=1.0, nll_tokens=0),
        ":1: field 'nll_tokens' is 0, expected a whole number",
    ),
    (
        lambda rows: rows[0].update(nll_sum=1e6, nll_tokens=9),
        ":1: field 'nll_sum' is 1000000.0, more than 700 nats",
    ),
    (
        lambda rows: rows[1].update(nll_sum=1.0, nll_tokens=3),
        ":2: field 'nll_sum' is on some lines and not on others",
    ),
]


@pytest.mark.parametrize(("edit", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_bad_rows_are_named_by_line(
    edit: Callable[[list[dict[str, Any]]], None], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "predictions.jsonl", changed(edit))
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}{message}")


GOOD_LINE = json.dumps(lines()[0]).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": is empty; a predictions file holds one JSON object per line"),
        (GOOD_LINE + b'\n{"index": 1, "id', ":2: not JSON at column 14 (Unterminated string"),
        (GOOD_LINE + b"\n\n" + GOOD_LINE, ":2: not JSON at column 1"),
        (b"[1, 2]\n", ":1: got a list, expected a JSON object"),
        (GOOD_LINE + b'\n{"id": "\xff"}\n', ":2: not UTF-8 text (byte 8 of the line)"),
    ],
)
def test_bad_files_are_named_by_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}{message}")


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    rows = changed(set_field(0, "raw", "one\u2028two\x85three"))
    assert (
        read_predictions(write(tmp_path / "p.jsonl", rows)).rows[0].raw == "one\u2028two\x85three"
    )
    with_returns = (tmp_path / "p.jsonl").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "p.jsonl").write_bytes(with_returns)
    assert len(read_predictions(tmp_path / "p.jsonl").rows) == len(rows)


def test_data_digest_knows_examples_and_not_replies(tmp_path: Path) -> None:
    base = read_predictions(write(tmp_path / "a.jsonl", lines()))
    other_rows = changed(set_field(0, "raw", "else"))
    other_reply = read_predictions(write(tmp_path / "b.jsonl", other_rows))
    other_data = read_predictions(
        write(tmp_path / "c.jsonl", changed(set_field(4, "reference", "else")))
    )
    assert base.data_sha256 == other_reply.data_sha256 != other_data.data_sha256
    assert base.sha256 != other_reply.sha256
    check_same_examples(base, other_reply)
    with pytest.raises(
        DataError,
        match=r"c\.jsonl:5: field 'reference' is 'else', but 'cats are nice \.' in .*a\.jsonl:5",
    ):
        check_same_examples(base, other_data)
    shorter = read_predictions(write(tmp_path / "d.jsonl", lines()[:4]))
    with pytest.raises(DataError, match=r"d\.jsonl: 4 examples, but 5 in"):
        check_same_examples(base, shorter)


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"index": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"scores": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than"),
        (b'{"raw": "caf\xe9"}', "not UTF-8 text (byte 12 of the line)"),
        (b'{"raw": "\\ud83d and no more"}', "half a surrogate pair"),
        (b"\x00" * 1000, "not JSON at column 1"),
        (json.dumps({LONG: 1}).encode(), "field 'index' is missing"),
        (GOOD_LINE.replace(b'"a-0"', json.dumps([LONG]).encode()), "field 'id' is ['xxx"),
        (GOOD_LINE.replace(b'"index": 0', b'"index": ' + b"9" * 250), "index a number of 831 bits"),
    ],
)
def test_what_breaks_a_reader_is_one_short_error(line: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:1: ")
    assert told in message
    assert len(message) < len(str(path)) + 500
    assert message.isprintable()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**250, -(10**250), 2**53, 2**53 + 1, 4096])
    | st.floats()
    | st.text(max_size=20)
    | st.characters(categories=["Cs", "Cc", "Cf", "Zs"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def refusal(path: Path, scored: bool) -> str:
    """The message with which a file is refused, or an empty one."""
    try:
        scores = evaluate(path) if scored else read_predictions(path)
    except DataError as error:
        return str(error)
    if isinstance(scores, Scores):
        assert all(math.isfinite(value) for value in scores.values.values())
        json.dumps(scores.to_json(), allow_nan=False)
    return ""


FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(st.sampled_from(sorted(lines()[0])), st.integers(0, 4), VALUES)
def test_any_value_in_a_field_is_scored_or_named(
    tmp_path: Path, name: str, row: int, value: Any
) -> None:
    path = tmp_path / "predictions.jsonl"
    rows = changed(set_field(row, name, value))
    path.write_text("".join(json.dumps(line) + "\n" for line in rows), encoding="utf-8")
    if message := refusal(path, scored=True):
        assert re.match(rf"{re.escape(str(path))}:[1-5]: ", message)
        assert message.isprintable()
        assert len(message) < len(str(path)) + 700


@FUZZ
@given(st.binary(max_size=60), st.integers(0, 300), st.integers(0, 40))
def test_damaged_bytes_are_read_or_named(
    tmp_path: Path, inserted: bytes, start: int, removed: int
) -> None:
    path = tmp_path / "predictions.jsonl"
    whole = b"".join(json.dumps(line).encode() + b"\n" for line in lines()[:2])
    path.write_bytes(whole[:start] + inserted + whole[start + removed :])
    if message := refusal(path, scored=False):
        assert re.match(rf"{re.escape(str(path))}(:\d+)?: ", message)
