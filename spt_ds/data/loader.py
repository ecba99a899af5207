"""From a store to what the model reads: training windows prepared ahead in worker processes,
evaluation batches.

G examples in a window. Workers send numpy arrays, which travel by value: tensors would hold a file
descriptor each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from spt_ds.batch import Batch, Contrast, Window
from spt_ds.data.pairs import contrast_pairs, pair_text
from spt_ds.data.sampler import Slot, assign, window_indices
from spt_ds.data.store import ExampleStore
from spt_ds.errors import SptError
from spt_ds.log import say_once

_PREFETCH = 2  # windows that each worker prepares ahead


class TrainLoader:
    """Windows of one rank, from any step on; the same window for a step whenever and wherever it is
    asked for.
    """

    def __init__(
        self,
        store: ExampleStore,
        *,
        global_batch: int,
        micro_batch: int,
        world: int,
        rank: int,
        seed: int,
        bleu_threshold: float | None,
        workers: int,
    ) -> None:
        """`bleu_threshold` (0 to 100) parts similar from other pairs; None leaves the contrastive
        targets out.
        """
        if bleu_threshold is not None and global_batch < 2:
            say_once(
                "the contrastive loss is 0: train.global_batch is 1, and a pair needs two examples"
            )
            bleu_threshold = None
        self._windows = _Windows(
            store, global_batch, micro_batch, world, rank, seed, bleu_threshold
        )
        self._workers = workers

    def windows(self, start_step: int) -> Iterator[Window]:
        """Yield the windows of steps `start_step`, `start_step` + 1, ... without end."""
        loader = DataLoader(
            self._windows,
            batch_size=None,
            sampler=count(start_step),
            num_workers=self._workers,
            prefetch_factor=_PREFETCH if self._workers else None,
            collate_fn=_same,
        )
        for window in loader:
            if isinstance(window, SptError):
                raise window
            yield window


def eval_batches(store: ExampleStore, micro_batch: int, world: int, rank: int) -> Iterator[Batch]:
    """Yield this rank's batches: over all ranks every example once with weight 1; the same number
    on every rank.
    """
    rows = np.arange(len(store))
    for slots in assign(rows, store.lengths.total, world, micro_batch)[rank]:
        yield _batch(store, slots)


def make_batch(store: ExampleStore, rows: Sequence[int]) -> Batch:
    """Return the given examples, in this order, as one batch."""
    return _batch(store, [Slot(row, row, 1.0) for row in rows])


class _Windows(Dataset[Window | SptError]):
    """Item s is the window of step s; a fault of the data is returned, so that its text survives
    the worker.
    """

    def __init__(
        self,
        store: ExampleStore,
        global_batch: int,
        micro_batch: int,
        world: int,
        rank: int,
        seed: int,
        bleu_threshold: float | None,
    ) -> None:
        self._store = store
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._world = world
        self._rank = rank
        self._seed = seed
        self._bleu_threshold = bleu_threshold

    def __getitem__(self, step: int) -> Window | SptError:
        try:
            return self._prepare(step)
        except SptError as error:
            return error

    def _prepare(self, step: int) -> Window:
        store = self._store
        indices = window_indices(len(store), self._global_batch, self._seed, step)
        dealt = assign(indices, store.lengths.total[indices], self._world, self._micro_batch)
        contrast = None
        if self._bleu_threshold is not None:
            owner = _owners(dealt, len(indices))
            contrast = self._contrast(indices.tolist(), owner, self._bleu_threshold)
        micro = tuple(_batch(store, slots) for slots in dealt[self._rank])
        target_tokens = int(store.lengths.response[indices].sum())
        return Window(micro, len(indices), target_tokens, contrast)

    def _contrast(
        self, indices: list[int], owner: tuple[tuple[int, int], ...], bleu_threshold: float
    ) -> Contrast:
        texts = [pair_text(persona, history) for persona, history in self._store.texts(indices)]
        local = [rank == self._rank for rank, _ in owner]
        pairs, targets = contrast_pairs(texts, local, bleu_threshold)
        return Contrast(owner, pairs, targets, pair_count=len(owner) * (len(owner) - 1) // 2)


def _owners(dealt: list[list[list[Slot]]], examples: int) -> tuple[tuple[int, int], ...]:
    """(rank, slot) of each window position."""
    owner = [(-1, -1)] * examples
    for rank, micro in enumerate(dealt):
        for number, slot in enumerate(slot for slots in micro for slot in slots):
            if slot.position >= 0:
                owner[slot.position] = (rank, number)
    return tuple(owner)


def _batch(store: ExampleStore, slots: list[Slot]) -> Batch:
    indices = tuple(slot.row for slot in slots)
    context_ids, response_ids = store.ids(indices)
    context_lens, response_lens = (
        tuple(lengths[list(indices)].tolist()) for lengths in store.lengths
    )
    weights = tuple(slot.weight for slot in slots)
    return Batch(context_ids, response_ids, context_lens, response_lens, indices, weights)


def _same(item: Any) -> Any:
    """Collate function: a window is already whole."""
    return item
