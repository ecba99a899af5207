"""From a store to what the model reads: training windows prepared ahead in worker processes,
evaluation batches.

G examples in a window. Workers send numpy arrays, which travel by value: tensors would hold a file
descriptor each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
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
        """Yield the windows of steps `start_step`, `start_step` + 1, ... without end, in pinned
        memory under CUDA.
        """
        loader = DataLoader(
            self._windows,
            batch_size=None,
            sampler=count(start_step),
            num_workers=self._workers,
            prefetch_factor=_PREFETCH if self._workers else None,
            collate_fn=_same,
        )
        pin = torch.cuda.is_available()
        for item in loader:
            if isinstance(item, SptError):
                raise item
            yield _window(item, pin)


def eval_batches(store: ExampleStore, micro_batch: int, world: int, rank: int) -> Iterator[Batch]:
    """Yield this rank's batches: over all ranks every example once with weight 1; the same number
    on every rank.
    """
    pin = torch.cuda.is_available()
    rows = np.arange(len(store))
    for slots in assign(rows, store.lengths.total, world, micro_batch)[rank]:
        yield _batch(_rows(store, slots), pin)


def make_batch(store: ExampleStore, rows: Sequence[int]) -> Batch:
    """The given examples, in this order, as one batch on the CPU."""
    return _batch(_rows(store, [Slot(row, row, 1.0) for row in rows]), pin=False)


class _Rows(NamedTuple):
    """A `Batch` before its arrays become tensors."""

    context_ids: np.ndarray
    response_ids: np.ndarray
    context_lens: tuple[int, ...]
    response_lens: tuple[int, ...]
    indices: tuple[int, ...]
    weights: tuple[float, ...]


class _Prepared(NamedTuple):
    """A `Window` before its arrays become tensors; pairs and targets are None without contrast."""

    micro: tuple[_Rows, ...]
    target_tokens: int
    owner: tuple[tuple[int, int], ...]
    pairs: np.ndarray | None
    targets: np.ndarray | None


class _Windows(Dataset[_Prepared | SptError]):
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

    def __getitem__(self, step: int) -> _Prepared | SptError:
        try:
            return self._prepare(step)
        except SptError as error:
            return error

    def _prepare(self, step: int) -> _Prepared:
        store = self._store
        indices = window_indices(len(store), self._global_batch, self._seed, step)
        dealt = assign(indices, store.lengths.total[indices], self._world, self._micro_batch)
        owner = _owners(dealt, len(indices))
        pairs = targets = None
        if self._bleu_threshold is not None:
            texts = [
                pair_text(persona, history) for persona, history in store.texts(indices.tolist())
            ]
            local = [rank == self._rank for rank, _ in owner]
            pairs, targets = contrast_pairs(texts, local, self._bleu_threshold)
        micro = tuple(_rows(store, slots) for slots in dealt[self._rank])
        return _Prepared(micro, int(store.lengths.response[indices].sum()), owner, pairs, targets)


def _owners(dealt: list[list[list[Slot]]], examples: int) -> tuple[tuple[int, int], ...]:
    """(rank, slot) of each window position."""
    owner = [(-1, -1)] * examples
    for rank, micro in enumerate(dealt):
        for place, slot in enumerate(slot for slots in micro for slot in slots):
            if slot.position >= 0:
                owner[slot.position] = (rank, place)
    return tuple(owner)


def _rows(store: ExampleStore, slots: list[Slot]) -> _Rows:
    indices = tuple(slot.row for slot in slots)
    context_ids, response_ids = store.ids(indices)
    context_lens, response_lens = (
        tuple(lengths[list(indices)].tolist()) for lengths in store.lengths
    )
    weights = tuple(slot.weight for slot in slots)
    return _Rows(context_ids, response_ids, context_lens, response_lens, indices, weights)


def _batch(rows: _Rows, pin: bool) -> Batch:
    return Batch(_tensor(rows.context_ids, pin), _tensor(rows.response_ids, pin), *rows[2:])


def _window(item: _Prepared, pin: bool) -> Window:
    contrast = None
    examples = len(item.owner)
    if item.pairs is not None and item.targets is not None:
        pairs, targets = _tensor(item.pairs, pin), _tensor(item.targets, pin)
        contrast = Contrast(item.owner, pairs, targets, pair_count=examples * (examples - 1) // 2)
    micro = tuple(_batch(rows, pin) for rows in item.micro)
    return Window(micro, examples, item.target_tokens, sum(map(len, micro)), contrast)


def _tensor(array: np.ndarray, pin: bool) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if pin else tensor


def _same(item: Any) -> Any:
    """Collate function: a window is already whole."""
    return item
