"""Messages: short whatever was got, and never a character that a terminal would obey."""

from __future__ import annotations

import logging

import pytest

from spt_ds.config.load import load_config
from spt_ds.display import printable, shown
from spt_ds.errors import LINE_CHARACTERS, ConfigError, DataError
from spt_ds.log import get_logger

HOSTILE = "\x1b]0;title\x07 \x9b31m \r \x00 \u202e \ud800"


def test_printable_writes_what_a_terminal_obeys_as_its_escape() -> None:
    assert printable(HOSTILE, keep="\n\t") == r"\x1b]0;title\x07 \x9b31m \r \x00 \u202e \ud800"
    kept = "line\n\ttab é 漢字 \U0001f468\u200d\U0001f469 שלום"
    assert printable(kept, keep="\n\t") == kept


@pytest.mark.parametrize(
    "value",
    [
        "x" * 100_000,
        b"x" * 100_000,
        [["x" * 300] * 300] * 300,
        {f"key {n}": "x" * 300 for n in range(300)},
        10**5000,
        [10**5000],
        {"x": {"x": {"x": {"x": {"x": 1}}}}},
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_quoted_value_is_short(value: object) -> None:
    assert len(shown(value)) < 240


def test_a_deep_value_is_quoted() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[[[[...]]]]"


def test_a_short_value_is_quoted_whole() -> None:
    for value in ("a", 5, [1, "b"], {"k": None}, 1.5, None):
        assert shown(value) == repr(value)


def test_an_error_is_printable_and_bounded() -> None:
    text = str(DataError(f"a.txt:1: got {HOSTILE}\n" + "y" * 100_000 + "\n" * 500))
    assert text.startswith(r"a.txt:1: got \x1b]0;title\x07 ")
    assert len(text) < LINE_CHARACTERS + 500
    assert "more lines" in text


@pytest.mark.parametrize(
    "override",
    [
        f"model.base={'[' + 'x' * 100_000 + ']'}",
        f"model.{'y' * 100_000}=1",
        "a." * 20_000 + "b=1",
        f"train.seed={'z' * 100_000}",
        "x" * 100_000,
        f"model={ {f'key{n}': n for n in range(5000)} }",
    ],
    ids=lambda text: text[:12],
)
def test_a_configuration_error_does_not_echo_what_is_long(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [override])
    assert len(str(caught.value)) < 12_000
    assert max(map(len, str(caught.value).splitlines())) < 1_000


@pytest.mark.parametrize("source", ["x" * 5000, "x" * 5000 + ".yaml", "a\0b.yaml", "\ud800"])
def test_a_name_that_no_file_can_have(source: str) -> None:
    with pytest.raises(ConfigError):
        load_config(source)


def test_the_log_is_printable() -> None:
    handler = get_logger().handlers[0]
    record = logging.LogRecord("spt_ds", logging.WARNING, "f", 1, "%s", (HOSTILE,), None)
    assert "\x1b" not in handler.format(record)
    assert r"\x1b]0;title" in handler.format(record)
