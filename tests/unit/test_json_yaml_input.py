"""JSON and YAML of others: each refusal is of the parser's own kind, with its position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from spt_ds.config.load import load_config
from spt_ds.errors import ConfigError
from spt_ds.json_input import MAX_DEPTH, load_json, read_json
from spt_ds.yaml_input import load_yaml

DEEP = 500


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("[" * DEEP + "]" * DEEP, MAX_DEPTH + 1, "nested deeper"),
        ('{"a":' * DEEP + "1" + "}" * DEEP, MAX_DEPTH * 5 + 1, "nested deeper"),
        ('{"n": ' + "9" * 5000 + "}", 7, "a number of 5000 digits"),
        (r'{"s": "a\ud800b"}', 9, "half a surrogate pair"),
        (r'{"\udc00": 1}', 3, "half a surrogate pair"),
        ('{"s": 1, "s": 2}', 10, "key 's' is given twice"),
        ("{", 2, "Expecting property name"),
    ],
)
def test_json_limits_are_errors_with_a_position(text: str, column: int, words: str) -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        load_json(text)
    assert words in caught.value.msg
    assert caught.value.colno == column


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2.5, True, None, "x"]},
        "\U0001f600 \\ud800",  # a pair of escapes is a character, an escaped backslash is text
        ["[{" * 300],
        json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH),
        [[]] * 300,
        10**299,
    ],
)
def test_json_that_is_within_the_limits_is_read(value: Any) -> None:
    assert load_json(json.dumps(value)) == value
    assert load_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_json_bytes_are_utf8() -> None:
    with pytest.raises(UnicodeDecodeError):
        load_json('"é"'.encode("latin-1"))


def test_a_json_file_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2]", encoding="utf-8")
    assert read_json(path) == [1, 2]
    monkeypatch.setattr("spt_ds.json_input.MAX_FILE_BYTES", 5)
    with pytest.raises(ValueError, match="larger than"):
        read_json(path)


YAML_FAULTS = [
    ("!!int abc", "'abc' is no int"),
    ("!!float abc", "'abc' is no float"),
    ("!!bool abc", "'abc' is no bool"),
    ("!!int ''", "'' is no int"),
    ("!!timestamp 2026-02-30", "could not determine a constructor"),
    ("!!binary ~", "could not determine a constructor"),
    ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ("9" * 5000, "is no int"),
    ("0x" + "f" * 5000, "beyond 64 bits"),
    ("1" + "0" * 40, "beyond 64 bits"),
    ("[" * DEEP + "]" * DEEP, "nested deeper"),
    ("{a: " * DEEP + "}" * DEEP, "nested deeper"),
    ("&a [*a]", "holds itself"),
    ("&a {b: *a}", "holds itself"),
    (
        "[&a ["
        + "x," * 20
        + "], "
        + ", ".join(
            f"&{b} [" + f"*{a}," * 20 + "]" for a, b in zip("abcdef", "bcdefg", strict=True)
        )
        + "]",
        "more than",
    ),
    ("!!map abc", "expected `key: value` lines"),
    ("!!seq abc", "expected a sequence node"),
    (r'"a\ud800"', "half a surrogate pair"),
]


@pytest.mark.parametrize(("text", "words"), YAML_FAULTS, ids=[text[:20] for text, _ in YAML_FAULTS])
def test_yaml_limits_are_errors_with_a_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        load_yaml(f"name: {text}")
    assert words in str(caught.value.problem)
    path = tmp_path / "run.yaml"
    path.write_text(f"# one line before\nname: {text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml:2: not valid YAML: ") as told:
        load_config(str(path))
    with pytest.raises(ConfigError, match=r"^--set name=.* is not a YAML value") as told_too:
        load_config("demo", [f"name={text}"])
    assert max(len(str(told.value)), len(str(told_too.value))) < 1500


def test_yaml_reads_what_json_writes() -> None:
    text = "caf\u00e9 \U0001f600 \x7f"
    assert load_yaml(json.dumps(text)) == text


def test_a_date_is_a_word() -> None:
    assert load_config("demo", ["name=2026-02-30"]).name == "2026-02-30"
