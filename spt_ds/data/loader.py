"""From a store to what the model reads: windows of training, batches of evaluation.

Windows are prepared ahead in worker processes. G examples in a window.
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
    """Windows of one rank, from any step on; a step's window is always the same."""

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
        """Pairs above `bleu_threshold` (0 to 100) are similar; None leaves the pairs out."""
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
        # Workers send numpy arrays, which travel by value: tensors would hold a file descriptor
        # each. Memory is pinned by `Packed`, which knows the device.
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
    """Yield this rank's batches, as many as each other rank has.

    Over all ranks every example comes once with weight 1; fillers with weight 0 complete the rest.
    """
    rows = np.arange(len(store))
    for slots in assign(rows, store.lengths.total, world, micro_batch)[rank]:
        yield _batch(store, slots)


def make_batch(store: ExampleStore, rows: Sequence[int]) -> Batch:
    """Return the given examples, in this order, as one batch."""
    return _batch(store, [Slot(row, row, 1.0) for row in rows])


class _Windows(Dataset[Window | SptError]):
    """Item s is the window of step s."""

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
            # Raised in a worker it would arrive as the text of a traceback; `windows` raises it.
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
    prompt_at = tuple(store.prompt_at[list(indices)].tolist())
    return Batch(
        context_ids, response_ids, context_lens, response_lens, indices, weights, prompt_at
    )


def _same(item: Any) -> Any:
    """Collate function: a window is already whole."""
    return item
