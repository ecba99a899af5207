"""Readers: what each format means, and that every fault of a file is told with its line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from spt_ds.data.dialogue import Example
from spt_ds.data.readers import detect, digest, read
from spt_ds.errors import DataError

PARLAI = b"1 your persona: i ski.\n2 hi\tgood day\n3 bye\tso long\n"
SPC_HEADER = "user 1 personas,user 2 personas,Best Generated Conversation\n"


def write(folder: Path, name: str, content: bytes | str) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def examples(folder: Path, name: str, content: bytes | str) -> list[Example]:
    return list(read(write(folder, name, content)))


def test_parlai_numbering_restarts_with_each_dialogue(tmp_path: Path) -> None:
    got = examples(tmp_path, "a.txt", PARLAI + b"1 your persona: i fish.\n2 hello\tyes ?\n")
    assert got == [
        Example("a.txt:2", "a.txt:1", 1, ("i ski.",), ("hi",), "good day"),
        Example("a.txt:3", "a.txt:1", 3, ("i ski.",), ("hi", "good day", "bye"), "so long"),
        Example("a.txt:5", "a.txt:4", 1, ("i fish.",), ("hello",), "yes ?"),
    ]


def test_parlai_partner_persona_candidates_and_crlf(tmp_path: Path) -> None:
    content = (
        b"1 your persona: i ski.\r\n2 partner's persona: i cook.\r\n3 hi\tgood day\t\ta|b|good"
        b" day\r\n\r\n"
    )
    assert examples(tmp_path, "a.txt", b"\xef\xbb\xbf" + content) == [
        Example("a.txt:3", "a.txt:1", 1, ("i ski.",), ("hi",), "good day")
    ]


def test_parlai_silence_means_that_the_owner_opens(tmp_path: Path) -> None:
    got = examples(
        tmp_path, "a.txt", "1 your persona: i ski.\n2 __SILENCE__\tgood day\n3 hi\tso long\n"
    )
    assert [(e.turn, e.history, e.response) for e in got] == [
        (0, (), "good day"),
        (2, ("good day", "hi"), "so long"),
    ]


def test_parlai_without_persona(tmp_path: Path) -> None:
    assert examples(tmp_path, "a.txt", "1 hi\tgood day\n")[0].persona == ()


def test_fault_16_persona_keeps_its_colon_and_an_utterance_with_persona_is_an_utterance(
    tmp_path: Path,
) -> None:
    got = examples(
        tmp_path,
        "a.txt",
        "1 your persona: i wake up at 5:30\n2 what is your persona: shy ?\tmy persona: none\n",
    )
    assert got == [
        Example(
            "a.txt:2",
            "a.txt:1",
            1,
            ("i wake up at 5:30",),
            ("what is your persona: shy ?",),
            "my persona: none",
        )
    ]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"1 your persona: a\n2 hi there\n", 2, "no tab"),
        (b"1 hi\tyes\n2 your persona: a\n", 2, "after the dialogue's first utterance"),
        (b"1 __SILENCE__\tyes\n2 your persona: a\n", 2, "after the dialogue's first utterance"),
        (b"1 your persona: a\n2 caf\xe9\tyes\n", 2, "byte 0xe9 at column 6 is not UTF-8"),
        (b"1 hi\tyes\nhi\tno\n", 2, "begins with its number"),
        (b"1 hi\tyes\n3 hi\tno\n", 2, "number 3 after 1"),
        (b"1 hi\tyes\n2 hi\tno\n2 hi\tno\n", 3, "number 2 after 2"),
        (b"2 hi\tyes\n", 1, "number 2 after 0"),
        (b"1 hi\tyes\n2 \tno\n", 2, "partner's text is blank"),
        (b"1 hi\t \n", 1, "reply after the tab is blank"),
        (b"1 hi\tyes\n2 __SILENCE__\tno\n", 2, "inside a dialogue"),
        (b"1 your persona:\n", 1, "without a sentence"),
        (b"1 your persona: shy ?\tno\n", 1, "persona line with a tab"),
        (b"1 hi\tyes\n" + b"9" * 5000 + b" hi\tyes\n", 2, "begins with its number"),
    ],
)
def test_parlai_faults_name_file_and_line(
    tmp_path: Path, content: bytes, line: int, words: str
) -> None:
    path = write(tmp_path, "bad.txt", content)
    with pytest.raises(DataError) as caught:
        list(read(path, "parlai"))
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("format", ["auto", "parlai", "jsonl", "spc_csv"])
def test_empty_file_is_an_error(tmp_path: Path, format: str) -> None:
    path = write(tmp_path, "empty.txt", b"")
    with pytest.raises(DataError, match=r"empty\.txt: the file is empty"):
        list(read(path, format))  # type: ignore[arg-type]


def test_file_without_a_reply_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no example"):
        examples(tmp_path, "a.txt", "1 your persona: i ski.\n")


def test_fault_13_missing_file_is_an_error(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.txt"
    with pytest.raises(DataError, match="no such file") as caught:
        list(read(str(missing)))
    assert str(caught.value).startswith(f"{missing}: ")
    with pytest.raises(DataError, match="no such file"):
        digest(str(missing))


def test_spc_gives_two_views_of_a_conversation(tmp_path: Path) -> None:
    row = '"i ski.\ni cook.","i fish.","User 1: hi\nUser 2: hello, you\nUser 1: bye\nnow"\n'
    got = examples(tmp_path, "a.csv", SPC_HEADER + row)
    assert [(e.id, e.persona, e.history, e.response) for e in got] == [
        ("a.csv:2/user1/0", ("i ski.", "i cook."), (), "hi"),
        ("a.csv:2/user1/2", ("i ski.", "i cook."), ("hi", "hello, you"), "bye now"),
        ("a.csv:2/user2/1", ("i fish.",), ("hi",), "hello, you"),
    ]
    assert {e.dialogue_id for e in got} == {"a.csv:2/user1", "a.csv:2/user2"}


def test_spc_joins_turns_of_one_user_and_reads_names_in_bold(tmp_path: Path) -> None:
    row = 'a,b,"* * *\n**User 1:** hi *\n\nUser 1: you\n*User 2:* *waves*"\n'
    got = examples(tmp_path, "a.csv", SPC_HEADER + row)
    assert [(e.history, e.response) for e in got] == [((), "hi you"), (("hi you",), "waves")]


def test_spc_row_without_names_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spt_ds.data.spc.get_logger", lambda: logging.getLogger("test"))
    got = examples(tmp_path, "a.csv", SPC_HEADER + 'a,b,"Hi there!\nHello."\na,b,User 1: hi\n')
    assert [e.id for e in got] == ["a.csv:4/user1/0"]
    assert "a.csv:2: skipped, the conversation names no speaker" in caplog.text


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (
            "user 1 personas,Best Generated Conversation\na,b\n",
            1,
            "the header lacks ['user 2 personas']",
        ),
        (SPC_HEADER + '"a\nb",c,User 1: hi\nd,e\n', 4, "the row has 2 fields"),
        (SPC_HEADER + 'a,b,"User 1: hi" there\n', 2, "not a CSV row"),
        (SPC_HEADER + 'a,b,"User 1:\nUser 2: hi"\n', 2, "has a name and no text"),
        (SPC_HEADER + "a,b,User 1: hi, you\n", 2, "the row has 4 fields, the header 3"),
        (SPC_HEADER + 'a,b,"User 1: hi\nUser 3: yo"\n', 2, "'User 3:' inside a turn"),
        (SPC_HEADER + 'a,b,"User 1: hi\nuser 2: yo"\n', 2, "'user 2:' inside a turn"),
        (SPC_HEADER + 'a,b,"User 1: hi\nUser 12: yo"\n', 2, "'User 12:' inside a turn"),
        (SPC_HEADER + "a,b,User 1: hi User 2: yo\n", 2, "'User 2:' inside a turn"),
        (SPC_HEADER + 'a,b,"User 1: ' + "x" * 140_000, 2, "look for a quote that is not closed"),
    ],
)
def test_spc_faults_name_file_and_line(tmp_path: Path, content: str, line: int, words: str) -> None:
    path = write(tmp_path, "bad.csv", content)
    with pytest.raises(DataError) as caught:
        list(read(path))
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert words in str(caught.value)


def test_jsonl_examples_and_dialogues(tmp_path: Path) -> None:
    lines = [
        {"persona": ["i ski."], "history": ["hi"], "response": "yes\u2028no"},
        {
            "persona": [],
            "history": ["hi"],
            "response": "no",
            "dialogue_id": 7,
            "turn": 3,
            "more": None,
        },
        {"id": "x", "persona": [], "turns": ["a", "b", "c"], "first_speaker": "self"},
        {"id": "y", "persona": ["p"], "turns": ["a", "b", "c"], "first_speaker": "partner"},
    ]
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    assert examples(tmp_path, "a.jsonl", content) == [
        Example("a.jsonl:1", "a.jsonl:1", 1, ("i ski.",), ("hi",), "yes\u2028no"),
        Example("a.jsonl:2", "7", 3, (), ("hi",), "no"),
        Example("x/0", "x", 0, (), (), "a"),
        Example("x/2", "x", 2, (), ("a", "b"), "c"),
        Example("y/1", "y", 1, ("p",), ("a",), "b"),
    ]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("[1]", "got a list, expected a JSON object"),
        ("{", "not JSON"),
        ('{"persona": [], "history": []}', '"response" must be a text that is not blank, got None'),
        ('{"persona": [], "history": [], "response": "  "}', "got '  '"),
        (
            '{"history": [], "response": "a"}',
            "\"persona\" must be a list of texts, got no such key among ['history'",
        ),
        (
            '{"persona": [], "history": "hi", "response": "a"}',
            "\"history\" must be a list of texts, got 'hi'",
        ),
        (
            '{"persona": [], "history": [], "response": "a", "turn": true}',
            '"turn" must be a whole number from 0 on',
        ),
        (
            '{"persona": [], "history": [], "response": "a", "dialogue_id": " "}',
            '"dialogue_id" must be a text',
        ),
        ('{"persona": [], "history": ["a", 3], "response": "a"}', '"history[1]" must be a text'),
        (
            '{"persona": [], "turns": ["a"]}',
            "first_speaker is None; allowed are 'partner' and 'self'",
        ),
        ('{"persona": [], "turns": ["a"], "first_speaker": "me"}', "first_speaker is 'me'"),
        ('{"persona": [], "turns": [""], "first_speaker": "self"}', '"turns[0]" must be a text'),
        ("[" * 500 + "]" * 500, "not JSON at column 65 (nested deeper than"),
        ('{"id": ' + "9" * 5000 + "}", "not JSON at column 8 (a number of 5000 digits"),
        (r'{"response": "a\ud83d"}', "not JSON at column 16 (half a surrogate pair"),
        (
            '{"response": "a", "response": "b"}',
            "not JSON at column 19 (key 'response' is given twice",
        ),
        (
            '{"persona": [], "history": [], "response": "a", "turn": 99999999999}',
            "got 99999999999; the largest is 2147483647",
        ),
        ('{"persona": [], "turns": [], "first_speaker": [' + '"x",' * 30_000 + "1]}", "['x', 'x'"),
        ('{"' + "x" * 100_000 + '": 1}', "no such key among ['xxx"),
    ],
)
def test_jsonl_faults_name_file_and_line(tmp_path: Path, record: str, words: str) -> None:
    good = '{"persona": [], "history": [], "response": "a"}\n\n'
    path = write(tmp_path, "bad.jsonl", good + record + "\n")
    with pytest.raises(DataError) as caught:
        list(read(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "~no-such-user/data.txt", "\ud800"])
def test_a_name_that_no_file_can_have_is_no_such_file(source: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        list(read(source))


def test_a_line_that_does_not_end_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spt_ds.data.textfile.MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path, "a.txt", PARLAI + b"4 " + b"x" * (2 << 20))
    with pytest.raises(DataError, match=r"a\.txt:4: the line is longer than 1 MiB"):
        list(read(path))


def test_a_disk_that_fails_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "a.txt", PARLAI)

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    for use in (lambda: list(read(path)), lambda: digest(path)):
        with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Input/output error\)"):
            use()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "x", "csv"),
        ("a.jsonl", "x", "jsonl"),
        ("a.txt", '\n{"persona": []}', "jsonl"),
        ("a.txt", "1 hi\tyes", "parlai"),
        ("a", SPC_HEADER, "csv"),
    ],
)
def test_format_is_told_by_suffix_or_first_line(
    tmp_path: Path, name: str, content: str, expected: str
) -> None:
    assert detect(Path(write(tmp_path, name, content))) == expected


def test_unknown_format_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.txt:2: cannot tell the format from the line 'hello'"):
        examples(tmp_path, "a.txt", "\nhello\n")


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_shipped_dialogues(split: str) -> None:
    got = list(read(f"embedded:{split}"))
    assert len(got) >= 100
    assert all(e.persona and e.response for e in got)
    assert len({e.id for e in got}) == len(got)


@pytest.mark.parametrize("folder", ["", "clients/"])
def test_shipped_splits_share_no_dialogue(folder: str) -> None:
    ids = [
        {e.dialogue_id for e in read(f"embedded:{folder}{split}")}
        for split in ("train", "valid", "test")
    ]
    assert sum(map(len, ids)) == len(set.union(*ids))


@pytest.mark.parametrize("name", ["dev", "clients/dev", "dialogues/train", "../train", "/train"])
def test_unknown_shipped_split_is_an_error(name: str) -> None:
    with pytest.raises(DataError, match="use embedded:train, :valid or :test, or embedded:clients"):
        list(read(f"embedded:{name}"))


def test_hub_source_reads_what_datasets_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    record = {"persona": ["i ski."], "history": ["hi"], "response": "yes"}
    write(folder, "train.jsonl", json.dumps(record) + "\n")
    write(folder, "validation.jsonl", json.dumps({**record, "response": "no"}) + "\n")
    assert [e.response for e in read(f"hub:{folder}")] == ["yes"]
    assert [e.response for e in read(f"hub:{folder}::validation")] == ["no"]
    assert digest(f"hub:{folder}") != digest(f"hub:{folder}::validation")


def test_hub_source_that_cannot_be_reached_says_how_to_use_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot load it .* give a local file instead"):
        list(read("hub:no-such-owner/no-such-set"))


@pytest.mark.parametrize("source", ["hub:", "hub:a:b:c:d"])
def test_malformed_hub_source_is_an_error(source: str) -> None:
    with pytest.raises(DataError, match=r"write hub:NAME\[:CONFIG\]\[:SPLIT\]"):
        list(read(source))


def test_the_files_that_the_documentation_shows_can_be_read(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "reference" / "data.md"
    text = page.read_text(encoding="utf-8")
    _, parlai, _, jsonl, *_ = text.split("```")
    got = examples(tmp_path, "a.txt", parlai.partition("\n")[2])
    assert [(e.persona, e.response) for e in got] == [
        (("i wake up at 5:30",), "fine , i just got up ."),
        (("i wake up at 5:30",), "i like the morning ."),
    ]
    assert [e.response for e in examples(tmp_path, "a", jsonl.partition("\n")[2])] == [
        "i ski all day .",
        *["hello"] * 3,
    ]


def test_readers_and_encoder_import_no_torch() -> None:
    code = "import sys, spt_ds.data.readers, spt_ds.data.encode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
