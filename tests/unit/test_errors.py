"""Messages: short whatever was got, and never a character that a terminal would obey."""

from __future__ import annotations

import logging
import subprocess
import sys

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


def test_streams_of_a_command_obey_nothing_whoever_prints() -> None:
    """A library that quotes a file prints past our own functions."""
    code = (
        "import io, logging, sys, warnings\n"
        "early = logging.StreamHandler(sys.stderr)\n"
        "from spt_ds.log import prepare_streams\n"
        "prepare_streams(); prepare_streams()\n"
        "print('out \\x1b[2J\\x9b\\u202e\\rx\\ty', end='\\n')\n"
        "sys.stdout.writelines(['lines \\x07', '\\n'])\n"
        "logging.getLogger('x').addHandler(early)\n"
        "logging.getLogger('x').warning('log \\x1b]0;x\\x07')\n"
        "warnings.warn('warned \\x1b[31m')\n"
        "print('bar', end='\\r', file=sys.stderr)\n"
        "raise SystemExit('\\x1b[0m')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert out == "out \\x1b[2J\\x9b\\u202e\\rx\ty\nlines \\x07\n"
    assert "log \\x1b]0;x\\x07\n" in err
    assert "warned \\x1b[31m" in err
    assert "bar\r\\x1b[0m" in err
    assert not set(err) & {"\x1b", "\x07"}
