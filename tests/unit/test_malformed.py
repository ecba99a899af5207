"""Three hundred malformed files: each gives one clear error that names its place, and no other.

The files are made from valid ones of each kind, by changes that are drawn from a fixed seed. A
change after which a file can still be read is drawn again and not counted.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spt_ds.data.readers import detect, read
from spt_ds.errors import DataError, SptError
from tests.helpers.tasks import TALK, lamp_files, personamem_files, personamem_row

FILES = 300
Change = Callable[[bytes, random.Random], bytes]


class Kind(NamedTuple):
    """Valid files of one reader."""

    format: str
    source: str
    files: dict[str, bytes]
    changed: str  # the one that is broken


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def table(*rows: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def kinds(folder: Path) -> dict[str, Kind]:
    """Each way in which a file may hold dialogues; LaMP and PersonaMem have two files each."""
    folder.mkdir()
    system = {"role": "system", "content": "i ski."}
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    turns = {"persona": ["i ski."], "turns": ["hi", "hello", "bye"], "first_speaker": "self"}
    example = {"persona": ["i ski."], "history": ["hi"], "response": "hello", "turn": 1}
    choice = {"prompt": "tea?", "completion": "yes", "choices": ["yes", "no"]}
    spoken = "User 1: hi\nUser 2: hello, you\nUser 1: bye"
    texts = {
        "parlai": (
            "a.txt",
            b"1 your persona: i ski.\n2 hi\tgood day\n3 bye\tso long\n1 hello\tyes\n2 so?\tok\n",
        ),
        "spc": (
            "a.csv",
            table(
                ["user 1 personas", "user 2 personas", "Best Generated Conversation"],
                ["i ski.\ni swim.", "i read.", spoken],
                ["i sing.", "i run.", spoken],
            ),
        ),
        "csv": (
            "a.csv",
            table(
                ["id", "persona", "history", "response", "turn"],
                ["a", "i ski.", '["hi", "hello", "so?"]', "no, never", "3"],
                ["b", '["i ski.", "i row."]', '["hi"]', "yes", ""],
            ),
        ),
        "example": ("a.jsonl", lines(example, example, {**example, "dialogue_id": "d"})),
        "dialogue": ("a.jsonl", lines(turns, {**turns, "first_speaker": "partner"})),
        "messages": ("a.jsonl", lines({"messages": [system, *talk]}, {"messages": talk * 2})),
        "completion": (
            "a.jsonl",
            lines(choice, {"prompt": [system, *talk[:1]], "completion": talk[1:]}, choice),
        ),
    }
    found = {}
    for name, (file, content) in texts.items():
        format = {"parlai": "parlai", "spc": "csv", "csv": "csv"}.get(name, "jsonl")
        found[name] = Kind(format, file, {file: content}, file)
    lamp = lamp_files(folder, "dev", 3)
    rows = [personamem_row(number, "c1" if number else "c0", number) for number in range(4)]
    mem = personamem_files(folder, rows, {"c0": TALK, "c1": TALK[::-1]})
    for name, path in (("lamp", lamp), ("personamem", mem)):
        both = {
            file.name: file.read_bytes()
            for file in folder.iterdir()
            if (file.suffix == ".json") == (name == "lamp")
        }
        for file in both:
            found[f"{name} {file.partition('.')[0]}"] = Kind(name, path.name, both, file)
    return found


# Changes to the bytes of a file -----------------------------------------------------------------


def cut_off(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(1, len(content))]


def without_a_piece(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) - 1)
    return content[:start] + content[start + draw.randint(1, 12) :]


def with_a_piece_more(content: bytes, draw: random.Random) -> bytes:
    pieces = (b"\xff", b"\xed\xa0\x80", b'"', b"[", b"}", b",", b"\t", b"\n", b"\x00", b"\\ud800")
    start = draw.randrange(len(content))
    return content[:start] + draw.choice(pieces) + content[start:]


def with_a_line_moved(content: bytes, draw: random.Random) -> bytes:
    every = content.splitlines(keepends=True)
    line = every.pop(draw.randrange(len(every)))
    every.insert(draw.randint(0, len(every)), line)
    return b"".join(every)


def with_another_value(content: bytes, draw: random.Random) -> bytes:
    """A JSON value, or a cell, of another kind."""
    start = draw.randrange(len(content))
    match = re.compile(rb'"[^"\\\n]*"|\b\d+\b|\[|\]|\{|\}|[^,\n]+').search(content, start)
    if match is None:
        return content
    values = (b"null", b"-1", b"1e999", b"{}", b"[]", b'""', b"true", b'" "', b'{"a": [1]}')
    return content[: match.start()] + draw.choice(values) + content[match.end() :]


CHANGES: tuple[Change, ...] = (
    cut_off,
    without_a_piece,
    with_a_piece_more,
    with_a_line_moved,
    with_another_value,
)


def write(kind: Kind, folder: Path, content: bytes) -> Path:
    for name, valid in kind.files.items():
        (folder / name).write_bytes(content if name == kind.changed else valid)
    return folder / kind.source


def read_all(kind: Kind, path: Path) -> list[Any]:
    return list(read(str(path), kind.format))  # type: ignore[arg-type]


def malformed(kind: Kind, folder: Path, draw: random.Random) -> Iterator[tuple[bytes, SptError]]:
    """Changed files that cannot be read, each another one, with the error that they give."""
    valid, seen = kind.files[kind.changed], {kind.files[kind.changed]}
    while True:
        content = draw.choice(CHANGES)(valid, draw)
        if content in seen:
            continue
        seen.add(content)
        path = write(kind, folder, content)
        try:
            assert read_all(kind, path)
        except SptError as error:
            yield content, error


def check(error: SptError, kind: Kind, folder: Path) -> bool:
    """Whether a message names a line or a key; what holds for every message is asserted."""
    text = str(error)
    assert isinstance(error, DataError)
    assert len(text.splitlines()) == 1
    assert len(text) - text.count(str(folder)) * len(str(folder)) < 600
    assert text.isprintable()
    # One of the two files of the source, then what is wrong with it.
    files = "|".join(re.escape(str(folder / name)) for name in kind.files)
    match = re.match(rf"({files})(:\d+)?: (?P<rest>.{{12,}})", text)
    assert match is not None, text
    return (
        match[2] is not None or re.search(r'golds\[\d+\]|"\w+"|line \d+', match["rest"]) is not None
    )


def test_the_files_are_valid_before_the_change(tmp_path: Path) -> None:
    for name, kind in kinds(tmp_path / "valid").items():
        path = write(kind, tmp_path, kind.files[kind.changed])
        assert len(read_all(kind, path)) >= 2, name
        assert detect(path) == kind.format


def test_three_hundred_malformed_files_give_one_clear_error_each(tmp_path: Path) -> None:
    every = kinds(tmp_path / "valid")
    share = -(-FILES // len(every))
    counted = dict.fromkeys(every, 0)
    words: dict[str, set[str]] = {name: set() for name in every}
    for name, kind in every.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        for content, error in malformed(kind, folder, random.Random(f"malformed {name}")):
            # A file without a single example has no line to name: it is checked, and not counted.
            counted[name] += check(error, kind, folder)
            words[name].add(re.sub(r"\d+|'.*'", "", str(error)))
            # The same file gives the same error again.
            with pytest.raises(DataError) as again:
                read_all(kind, write(kind, folder, content))
            assert str(again.value) == str(error)
            if counted[name] == share:
                break
    assert counted == dict.fromkeys(every, share)
    assert sum(counted.values()) >= FILES
    # Not one fault over and over: each reader tells several apart.
    assert min(map(len, words.values())) >= 4, words


def test_a_change_that_leaves_a_file_valid_is_not_counted(tmp_path: Path) -> None:
    kind = kinds(tmp_path / "valid")["messages"]
    harmless = [kind.files["a.jsonl"].replace(b"hello", b"good day")] * 5
    contents = iter([*harmless, b'{"messages": 1}\n'])
    changes = pytest.MonkeyPatch()
    with changes.context() as patch:
        patch.setattr(f"{__name__}.CHANGES", (lambda content, draw: next(contents),))
        content, error = next(malformed(kind, tmp_path, random.Random(0)))
    assert content == b'{"messages": 1}\n'
    assert '"messages" must be a list' in str(error)


def test_the_check_sees_what_is_no_clear_error(tmp_path: Path) -> None:
    kind = kinds(tmp_path / "valid")["messages"]
    path = tmp_path / "a.jsonl"
    assert check(DataError(f'{path}:3: "turns" is missing here'), kind, tmp_path)
    assert not check(DataError(f"{path}: the file is empty, so"), kind, tmp_path)
    for unclear in (
        "no place: it is wrong",
        f"{path}:1: two\nlines of it",
        f"{path}:1: {'x' * 900}",
    ):
        with pytest.raises(AssertionError):
            check(DataError(unclear), kind, tmp_path)
