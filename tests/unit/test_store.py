"""The table of examples: read in any order over its batches, by any process, also an older one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from spt_ds.data.store import META, ROWS, SCHEMA, TABLE, ExampleStore, write_table

COUNT = 2 * ROWS + 7


def rows(count: int = COUNT) -> Iterator[dict[str, Any]]:
    for n in range(count):
        yield {
            "id": f"a.txt:{n}",
            "dialogue_id": f"a.txt:{n // 3}",
            "turn": n % 3,
            "persona": [f"i am number {n}."] * (n % 2),
            "history": [f"hello {n}"],
            "response": f"reply {n}",
            "choices": ["yes", "no", "perhaps"][: n % 4] if n < ROWS else [],
            "context_ids": [n, n + 1, n + 2][: 1 + n % 3],
            "response_ids": [n] * (n % 2),
            "choice_ids": [[n], [n, n]] if n % 5 else [],
            "context_len": 1 + n % 3,
            "response_len": n % 2,
            "choice_len": 2 if n % 5 else 0,
            "dropped_turns": n % 4,
            "prompt_at": n % 2,
            "cut": n % 7 == 0,
        }


def describe(folder: Path) -> Path:
    text = '{"key": "k", "source": "a.txt", "persona": true, "left_out": 0}'
    (folder / META).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    assert write_table(folder / TABLE, rows()) == COUNT
    return describe(folder)


@pytest.mark.parametrize(
    "wanted", [[0], [COUNT - 1, 0, ROWS], [ROWS - 1, ROWS, ROWS - 1], [2 * ROWS, 5, 2 * ROWS - 1]]
)
def test_rows_come_in_the_order_asked_for(folder: Path, wanted: list[int]) -> None:
    store, written = ExampleStore(folder), list(rows())
    assert len(store) == COUNT
    assert [store[index] for index in wanted] == [written[index] for index in wanted]
    context, response = store.ids(wanted)
    assert context.tolist() == [n for index in wanted for n in written[index]["context_ids"]]
    assert response.tolist() == [n for index in wanted for n in written[index]["response_ids"]]
    texts = [(written[index]["persona"], written[index]["history"]) for index in wanted]
    assert store.texts(wanted) == texts


def test_what_is_known_of_all_examples(folder: Path) -> None:
    store, written = ExampleStore(folder), list(rows())
    assert store.most_choices == 3
    assert store.truncated == sum(row["dropped_turns"] > 0 for row in written)
    assert store.cut == sum(row["cut"] for row in written)
    assert store.prompt_at.tolist() == [row["prompt_at"] for row in written]
    assert store.choice_len.tolist() == [row["choice_len"] for row in written]


@pytest.mark.parametrize("index", [-1, COUNT])
def test_a_row_that_is_not_there(folder: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"row {index} of a store of {COUNT}"):
        ExampleStore(folder)[index]


def test_no_rows_are_asked_for(folder: Path) -> None:
    store = ExampleStore(folder)
    assert [len(part) for part in store.ids([])] == [0, 0]
    assert store.texts([]) == []


def test_a_store_travels_without_its_texts(folder: Path) -> None:
    store = ExampleStore(folder)
    whole = ExampleStore.joined([store, store], [0.5, 0.5], "data.train")
    sent = pickle.dumps(whole)
    assert b"i am number 7." not in sent
    there = pickle.loads(sent)
    for index in (0, ROWS, COUNT, 2 * COUNT - 1):
        assert there[index] == whole[index]
    assert copy.copy(whole)[COUNT] == whole[COUNT]


def test_a_table_that_datasets_wrote_is_read(folder: Path, tmp_path: Path) -> None:
    """As the caches of releases that wrote it so."""
    from datasets import Features
    from datasets.arrow_writer import ArrowWriter

    features = Features.from_arrow_schema(SCHEMA)
    with ArrowWriter(path=str(tmp_path / TABLE), features=features) as writer:
        for row in rows():
            writer.write(row)
        writer.finalize()
    with pa.ipc.open_stream(pa.memory_map(str(tmp_path / TABLE))) as stream:
        assert stream.schema.metadata  # what `datasets` adds
    old, new = ExampleStore(describe(tmp_path)), ExampleStore(folder)
    assert [old[n] for n in (0, 1, ROWS, COUNT - 1)] == [new[n] for n in (0, 1, ROWS, COUNT - 1)]
    both = ExampleStore.joined([old, new], [], "data.train")
    assert both.ids([COUNT - 1, COUNT])[0].tolist() == new.ids([COUNT - 1, 0])[0].tolist()
