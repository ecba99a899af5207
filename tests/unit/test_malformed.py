"""Three hundred malformed files, thirty for each reader: each gives one error that says where.

A file is a valid one with one thing broken: bytes, a line, a field, a key or a value. What stays
valid is left out. Other exceptions and errors without a place fail.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from spt_ds.config.data import Format
from spt_ds.data.encode import Encoder
from spt_ds.data.readers import read
from spt_ds.errors import SptError
from tests.fuzz.readers import COMPLETIONS, CSV, EXAMPLES, MESSAGES, PARLAI
from tests.helpers.tasks import TALK, lamp_files, personamem_files, personamem_row
from tests.helpers.tokenizers import byte_tokenizer

EACH = 30
DRAWS = 3000  # for one reader at most
Write = Callable[[Path], Path]
WRONG: list[Any] = [None, 3, -1, 1.5, True, "", " ", "\x00", [], [[]], ["x"], {}, {"x": 1}, "x"]
ROWS = (
    'id,persona,prompt,completion,choices\n1,"i ski.\ni swim.",what?,that,"[""that"", ""this""]"\n'
    '2,"[""i run.""]",so?,yes,\n'
)


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def plain(name: str, content: bytes) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def lamp(folder: Path) -> Path:
    return lamp_files(folder, "dev", 4)


def personamem(folder: Path) -> Path:
    rows = [personamem_row(0, "c", 3), personamem_row(1, "d", 5), personamem_row(2, "c", 0)]
    return personamem_files(folder, rows, {"c": TALK, "d": TALK[1:] + TALK[:1]})


@dataclass(frozen=True)
class Reader:
    """A valid source, and the file of it that is broken."""

    name: str
    write: Write
    broken: str
    format: Format = "auto"


ASKED: dict[str, Any] = {"history": ["hi"], "response": "hello", "choices": ["hello", "bye"]}
CHOSEN = [{"persona": ["i ski."], **ASKED}, *EXAMPLES]
READERS = [
    Reader("parlai", plain("a.txt", PARLAI), "a.txt", "parlai"),
    Reader("spc", plain("a.csv", CSV), "a.csv"),
    Reader("csv", plain("a.csv", ROWS.encode()), "a.csv"),
    Reader("jsonl", plain("a.jsonl", json_lines(CHOSEN)), "a.jsonl"),
    Reader("messages", plain("a.jsonl", json_lines(MESSAGES)), "a.jsonl"),
    Reader("completions", plain("a.jsonl", json_lines(COMPLETIONS)), "a.jsonl"),
    Reader("lamp questions", lamp, "dev_questions.json", "lamp"),
    Reader("lamp answers", lamp, "dev_outputs.json", "lamp"),
    Reader("personamem questions", personamem, "questions_32k.csv", "personamem"),
    Reader("personamem histories", personamem, "shared_contexts_32k.jsonl", "personamem"),
]


# Ways to break a file ---------------------------------------------------------------------------


def other_bytes(draw: random.Random, content: bytes) -> bytes:
    """A few bytes are lost, doubled or replaced; or the end is."""
    at, size = draw.randrange(len(content)), draw.randint(1, 4)
    new = draw.choice([b"", b"\xff", b'"', b"\n", b"\x00", b"{", b"]", b",", content[at:][:9] * 2])
    return content[:at] + new + (b"" if draw.random() < 0.1 else content[at + size :])


def other_lines(draw: random.Random, content: bytes) -> bytes:
    """A line is lost, doubled, moved or cut."""
    lines = content.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    line = lines.pop(at)
    new = draw.choice(
        [b"", line + line, line[: len(line) // 2] + b"\n", line.lstrip(b"0123456789")]
    )
    lines.insert(draw.randrange(len(lines) + 1) if draw.random() < 0.3 else at, new)
    return b"".join(lines)


def other_fields(draw: random.Random, content: bytes) -> bytes:
    """What stands between two separators is lost or replaced."""
    parts = re.split(rb"([,\t\n])", content)
    at = draw.randrange(0, len(parts), 2)
    parts[at] = draw.choice([b"", b" ", b"x", b'"x', b"-1", b"[1]"])
    return b"".join(parts)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of each value inside."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def other_values(draw: random.Random, content: bytes) -> bytes:
    """A value of a JSON document, or of one of its lines, is another; or its key is."""
    text = content.decode()
    whole = not text.startswith("{") or text.count("\n") < 2
    trees = [json.loads(text)] if whole else [json.loads(line) for line in text.splitlines()]
    tree = draw.choice(trees)
    container, key = draw.choice(list(places(tree)))
    wrong = copy.deepcopy(draw.choice(WRONG))
    if draw.random() < 0.3 and isinstance(container, dict):
        container[f"{key}s"] = container.pop(key)
    else:
        container[key] = wrong
    return json.dumps(trees[0], indent=1).encode() if whole else json_lines(trees)


def broken(draw: random.Random, name: str, content: bytes) -> bytes:
    ways = [other_bytes, other_lines, other_fields]
    if ".json" in name:
        ways = [other_bytes, other_lines, other_values, other_values]
    return draw.choice(ways)(draw, content)


# What the reader says ---------------------------------------------------------------------------


def fault(reader: Reader, folder: Path) -> str | None:
    """The message of the error that reading and encoding gives; None where there is none."""
    try:
        encoder = Encoder(byte_tokenizer(), 100_000)
        for example in read(str(_path(reader, folder)), reader.format):
            encoder.example(example, reserved=8)
    except SptError as error:
        return str(error)
    return None


def _path(reader: Reader, folder: Path) -> Path:
    return folder / {"lamp": "dev_questions.json", "personamem": "questions_32k.csv"}.get(
        reader.format, reader.broken
    )


def has_place(message: str, folder: Path) -> bool:
    """Whether it begins with a file of ours and a line, a byte or a key in it."""
    place = r"(:\d+:|: golds\[\d+\]|: .*\"golds\"|: not JSON at (line|column) \d+|: .*byte \d+)"
    return re.match(rf"{re.escape(str(folder))}/[\w.]+{place}", message) is not None


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_each_malformed_file_gives_one_error_with_its_place(
    reader: Reader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw, outcomes = random.Random(f"malformed {reader.name}"), Counter[str]()
    reader.write(tmp_path)
    assert fault(reader, tmp_path) is None, "the file must be valid before it is broken"
    good = (tmp_path / reader.broken).read_bytes()
    seen = {good}
    while outcomes["error"] < EACH:
        assert outcomes.total() < DRAWS, outcomes
        content = broken(draw, reader.broken, good)
        if content in seen:
            continue
        seen.add(content)
        (tmp_path / reader.broken).write_bytes(content)
        message = fault(reader, tmp_path)
        if message is None:
            outcomes["still valid"] += 1
        elif re.search(r"holds no example|the file is empty", message):
            outcomes["nothing left"] += 1  # of which no line can tell
        else:
            assert has_place(message, tmp_path), message
            assert len(message.splitlines()) == 1, message
            assert "Traceback" not in message + caplog.text
            outcomes["error"] += 1


def test_there_are_three_hundred_and_every_format_is_read() -> None:
    assert EACH * len(READERS) == 300
    assert {reader.name.split()[0] for reader in READERS} == {
        *("parlai", "spc", "csv", "jsonl", "messages", "completions", "lamp", "personamem"),
    }
