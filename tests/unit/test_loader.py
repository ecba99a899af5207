"""Store and loader: what a window holds does not depend on ranks, micro-batches, workers or the
step it starts at.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from spt_ds.batch import Batch, Window
from spt_ds.config.data import PersonaDropoutConfig
from spt_ds.data import loader as loader_module
from spt_ds.data.encode import Encoder
from spt_ds.data.loader import PersonaDropout, TrainLoader, eval_batches, make_batch
from spt_ds.data.pairs import contrast_pairs, pair_text
from spt_ds.data.readers import read
from spt_ds.data.sampler import MicroSize, window_indices
from spt_ds.data.sources import build_store, cache_root
from spt_ds.data.store import ExampleStore
from spt_ds.errors import DataError
from tests.helpers.tiny import examples_of
from tests.helpers.tokenizers import byte_tokenizer, encode, piece_tokenizer

EXAMPLES = 23
WINDOW = 8
SEED = 3


def write_dialogues(path: Path) -> Path:
    """23 examples of unlike lengths; every third persona is the same, all others differ."""
    personas = [
        ["i like dogs.", "i ski."],
        ["my mother is a nurse."],
        ["we own two old cars.", "music matters."],
    ]
    lines = []
    for n in range(EXAMPLES):
        history, response = ["word " * (n * 7 % 11 + 1)], "yes " * (n % 4 + 1)
        lines.append({"persona": personas[n % 3], "history": history, "response": response})
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogues(tmp_path_factory.mktemp("source") / "train.jsonl")


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> ExampleStore:
    cache = str(tmp_path_factory.mktemp("cache"))
    return build_store(str(source), byte_tokenizer(), max_tokens=512, cache_dir=cache)


def train_loader(
    store: ExampleStore, world: int = 1, rank: int = 0, micro: int = 3, workers: int = 0
) -> TrainLoader:
    return TrainLoader(
        store,
        global_batch=WINDOW,
        micro=MicroSize(micro),
        world=world,
        rank=rank,
        seed=SEED,
        bleu_threshold=20.0,
        workers=workers,
    )


def windows(store: ExampleStore, start: int = 0, steps: int = 4, **shape: int) -> list[Window]:
    return list(islice(train_loader(store, **shape).windows(start), steps))


def rows_of(batch: Batch) -> Iterator[tuple[int, float, list[int], list[int]]]:
    """(index, weight, context ids, response ids) of each row."""
    for index, weight, (context, response) in zip(
        batch.indices, batch.weights, examples_of(batch), strict=True
    ):
        yield index, weight, context.tolist(), response.tolist()


def test_rows_are_the_encoded_examples_of_the_window(store: ExampleStore, source: Path) -> None:
    encoded = [encode(example, byte_tokenizer(), 512) for example in read(str(source))]
    for step, window in enumerate(windows(store)):
        rows = [row for batch in window.micro for row in rows_of(batch)]
        assert sorted(row[0] for row in rows) == sorted(
            window_indices(EXAMPLES, WINDOW, SEED, step)
        )
        for index, weight, context, response in rows:
            assert (weight, context, response) == (
                1.0,
                encoded[index].context_ids,
                encoded[index].response_ids,
            )
        assert window.target_tokens == sum(len(row[3]) for row in rows)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_window_does_not_depend_on_ranks_and_micro_batches(
    store: ExampleStore, world: int, micro: int
) -> None:
    """1 x 8 = 2 x 4 = 4 x 2: the same examples at the same window positions, the same counts, the
    same pairs.
    """
    for whole, *parts in zip(
        windows(store, micro=8),
        *(windows(store, world=world, rank=rank, micro=micro) for rank in range(world)),
        strict=True,
    ):
        assert {(w.examples, w.target_tokens, sum(map(len, w.micro))) for w in parts} == {
            (WINDOW, whole.target_tokens, -(-WINDOW // world))
        }
        by_rank = [[row for batch in part.micro for row in rows_of(batch)] for part in parts]
        assert whole.contrast is not None
        reference = [row for batch in whole.micro for row in rows_of(batch)]
        pairs: dict[tuple[int, int], float] = {}
        for rank, part in enumerate(parts):
            assert part.contrast is not None
            assert part.contrast.owner == parts[0].contrast.owner
            assert part.contrast.pair_count == WINDOW * (WINDOW - 1) // 2
            for (i, j), target in zip(
                part.contrast.pairs.tolist(), part.contrast.targets.tolist(), strict=True
            ):
                assert rank in (part.contrast.owner[i][0], part.contrast.owner[j][0])
                assert pairs.setdefault((i, j), target) == target
        expected = zip(
            map(tuple, whole.contrast.pairs.tolist()), whole.contrast.targets.tolist(), strict=True
        )
        assert pairs == dict(expected)
        owner = parts[0].contrast.owner
        for place in range(WINDOW):
            rank, slot = owner[place]
            assert by_rank[rank][slot] == reference[whole.contrast.owner[place][1]]
        assert sum(row[1] for rows in by_rank for row in rows) == WINDOW


def test_fault_09_pairs_are_those_of_the_global_window(store: ExampleStore) -> None:
    first = windows(store, world=4, rank=2, steps=1)[0]
    assert first.contrast is not None
    indices = window_indices(EXAMPLES, WINDOW, SEED, 0)
    texts = [pair_text(store[i]["persona"], store[i]["history"]) for i in indices]
    pairs, targets = contrast_pairs(texts, [rank == 2 for rank, _ in first.contrast.owner], 20.0)
    assert first.contrast.pairs.tolist() == pairs.tolist()
    assert first.contrast.targets.tolist() == targets.tolist()
    assert (
        len(pairs) == 1 + 2 * 6
    )  # its own two examples, and each of them with the six of other ranks
    assert set(targets) == {1.0, -1.0}


def test_fault_09_window_of_one_has_no_contrast(store: ExampleStore) -> None:
    one = TrainLoader(
        store,
        global_batch=1,
        micro=MicroSize(1),
        world=1,
        rank=0,
        seed=0,
        bleu_threshold=20.0,
        workers=0,
    )
    assert next(one.windows(0)).contrast is None


def test_fault_12_any_start_gives_the_same_windows(store: ExampleStore) -> None:
    everything = windows(store, steps=6)
    for start in (1, 5):
        assert_same(windows(store, start=start, steps=1), everything[start : start + 1])


def test_workers_prepare_the_same_windows(store: ExampleStore) -> None:
    assert_same(windows(store, workers=2, steps=6), windows(store, workers=0, steps=6))


def assert_same(left: list[Window], right: list[Window]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert [list(rows_of(batch)) for batch in a.micro] == [
            list(rows_of(batch)) for batch in b.micro
        ]
        assert a.contrast is not None
        assert b.contrast is not None
        assert a.contrast.owner == b.contrast.owner
        assert a.contrast.targets.tolist() == b.contrast.targets.tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_error_of_a_worker_arrives_with_its_own_text(
    store: ExampleStore, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def damaged(*_: object) -> None:
        raise DataError("train.txt:7: damaged")

    monkeypatch.setattr(loader_module, "contrast_pairs", damaged)
    with pytest.raises(DataError) as caught:
        next(train_loader(store, workers=workers).windows(0))
    assert str(caught.value) == "train.txt:7: damaged"


@pytest.mark.parametrize("world", [1, 2, 4, 30])
def test_fault_12_evaluation_reads_every_example_exactly_once(
    store: ExampleStore, world: int
) -> None:
    ranks = [list(eval_batches(store, MicroSize(3), world, rank)) for rank in range(world)]
    assert len({tuple(len(batch) for batch in batches) for batches in ranks}) == 1
    rows = [row for batches in ranks for batch in batches for row in rows_of(batch)]
    assert sorted(index for index, weight, *_ in rows if weight == 1.0) == list(range(EXAMPLES))
    assert sum(weight for _, weight, *_ in rows) == EXAMPLES
    for index, _, context, response in rows:
        assert (context, response) == (store[index]["context_ids"], store[index]["response_ids"])


def test_chosen_rows_keep_their_order(store: ExampleStore) -> None:
    got = list(rows_of(make_batch(store, [5, 2, 5])))
    assert [row[:2] for row in got] == [(5, 1.0), (2, 1.0), (5, 1.0)]
    assert [row[2] for row in got] == [store[i]["context_ids"] for i in (5, 2, 5)]


def test_store_keeps_texts_ids_and_lengths(store: ExampleStore, source: Path) -> None:
    assert len(store) == EXAMPLES
    for row, example in enumerate(read(str(source))):
        got = store[row]
        assert (got["id"], tuple(got["persona"]), tuple(got["history"])) == (
            example.id,
            example.persona,
            example.history,
        )
        assert (got["response"], got["turn"]) == (example.response, example.turn)
        assert (store.lengths.context[row], store.lengths.response[row]) == (
            len(got["context_ids"]),
            len(got["response_ids"]),
        )
    assert store.lengths.total.dtype == np.int32
    assert len(pickle.loads(pickle.dumps(store))) == EXAMPLES


def test_store_is_reused_until_something_it_depends_on_changes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path)
    first = build_store(str(source), byte_tokenizer(), max_tokens=512, cache_dir=cache)
    copied = str(shutil.copy(source, tmp_path / "copy.jsonl"))
    others = [
        build_store(str(source), byte_tokenizer(), max_tokens=511, cache_dir=cache),
        build_store(str(source), byte_tokenizer(bos=None), max_tokens=512, cache_dir=cache),
        build_store(str(source), piece_tokenizer(), max_tokens=512, cache_dir=cache),
        build_store(str(source), byte_tokenizer(), max_tokens=512, max_examples=5, cache_dir=cache),
        build_store(
            copied, byte_tokenizer(), max_tokens=512, cache_dir=cache
        ),  # ids carry the file's name
    ]
    with Path(copied).open("a", encoding="utf-8") as file:
        file.write('\n{"persona": [], "history": [], "response": "a"}\n')
    others.append(build_store(copied, byte_tokenizer(), max_tokens=512, cache_dir=cache))
    assert len({first.data_hash, *(other.data_hash for other in others)}) == 7
    assert [len(other) for other in others] == [
        EXAMPLES,
        EXAMPLES,
        EXAMPLES,
        5,
        EXAMPLES,
        EXAMPLES + 1,
    ]

    def never(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("spt_ds.data.encode.Encoder.stream", never)
    again = build_store(str(source), byte_tokenizer(), max_tokens=512, cache_dir=cache)
    assert (again.path, again.data_hash) == (first.path, first.data_hash)


def test_store_counts_the_examples_that_lost_turns(source: Path, tmp_path: Path) -> None:
    shorter = build_store(str(source), byte_tokenizer(), max_tokens=100, cache_dir=str(tmp_path))
    dropped = [
        encode(example, byte_tokenizer(), 100).dropped_turns for example in read(str(source))
    ]
    assert shorter.truncated == sum(map(bool, dropped)) > 0
    assert [shorter[row]["dropped_turns"] for row in range(EXAMPLES)] == dropped


def build_at(barrier: object, source: str, cache: str, hashes: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    built = build_store(source, byte_tokenizer(), max_tokens=512, cache_dir=cache)
    hashes.put((built.data_hash, len(built)))  # type: ignore[attr-defined]


def test_writers_that_race_end_with_one_whole_store(source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, hashes = context.Barrier(3), context.Queue()
    racers = [
        context.Process(target=build_at, args=(barrier, str(source), str(tmp_path), hashes))
        for _ in range(3)
    ]
    for racer in racers:
        racer.start()
    got = {hashes.get(timeout=60) for _ in racers}
    for racer in racers:
        racer.join(timeout=60)
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert [count for _, count in got] == [EXAMPLES]
    assert len(list((tmp_path / "examples").iterdir())) == 1


def test_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"1 hi\tyes\n2 hi\n")
    with pytest.raises(DataError, match=r"bad\.txt:2: no tab"):
        build_store(str(bad), byte_tokenizer(), max_tokens=512, cache_dir=str(tmp_path))
    assert list((tmp_path / "examples").iterdir()) == []


def test_folder_that_cannot_be_written_is_an_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the tokenised data .*; set data\.cache_dir"):
        build_store(str(source), byte_tokenizer(), max_tokens=512, cache_dir=str(tmp_path / "file"))


def test_damaged_store_is_an_error_that_says_what_to_do(source: Path, tmp_path: Path) -> None:
    built = build_store(str(source), byte_tokenizer(), max_tokens=512, cache_dir=str(tmp_path))
    (built.path / "examples.arrow").write_bytes(b"")
    with pytest.raises(DataError, match=r"not a readable store of examples .* remove the folder"):
        build_store(str(source), byte_tokenizer(), max_tokens=512, cache_dir=str(tmp_path))


def test_cache_folder_comes_from_the_config_then_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPT_CACHE", "/from/environment")
    assert cache_root("/given") == Path("/given")
    assert cache_root(None) == Path("/from/environment")
    monkeypatch.delenv("SPT_CACHE")
    assert cache_root(None) == Path.home() / ".cache" / "spt_ds"


# Hidden personas ---------------------------------------------------------------------------------


def dropout(**shares: float) -> PersonaDropout:
    encoder = Encoder(byte_tokenizer(), 512)
    return PersonaDropout(encoder, PersonaDropoutConfig(**shares), SEED)


def hiding(store: ExampleStore, steps: int, **shares: float) -> list[Window]:
    loader = TrainLoader(
        store,
        global_batch=WINDOW,
        micro=MicroSize(3),
        world=1,
        rank=0,
        seed=SEED,
        bleu_threshold=20.0,
        workers=0,
        dropout=dropout(**shares),
    )
    return list(islice(loader.windows(0), steps))


def test_all_or_none_of_the_personas_are_hidden(store: ExampleStore) -> None:
    plain = hiding(store, 4)
    for one, other in zip(plain, windows(store), strict=True):
        for ours, theirs in zip(one.micro, other.micro, strict=True):
            assert [list(row) for row in rows_of(ours)] == [list(row) for row in rows_of(theirs)]
    for shares in ({"whole": 1.0}, {"sentences": 1.0}):
        for window in hiding(store, 4, **shares):
            for batch in window.micro:
                for row, _, context, response in rows_of(batch):
                    assert bytes(context[1:]).startswith(b"context:")
                    assert response == store.ids([row])[1].tolist()


def test_about_the_given_shares_are_hidden(store: ExampleStore) -> None:
    rows = range(len(store))
    sentences = whole = partly = 0
    for step in range(60):
        for row, encoded in dropout(whole=0.2).hidden(store, rows, step).items():
            assert encoded.persona == ()
            whole += bool(store[row]["persona"])
        for row, encoded in dropout(sentences=0.3).hidden(store, rows, step).items():
            persona = store[row]["persona"]
            assert set(encoded.persona) < set(persona)
            sentences += len(persona) - len(encoded.persona)
            partly += bool(encoded.persona)
    total = 60 * sum(len(store[row]["persona"]) for row in rows)
    assert 0.15 < whole / (60 * len(store)) < 0.25
    assert 0.25 < sentences / total < 0.35
    assert partly


def test_hidden_personas_are_compared_as_the_model_sees_them(store: ExampleStore) -> None:
    """Without personas the pairs are those of the dialogues."""
    (window,) = hiding(store, 1, whole=1.0)
    assert window.contrast is not None
    rows = store.window(WINDOW, SEED, 0).tolist()
    texts = [" ".join(store[row]["history"]) for row in rows]
    pairs, targets = contrast_pairs(texts, [True] * len(rows), 20.0)
    assert window.contrast.pairs.tolist() == pairs.tolist()
    assert window.contrast.targets.tolist() == targets.tolist()
