"""The order of several weighted sources: their shares, any number of ranks, any start."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spt_ds.data.loader import TrainLoader
from spt_ds.data.mixture import Mixture, _epoch_rows
from spt_ds.data.sampler import MicroSize
from spt_ds.data.sources import build_store
from spt_ds.data.store import ExampleStore
from spt_ds.errors import DataError
from tests.distributed.scenes import write_dialogues
from tests.helpers.tokenizers import byte_tokenizer

SIZES, WEIGHTS = (40, 7, 13), (3.0, 2.0, 1.0)

mixtures = st.lists(st.tuples(st.integers(3, 30), st.floats(0.5, 4)), min_size=2, max_size=4).map(
    lambda pairs: (tuple(size for size, _ in pairs), tuple(weight for _, weight in pairs))
)


@given(mixtures, st.integers(1, 40), st.integers(0, 3))
def test_each_epoch_has_the_shares_and_each_source_is_used_evenly(
    sources: tuple[tuple[int, ...], tuple[float, ...]], window: int, seed: int
) -> None:
    sizes, weights = sources
    mixture = Mixture.weighted(sizes, weights, "data.train")
    total, epochs = sum(sizes), 3
    steps = -(-epochs * total // window)
    stream = np.concatenate([mixture.window(window, seed, step) for step in range(steps)])
    starts = np.cumsum([0, *sizes])
    for epoch in range(epochs):
        rows = stream[epoch * total : (epoch + 1) * total]
        counts = np.histogram(rows, bins=starts)[0]
        exact = np.array(weights) / sum(weights) * total
        assert (np.abs(counts - exact) < 1).all()
    seen = Counter(stream[: epochs * total].tolist())
    for start, end in pairwise(starts):
        uses = [seen[row] for row in range(start, end)]
        assert max(uses) - min(uses) <= 1


def test_the_order_is_fixed_over_versions() -> None:
    # Written down once: a change here would reorder the data of every run that is resumed.
    mixture = Mixture.weighted(SIZES, WEIGHTS, "data.train")
    assert mixture.quotas == (30, 20, 10)
    assert mixture.window(8, 0, 0).tolist() == [12, 47, 42, 46, 30, 19, 15, 21]


def test_a_window_is_the_same_whatever_was_asked_before() -> None:
    mixture = Mixture.weighted(SIZES, WEIGHTS, "data.train")
    late = mixture.window(8, 5, 100).tolist()
    for step in range(30):
        mixture.window(8, 5, step)
    _epoch_rows.cache_clear()
    assert mixture.window(8, 5, 100).tolist() == late
    assert mixture.window(8, 6, 100).tolist() != late


def test_a_weight_that_gives_no_example_is_an_error() -> None:
    with pytest.raises(
        DataError, match=r"data\.train: source 2 would give none of the 60 examples"
    ):
        Mixture.weighted((30, 30), (1.0, 1e-4), "data.train")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[ExampleStore]:
    """Three files of one name, in three folders."""
    folder = tmp_path_factory.mktemp("sources")
    built = []
    for number, size in enumerate(SIZES):
        path = folder / str(number) / "a.jsonl"
        path.parent.mkdir()
        write_dialogues(path, size, seed=number)
        built.append(
            build_store(
                str(path), byte_tokenizer(), max_tokens=512, cache_dir=str(folder / "cache")
            )
        )
    return built


def test_several_sources_are_one_store(stores: list[ExampleStore]) -> None:
    whole = ExampleStore.joined(stores, (), "data.train")
    assert len(whole) == sum(SIZES)
    for number, start in ((0, 0), (1, 40), (2, 47)):
        own, row = stores[number][2], whole[start + 2]
        assert row["id"] == f"{number}/{own['id']}"
        assert {**row, "id": 0, "dialogue_id": 0} == {**own, "id": 0, "dialogue_id": 0}
    assert len({whole[row]["id"] for row in range(len(whole))}) == len(whole)
    alone = [store.ids([2])[0].tolist() for store in stores]
    assert [whole.ids([row])[0].tolist() for row in (2, 42, 49)] == alone
    assert ExampleStore.joined(stores[:1], (), "data.train") is stores[0]
    hashes = {
        ExampleStore.joined(parts, weights, "data.train").data_hash
        for parts, weights in (
            (stores, ()),
            (stores, WEIGHTS),
            (stores, (1, 1, 1)),
            (stores[::-1], WEIGHTS),
        )
    }
    assert len(hashes) == 4


def test_without_weights_every_example_comes_once(stores: list[ExampleStore]) -> None:
    whole = ExampleStore.joined(stores, (), "data.train")
    rows = np.concatenate([whole.window(6, 0, step) for step in range(10)])
    assert sorted(rows) == list(range(60))


def order(store: ExampleStore, world: int, start: int, steps: int, micro: int) -> list[list[int]]:
    """The rows of each step that any rank reads, fillers left out."""
    loaders = [
        TrainLoader(
            store,
            global_batch=7,
            micro=MicroSize(micro),
            world=world,
            rank=rank,
            seed=3,
            bleu_threshold=None,
            workers=0,
        ).windows(start)
        for rank in range(world)
    ]
    found = []
    for windows in islice(zip(*loaders, strict=True), steps):
        batches = [batch for window in windows for batch in window.micro]
        found.append(
            sorted(
                row
                for batch in batches
                for row, weight in zip(batch.indices, batch.weights, strict=True)
                if weight
            )
        )
    return found


def test_one_two_and_three_ranks_read_the_same_and_so_does_a_late_start(
    stores: list[ExampleStore], tmp_path: Path
) -> None:
    whole = ExampleStore.joined(stores, WEIGHTS, "data.train")
    expected = [sorted(whole.window(7, 3, step).tolist()) for step in range(20)]
    for world, micro in ((1, 3), (2, 2), (3, 4)):
        assert order(whole, world, 0, 20, micro) == expected
        _epoch_rows.cache_clear()
        assert order(whole, world, 13, 7, micro) == expected[13:]
