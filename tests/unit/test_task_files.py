"""Readers of LaMP and PersonaMem files, and answers to choose among in any file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spt_ds.config.load import load_config
from spt_ds.data import json_array
from spt_ds.data.dialogue import Example
from spt_ds.data.encode import PLAIN, ContextStyle, Encoder
from spt_ds.data.json_array import objects_of
from spt_ds.data.readers import detect, digest, read
from spt_ds.data.sources import open_sources
from spt_ds.errors import ConfigError, DataError
from tests.helpers.tasks import TALK, lamp_files, personamem_files, personamem_row
from tests.helpers.tokenizers import byte_tokenizer

OPTIONS = ("You like tea.", "You like skiing.", "It's unclear.")


def lamp(folder: Path, questions: Any, golds: Any, task: str = "LaMP_3") -> Path:
    path = folder / "dev_questions.json"
    path.write_text(json.dumps(questions), encoding="utf-8")
    answers = json.dumps({"task": task, "golds": golds})
    (folder / "dev_outputs.json").write_text(answers, encoding="utf-8")
    return path


def test_a_profile_becomes_a_persona_the_label_before_its_text(tmp_path: Path) -> None:
    profile = [
        {"id": "7", "text": "Broke\nafter a day.", "score": "1"},
        {"id": "8", "text": "Only a text."},
        {
            "id": "9",
            "title": "On tea",
            "abstract": "We drink it. Often.",
            "year": 2023,
            "tag": None,
        },
        {"id": "10"},
    ]
    path = lamp(
        tmp_path,
        [
            {"id": "31", "input": "Score of: bad", "profile": profile},
            {"id": 32, "input": "x", "profile": []},
        ],
        [{"id": "32", "output": "4"}, {"id": "31", "output": 1}],
    )
    assert detect(path) == "lamp"
    name = "dev_questions.json"
    sentences = (
        "score: 1; text: Broke after a day.",
        "Only a text.",
        "year: 2023; title: On tea; abstract: We drink it. Often.",
    )
    assert list(read(str(path))) == [
        Example(f"{name}:31", f"{name}:31", 1, sentences, ("Score of: bad",), "1"),
        Example(f"{name}:32", f"{name}:32", 1, (), ("x",), "4"),
    ]


def test_a_file_is_read_object_by_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a block ends: in a string, behind a backslash, in a letter of several bytes."""
    things = [{"a": 'x"]}\\', "b": [{"c": "é\U0001f600"}, []]}, {"n": 1}, {}]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(things, indent=1, ensure_ascii=False), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    lines = [2, 2 + text[: text.index('"n"')].count("\n") - 2, text.count("\n")]
    for block in (1, 2, 3, 7, 1 << 18):
        monkeypatch.setattr(json_array, "_BLOCK", block)
        got = list(objects_of(path))
        assert [thing for _, thing in got] == things
        assert [origin for origin, _ in got] == [f"{path}:{line}" for line in lines]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("", 1, "ends inside"),
        ("{}", 1, "not JSON"),
        ('[\n{"a": 1}\n{"a": 2}]', 3, "not JSON"),
        ('[\n{"a": 1},\n\n3]', 4, "not JSON"),
        ("[,{}]", 1, "not JSON"),
        ('[{"a": 1}', 1, "ends inside"),
        ('[\n{"a": "x}]', 2, "ends inside"),
        ('[\n{"a": x}]', 2, "not JSON at line 2"),
        ('[\n{"a": 1},\n{\n"a": x}]', 3, "not JSON at line 4"),
        ("[{}]\n[]", 1, "after the list"),
        ("[" + "{" * 3 + '"a": ' + "[" * 99 + "]" * 99, 1, "inside the list"),
        ('[\n{"a": "\xff"}]', 2, "not UTF-8"),
    ],
)
def test_a_fault_of_a_json_list_names_its_line(
    tmp_path: Path, content: str, line: int, words: str
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=words) as caught:
        list(objects_of(path))
    assert str(caught.value).startswith(f"{path}:{line}:")


QUESTION = {"id": "1", "input": "a", "profile": [{"text": "b"}]}


@pytest.mark.parametrize(
    ("change", "golds", "words"),
    [
        ({"id": None}, [], '"id" must be a text'),
        ({"input": " "}, None, '"input" must be a text'),
        ({"profile": {}}, None, '"profile" must be a list'),
        ({"profile": ["x"]}, None, r'"profile\[0\]" must be an object'),
        ({"profile": [{"tag": ["x"]}]}, None, r'"profile\[0\].tag" must be a text'),
        ({"id": "2"}, None, "has no answer in"),
        ({}, {"1": "x"}, '"golds" must be a list'),
        ({}, ["x"], r"golds\[0\] must be an object"),
        ({}, [{"id": "1", "output": ""}], r'golds\[0\]: "output" must be a text'),
        ({}, [{"id": "1", "output": "x"}] * 2, r"golds\[1\].id is '1' again"),
    ],
)
def test_faults_of_lamp_name_line_and_key(
    tmp_path: Path, change: dict[str, Any], golds: Any, words: str
) -> None:
    given = [{"id": "1", "output": "x"}] if golds is None else golds
    path = lamp(tmp_path, [QUESTION | change], given)
    with pytest.raises(DataError, match=words) as caught:
        list(read(str(path)))
    assert str(tmp_path) in str(caught.value)


def test_the_file_beside_is_needed_and_belongs_to_the_data(tmp_path: Path) -> None:
    path = lamp_files(tmp_path, "train", 2)
    before = digest(str(path))
    (tmp_path / "train_outputs.json").write_text('{"golds": []}', encoding="utf-8")
    assert digest(str(path)) != before
    (tmp_path / "train_outputs.json").unlink()
    with pytest.raises(DataError, match=r"read from .*train_outputs\.json, which is not there"):
        list(read(str(path)))
    other = path.rename(tmp_path / "x.json")
    with pytest.raises(DataError, match="rename it"):
        list(read(str(other)))


def test_a_history_up_to_the_question_becomes_a_persona(tmp_path: Path) -> None:
    rows = [
        personamem_row(0, "c1", 3),
        personamem_row(1, "c1", 5, correct_answer="No.", all_options='["You like tea.", "No."]'),
        personamem_row(2, "c2", 0, correct_answer="C"),
    ]
    path = personamem_files(tmp_path, rows, {"c1": TALK, "c2": []})
    assert detect(path) == "personamem"
    first, second, third = read(str(path))
    name = "questions_32k.csv"
    said = (
        "Current user persona: a baker.",
        "User: I ski every day.",
        "Assistant: Good for you.",
        "Another day.",
        "User: I have sold my skis.",
    )
    asked = ("User: What do I like?",)
    assert first == Example(f"{name}:q0", f"{name}:0", 1, said[:3], asked, OPTIONS[1], OPTIONS)
    assert (second.persona, second.dialogue_id) == (said, first.dialogue_id)
    assert (second.response, second.choices) == ("No.", ("You like tea.", "No."))
    assert (third.persona, third.response, third.dialogue_id) == ((), OPTIONS[2], f"{name}:1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shared_context_id": "c9"}, "\"shared_context_id\" is 'c9', which .* lacks"),
        ({"end_index_in_shared_context": 6}, "the context has 5 messages"),
        ({"end_index_in_shared_context": "-1"}, "the context has 5 messages"),
        ({"correct_answer": "(d)"}, '"correct_answer" is'),
        ({"all_options": "['(a) one', '(b) one']"}, "two answers or more"),
        ({"all_options": "[1, 2]"}, '"all_options" must be a list of texts'),
        ({"all_options": "__import__('os')"}, '"all_options" must be a list of texts'),
        ({"all_options": "[" * 300}, '"all_options" must be a list of texts'),
        ({"user_question_or_message": ""}, '"user_question_or_message" must be a text'),
        ({"question_id": " "}, '"question_id" must be a text'),
    ],
)
def test_faults_of_personamem_name_line_and_key(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = personamem_files(tmp_path, [personamem_row(0, "c", 3, **change)], {"c": TALK})
    with pytest.raises(DataError, match=words) as caught:
        list(read(str(path)))
    assert str(caught.value).startswith(f"{path}:2:")


def test_faults_of_the_histories_name_line_and_key(tmp_path: Path) -> None:
    for talk, words in (
        ({}, '"c" must be a list'),
        ([{"role": "judge", "content": "x"}], r'"c\[0\].role"'),
        ([TALK[0], {"role": "user", "content": ""}], r'"c\[1\].content"'),
    ):
        path = personamem_files(tmp_path, [personamem_row(0, "c", 0)], {"a": TALK, "c": talk})
        with pytest.raises(DataError, match=words) as caught:
            list(read(str(path)))
        assert str(caught.value).startswith(f"{tmp_path / 'shared_contexts_32k.jsonl'}:2:")


def test_any_file_may_list_choices(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    row = {"prompt": "a", "completion": "x", "choices": ["x", "y", "x"]}
    path.write_text(json.dumps(row), encoding="utf-8")
    assert next(read(str(path))).choices == ("x", "y")
    for choices, words in ((["y", "z"], "one of them the response"), ("xy", "must be a list")):
        path.write_text(json.dumps(row | {"choices": choices}), encoding="utf-8")
        with pytest.raises(DataError, match=rf'x\.jsonl:1: "choices" .*{words}'):
            list(read(str(path)))
    table = tmp_path / "x.csv"
    table.write_text('prompt,completion,choices\na,x,"[""x"", ""y""]"\nb,y,\n', encoding="utf-8")
    assert [example.choices for example in read(str(table))] == [("x", "y"), ()]


def test_the_choices_of_a_task_are_those_of_each_test_example(tmp_path: Path) -> None:
    path = lamp_files(tmp_path, "test", 4)
    options = [f"data.test={path}", f"data.cache_dir={tmp_path}", "data.choices=[red, blue, green]"]
    tokenizer = byte_tokenizer()

    def store(*more: str, split: Any = "test", reserved: int | None = 4) -> Any:
        data = load_config("demo", [*options, *more]).data
        return open_sources(data, split, tokenizer, PLAIN, reserved)

    row = store()[1]
    assert (row["response"], row["choices"]) == ("blue", ["red", "blue", "green"])
    assert row["choice_ids"][1] == row["response_ids"]
    assert (row["choice_len"], store().most_choices) == (len(row["choice_ids"][2]), 3)
    with pytest.raises(DataError, match=r"answer of example test_questions\.json:102 is 'green'"):
        store("data.choices=[red, blue]")
    train = store(f"data.train={path}", split="train", reserved=None)
    assert (train[0]["choices"], train[0]["choice_ids"], train.most_choices) == ([], [], 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["data.choices=[a]"], "two answers or more"),
        (["data.choices=[a, ' a']"], "none twice"),
        (["generate.choices=sum", "generate.mode=fuse"], "set mode: select"),
        (["generate.choices=sum", "generate.num_beams=2"], "num_beams is 2, which acts only"),
        (["generate.choices=mean", "generate.stop=[x]"], "stop is .* which acts only"),
        (["generate.choices=best"], "generate.choices"),
    ],
)
def test_faults_of_the_options_are_named(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config("demo", options)
    assert load_config("demo", ["data.choices=[1, 2.5]"]).data.choices == ("1", "2.5")


def test_what_a_question_asks_for_is_found_in_a_long_history(tmp_path: Path) -> None:
    """As the recipe reads PersonaMem: the window holds some messages, the right one among them."""
    pytest.importorskip("bm25s")
    said = [
        {"role": "user", "content": f"User: Today I saw street number {n}."} for n in range(400)
    ]
    said[250] = {"role": "user", "content": "User: My violin is older than I am."}
    asked = personamem_row(0, "c", 400, user_question_or_message="How old is my violin?")
    path = personamem_files(tmp_path, [asked], {"c": said})
    style = ContextStyle(overflow="retrieve")
    (example,) = read(str(path))
    encoded = Encoder(byte_tokenizer(), 600, style).example(example, reserved=32)
    assert encoded.cut
    assert len(encoded.context_ids) <= 568
    assert "User: My violin is older than I am." in encoded.persona
    assert [bytes(ids[:-1]).decode() for ids in encoded.choice_ids] == [f" {o}" for o in OPTIONS]
