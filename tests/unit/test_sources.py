"""What `data.train`, `data.valid` and `data.test` may name, and the parts of one divided file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spt_ds.config.load import dump_config, load_config
from spt_ds.config.schema import Config
from spt_ds.data.encode import PLAIN
from spt_ds.data.readers import Part, Split, read
from spt_ds.data.sources import open_sources, sources_of
from spt_ds.data.store import ExampleStore
from spt_ds.errors import ConfigError, DataError
from spt_ds.run.folder import differences
from tests.helpers.tokenizers import byte_tokenizer

SPLITS: tuple[Split, ...] = ("train", "valid", "test")


def write(path: Path, dialogues: int = 20, personas: int = 4) -> Path:
    rows = [
        {
            "id": f"d{n}",
            "persona": [f"i am {n % personas}."],
            "turns": ["hi", f"a{n}", "and?", f"b{n}"],
            "first_speaker": "partner",
        }
        for n in range(dialogues)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def config(*options: str) -> Config:
    return load_config("demo", options)


def stores(folder: Path, *options: str) -> dict[Split, ExampleStore]:
    data = config(f"data.cache_dir={folder / 'cache'}", *options).data
    return {name: open_sources(data, name, byte_tokenizer(), PLAIN, None) for name in SPLITS}


def dialogues(store: ExampleStore) -> set[str]:
    return {store[row]["dialogue_id"] for row in range(len(store))}


def divided(path: Path, *options: str) -> tuple[str, ...]:
    return (f"data.train={path}", "data.valid=split:0.1", "data.test=split:0.2", *options)


def test_one_file_is_divided_by_dialogue(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    found = {name: dialogues(store) for name, store in stores(tmp_path, *divided(path)).items()}
    assert {name: len(ids) for name, ids in found.items()} == {"train": 14, "valid": 2, "test": 4}
    assert set.union(*found.values()) == {f"d{n}" for n in range(20)}
    again = stores(tmp_path / "again", *divided(path))
    assert {name: dialogues(store) for name, store in again.items()} == found
    other = stores(tmp_path, *divided(path, "data.split_seed=1"))
    assert dialogues(other["test"]) != found["test"]
    assert other["test"].data_hash != again["test"].data_hash
    assert [len(store) for store in again.values()] == [28, 4, 8]  # whole dialogues


def test_one_file_is_divided_by_persona(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    found = stores(tmp_path, *divided(path, "data.split_by=persona"))
    personas = [
        {tuple(store[row]["persona"]) for row in range(len(store))} for store in found.values()
    ]
    assert [len(group) for group in personas] == [2, 1, 1]
    assert len(set.union(*personas)) == 4


def test_lines_that_are_added_move_no_dialogue_but_those_at_the_border(tmp_path: Path) -> None:
    before, after = write(tmp_path / "a.jsonl", 20), write(tmp_path / "b.jsonl", 22)

    def ids(path: Path) -> set[str]:
        part = Part("valid", 0.5, 0, "dialogue", 0)
        return {example.dialogue_id for example in part.of(str(path), "auto", {})}

    assert len(ids(before) - ids(after)) <= 1


def test_both_views_of_a_conversation_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = [f'a{n},b{n},"User 1: hi {n}\nUser 2: yes\nUser 1: bye"\n' for n in range(10)]
    header = "user 1 personas,user 2 personas,Best Generated Conversation\n"
    path.write_text(header + "".join(rows), encoding="utf-8")
    found = [dialogues(store) for store in stores(tmp_path, *divided(path)).values()]
    lines = [{name.partition("/")[0] for name in ids} for ids in found]
    assert sum(map(len, lines)) == len(set.union(*lines)) == 10
    assert all(len(ids) == 2 * len(of) for ids, of in zip(found, lines, strict=True))


def test_a_file_that_is_too_small_to_divide(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 2)
    with pytest.raises(DataError, match=r"a\.jsonl: 2 dialogues cannot be divided into 1 for"):
        stores(tmp_path, *divided(path))


def test_several_sources_each_with_its_format_and_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 hi\tyes\n", encoding="utf-8")
    (tmp_path / "b").write_text('{"q": "what?", "a": "that"}\n', encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"prompt": "x", "reply": "y"}\n', encoding="utf-8")
    tree = [
        {"path": str(tmp_path / "a.txt"), "weight": 1},
        {
            "path": str(tmp_path / "b"),
            "weight": 1.5,
            "format": "jsonl",
            "columns": {"prompt": "q", "completion": "a"},
        },
        {"path": str(tmp_path / "c.jsonl"), "weight": 1},
    ]
    data: tuple[str, ...] = (f"data.train={json.dumps(tree)}", f"data.valid={tmp_path / 'a.txt'}")
    data = (*data, f"data.test={tmp_path / 'a.txt'}")
    found = stores(tmp_path, *data, "data.columns={completion: reply}")["train"]
    assert [found[row]["response"] for row in range(3)] == ["yes", "that", "y"]
    whole = config(*data)
    (tmp_path / "again.yaml").write_text(dump_config(whole), encoding="utf-8")
    assert load_config(str(tmp_path / "again.yaml")) == whole
    assert sources_of(whole.data, "train")[0][1].weight == 1.5


def test_a_mixture_is_divided_source_by_source(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", 10)
    tree = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in ("a", "b")]
    found = stores(tmp_path, *divided(Path(json.dumps(tree))))
    ids = {name: sorted(dialogues(store)) for name, store in found.items()}
    assert [len(group) for group in ids.values()] == [14, 2, 4]
    assert [name[0] for name in ids["test"]] == ["0", "0", "1", "1"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["data.train=split:0.1"], "train is the source that split: divides"),
        (["data.valid=split:2"], "valid is 'split:2'; write split: and a share, as split:0.1"),
        (["data.valid=split:.5", "data.test=split:.5"], "leave nothing to train on"),
        (["data.train=[{path: a, weight: 1}, {path: b}]"], "give each source a weight, or none"),
        (["data.test=[{path: a, weight: 1}]"], "test: weight is for training"),
        (["data.train=[]"], "data.train: Tuple should have at least 1 item"),
        (["data.train=3"], "data.train: Input should be a valid tuple"),
        (["data.train=[{path: a, weight: 0}]"], "data.train.0.weight: Input should be greater"),
        (["data.train=[{path: a, wieght: 1}]"], "data.train.0.wieght: unknown key; did you mean"),
        (["data.columns={profile: persona}"], "'profile' is no field of an example; allowed are"),
        (["data.overflow=cut"], "data.overflow: Input should be 'error', 'truncate', 'drop' or"),
        (
            ["data.persona=false", "data.persona_dropout.whole=0.5"],
            "persona_dropout hides parts of a persona, and persona: false all of it",
        ),
        (["init=runs/one"], "init: String should match pattern"),
        (["init=run:a", "prompts.warm_start_steps=2"], "begins with one prompt for all; leave one"),
    ],
)
def test_faults_of_the_options_are_named(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*options)
    assert words in str(caught.value)
    assert "(several)" not in str(caught.value)


def test_a_run_may_change_its_test_but_not_what_it_holds_out() -> None:
    def changed(before: str, after: str) -> list[Any]:
        return differences(config(f"data.test={before}"), config(f"data.test={after}"))

    assert changed("a.jsonl", "b.jsonl") == []
    assert changed("split:0.1", "b.jsonl") == ["data.test: 'split:0.1' -> 'b.jsonl'"]
    assert changed("split:0.1", "split:0.2") == ["data.test: 'split:0.1' -> 'split:0.2'"]
    assert changed("split:0.1", "split:.1") == []


def test_the_whole_is_its_parts(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl"))
    parts = [Part(name, 0.25, 0.25, "dialogue", 3) for name in SPLITS]
    got = [example for part in parts for example in part.of(path, "auto", {})]
    assert sorted(example.id for example in got) == sorted(example.id for example in read(path))
