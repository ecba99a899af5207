"""Forms of a record: messages, prompt and completion, columns by other names, rows of a CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from spt_ds.config.data import FIELDS
from spt_ds.data import readers
from spt_ds.data.dialogue import Example
from spt_ds.data.readers import read
from spt_ds.errors import DataError

TALK = [
    {"role": "system", "content": "i ski.\ni cook."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and you?"},
    {"role": "assistant", "content": "fine: yes\nvery"},
]
PROMPT = {"prompt": "what is it?", "completion": "a boat", "persona": "i sail.\n\ni row.\n"}


def examples(
    folder: Path, rows: list[Any], columns: Mapping[str, str] = readers.NO_COLUMNS
) -> list[Example]:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read(str(path), columns=columns))


def of_csv(folder: Path, text: str, **columns: str) -> list[Example]:
    path = folder / "a.csv"
    path.write_text(text, encoding="utf-8")
    return list(read(str(path), columns=columns))


def test_each_message_of_the_assistant_is_an_example(tmp_path: Path) -> None:
    persona = ("i ski.\ni cook.",)  # a system message stays one text, as its template writes it
    assert examples(tmp_path, [{"messages": TALK, "id": "x"}]) == [
        Example("x/1", "x", 1, persona, ("hi",), "hello"),
        Example("x/3", "x", 3, persona, ("hi", "hello", "and you?"), "fine: yes\nvery"),
    ]


def test_messages_in_a_row_are_joined_and_the_assistant_may_open(tmp_path: Path) -> None:
    talk = [
        {"from": "gpt", "value": "hello"},
        {"from": "gpt", "value": "how are you?"},
        {"role": "user", "content": [{"type": "text", "text": "fi"}, {"text": "ne"}]},
        {"role": "user", "content": "you?"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "bye"},
    ]
    got = examples(tmp_path, [{"messages": talk, "persona": ["p"]}])
    assert [(e.turn, e.persona, e.history, e.response) for e in got] == [
        (0, ("p",), (), "hello\nhow are you?"),
        (2, ("p",), ("hello\nhow are you?", "fine\nyou?"), "fine"),
    ]


def test_the_system_message_precedes_a_persona(tmp_path: Path) -> None:
    (got, _) = examples(tmp_path, [{"messages": TALK, "persona": ["i row.", "i sail."]}])
    assert got.persona == ("i ski.\ni cook.", "i row.", "i sail.")


def test_prompt_and_completion_are_texts_or_messages(tmp_path: Path) -> None:
    talk = {"prompt": TALK[:4], "completion": TALK[4:]}
    assert examples(tmp_path, [PROMPT, talk]) == [
        Example("a.jsonl:1", "a.jsonl:1", 1, ("i sail.", "i row."), ("what is it?",), "a boat"),
        Example(
            "a.jsonl:2",
            "a.jsonl:2",
            3,
            ("i ski.\ni cook.",),
            ("hi", "hello", "and you?"),
            "fine: yes\nvery",
        ),
    ]


def test_columns_name_the_keys_of_a_file(tmp_path: Path) -> None:
    row = {"profile": "i ski.", "question": "what?", "answer": "skis", "prompt": 5}
    columns = {"persona": "profile", "prompt": "question", "completion": "answer"}
    (got,) = examples(tmp_path, [row], columns)
    assert (got.persona, got.history, got.response) == (("i ski.",), ("what?",), "skis")


def test_the_forms_of_today_come_first(tmp_path: Path) -> None:
    """A key that was ignored in 0.1.0 still is."""
    row = {"persona": [], "history": ["hi"], "response": "yes", "messages": TALK, "prompt": "x"}
    (got,) = examples(tmp_path, [row])
    assert (got.history, got.response) == (("hi",), "yes")


MESSAGES_FAULTS = [
    ([], "holds no example"),
    ("x", "\"messages\" must be a list of messages, got 'x'"),
    (["x"], '"messages[0]" must be an object with "role" and "content", got \'x\''),
    ([{"content": "x"}], '"messages[0].role" is None; allowed are system, user and assistant'),
    ([{"role": "tool", "content": "x"}], "\"messages[0].role\" is 'tool'"),
    ([{"role": ["user"], "content": "x"}], "\"messages[0].role\" is ['user']"),
    ([TALK[1], {"role": "assistant"}], '"messages[1].content" must be a text that is not blank'),
    ([{"from": "gpt", "value": " "}], '"messages[0].value" must be a text that is not blank'),
    ([TALK[1], TALK[0]], '"messages[1]" is a system message inside the dialogue'),
    (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        '"messages[0].content[0]" must be a part with a "text"',
    ),
]


@pytest.mark.parametrize(("talk", "words"), MESSAGES_FAULTS)
def test_faults_of_messages_name_line_and_key(tmp_path: Path, talk: Any, words: str) -> None:
    rows = [{"messages": talk}] if words.startswith("holds") else [PROMPT, {"messages": talk}]
    with pytest.raises(DataError) as caught:
        examples(tmp_path, rows)
    line = "" if words.startswith("holds") else ":2"
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}{line}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x"}, '"completion" must be a text that is not blank, got None'),
        ({"completion": "x"}, '"prompt" must be a text that is not blank, got None'),
        ({"prompt": TALK, "completion": "x"}, '"prompt" ends with the assistant'),
        ({"prompt": "x", "completion": TALK[:2]}, '"completion" must be one message of the assist'),
        ({**PROMPT, "persona": 5}, '"persona" must be a list of texts, got 5'),
        ({"text": "x"}, '"messages" or "prompt" is needed, got no such key among [\'text\']'),
        ({"text": "x"}, "data.columns says which of your keys is which"),
    ],
)
def test_faults_of_records_name_line_and_key(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError) as caught:
        examples(tmp_path, [PROMPT, row])
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:2: ")
    assert words in str(caught.value)


def test_a_column_that_is_not_there_is_named_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        examples(tmp_path, [PROMPT], {"persona": "profile"})
    text = str(caught.value)
    assert text.startswith(
        f"{tmp_path / 'a.jsonl'}:1: no key 'profile', which data.columns.persona"
    )


def test_a_csv_has_columns_of_any_form(tmp_path: Path) -> None:
    header = 'profile,prompt,completion,"user 2 personas"\n'
    with pytest.raises(DataError, match=r"a\.csv:1: the header lacks"):
        of_csv(tmp_path, header)
    got = of_csv(
        tmp_path, 'profile,prompt,completion\n"a.\nb.",[INST] hi,yes\n,q,r\n', persona="profile"
    )
    assert [(e.id, e.persona, e.history, e.response) for e in got] == [
        ("a.csv:2", ("a.", "b."), ("[INST] hi",), "yes"),
        ("a.csv:4", (), ("q",), "r"),
    ]


def test_lists_in_a_cell_are_json(tmp_path: Path) -> None:
    talk = json.dumps(TALK).replace('"', '""')
    (first, second) = of_csv(tmp_path, f'id,talk\n7,"{talk}"\n', messages="talk")
    assert (first.id, second.id, second.history) == ("7/1", "7/3", ("hi", "hello", "and you?"))
    row = 'persona,history,response,turn,dialogue_id\n"[""i ski.""]","[""hi""]",yes,3,\n'
    (got,) = of_csv(tmp_path, row)
    assert got == Example("a.csv:2", "a.csv:2", 3, ("i ski.",), ("hi",), "yes")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a,b\n1,2\n", 1, "got no such key among ['a', 'b']"),
        ("prompt,completion,prompt\n", 1, "the header has 'prompt' twice"),
        ("prompt,completion\nx,y\nx,\n", 3, '"completion" must be a text that is not blank'),
        ('messages\n"[{]"\n', 2, "not JSON at column 3"),
        ("messages\nhi\n", 2, "\"messages\" must be a list of messages, got 'hi'"),
        ("response,history,persona,turn\nx,[],[],z\n", 2, "got 'z'"),
    ],
)
def test_faults_of_a_csv_name_line_and_key(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        of_csv(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'a.csv'}:{line}: ")
    assert words in str(caught.value)


SPC = {
    "user 1 personas": "i ski.\ni cook.",
    "user 2 personas": "i fish.",
    "Best Generated Conversation": "User 1: hi\nUser 2: hello\nUser 1: bye",
}


def test_the_hub_has_every_form(tmp_path: Path) -> None:
    """Also the published columns of Synthetic-Persona-Chat, which 0.1.0 read from a file alone."""
    rows = [SPC, {"messages": TALK}, {**PROMPT, "persona": None}]
    with mock.patch.object(readers, "load_hub", return_value=rows):
        got = list(read("hub:owner/name"))
    assert [(e.dialogue_id, e.persona, e.response) for e in got] == [
        ("owner/name:0/user1", ("i ski.", "i cook."), "hi"),
        ("owner/name:0/user1", ("i ski.", "i cook."), "bye"),
        ("owner/name:0/user2", ("i fish.",), "hello"),
        ("owner/name:1", ("i ski.\ni cook.",), "hello"),
        ("owner/name:1", ("i ski.\ni cook.",), "fine: yes\nvery"),
        ("owner/name:2", (), "a boat"),
    ]


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        ({**SPC, "user 2 personas": None}, {}, '"user 2 personas" must be a text, got None'),
        ({**SPC, "user 2 personas": "\ud800"}, {}, '"user 2 personas" holds half a surrogate'),
        ({"messages": None}, {}, '"messages" must be a list of messages, got None'),
        ({"a": 1}, {"prompt": "b"}, "no key 'b', which data.columns.prompt names, among ['Best"),
    ],
)
def test_faults_of_the_hub_name_row_and_key(
    row: dict[str, Any], columns: dict[str, str], words: str
) -> None:
    with (
        mock.patch.object(readers, "load_hub", return_value=[SPC, row]),
        pytest.raises(DataError) as caught,
    ):
        list(read("hub:owner/name", columns={**columns}))
    origin = "row 0" if columns else "row 1"
    assert str(caught.value).startswith(f"hub:owner/name {origin}: ")
    assert words in str(caught.value)


def test_the_shipped_dialogues_keep_their_own_names() -> None:
    columns = dict.fromkeys(FIELDS, "nowhere")
    assert list(read("embedded:test", columns=columns)) == list(read("embedded:test"))
