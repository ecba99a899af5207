"""From a store to what the model reads: windows of training, batches of evaluation.

Windows are prepared ahead in worker processes. G examples in a window.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from types import MappingProxyType
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from spt_ds.batch import Batch, Contrast, Window
from spt_ds.config.data import PersonaDropoutConfig
from spt_ds.data.encode import Encoded, Encoder
from spt_ds.data.pairs import contrast_pairs, pair_text
from spt_ds.data.sampler import MicroSize, Slot, assign
from spt_ds.data.store import ExampleStore
from spt_ds.errors import SptError
from spt_ds.log import say_once
from spt_ds.rng import keyed_seed

_PREFETCH = 2  # windows that each worker prepares ahead


class TrainLoader:
    """Windows of one rank, from any step on; a step's window is always the same."""

    def __init__(
        self,
        store: ExampleStore,
        *,
        global_batch: int,
        micro: MicroSize,
        world: int,
        rank: int,
        seed: int,
        bleu_threshold: float | None,
        workers: int,
        dropout: PersonaDropout | None = None,
    ) -> None:
        """Pairs above `bleu_threshold` (0 to 100) are similar; None leaves the pairs out."""
        if bleu_threshold is not None and global_batch < 2:
            say_once(
                "the contrastive loss is 0: train.global_batch is 1, and a pair needs two examples"
            )
            bleu_threshold = None
        self._windows = _Windows(
            store, global_batch, micro, world, rank, seed, bleu_threshold, dropout
        )
        self._workers = workers

    def windows(self, start_step: int) -> Iterator[Window]:
        """Yield the windows of steps `start_step`, `start_step` + 1, ... without end."""
        # Workers send numpy arrays, which travel by value: tensors would hold a file descriptor
        # each. Memory is pinned by `Packed`, which knows the device.
        loader = DataLoader(
            self._windows,
            batch_size=None,
            # A window follows from its step: a run that resumes begins at its step and reads
            # nothing before it.
            sampler=count(start_step),
            num_workers=self._workers,
            prefetch_factor=_PREFETCH if self._workers else None,
            # Without it the loader would turn the arrays into tensors.
            collate_fn=_same,
        )
        for window in loader:
            if isinstance(window, SptError):
                raise window
            yield window


def eval_batches(store: ExampleStore, micro: MicroSize, world: int, rank: int) -> Iterator[Batch]:
    """Yield this rank's batches, as many as each other rank has.

    Over all ranks every example comes once with weight 1; fillers with weight 0 complete the rest.
    """
    rows = np.arange(len(store))
    for slots in assign(rows, *store.lengths, world, micro)[rank]:
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
        micro: MicroSize,
        world: int,
        rank: int,
        seed: int,
        bleu_threshold: float | None,
        dropout: PersonaDropout | None,
    ) -> None:
        self._store = store
        self._dropout = dropout
        self._global_batch = global_batch
        self._micro = micro
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
        indices = store.window(self._global_batch, self._seed, step)
        # Every rank works out what is hidden in the whole window: the lengths decide who reads
        # what, and the counts are those of all ranks.
        changed = self._dropout.hidden(store, indices.tolist(), step) if self._dropout else {}
        context, response = (lengths[indices].astype(np.int64) for lengths in store.lengths)
        for place, row in enumerate(indices.tolist()):
            if row in changed:
                context[place] = len(changed[row].context_ids)
                response[place] = len(changed[row].response_ids)
        dealt = assign(indices, context, response, self._world, self._micro)
        contrast = None
        if self._bleu_threshold is not None:
            owner = _owners(dealt, len(indices))
            contrast = self._contrast(indices.tolist(), owner, self._bleu_threshold, changed)
        micro = tuple(_batch(store, slots, changed) for slots in dealt[self._rank])
        return Window(micro, len(indices), int(response.sum()), contrast)

    def _contrast(
        self,
        indices: list[int],
        owner: tuple[tuple[int, int], ...],
        bleu_threshold: float,
        changed: Mapping[int, Encoded],
    ) -> Contrast:
        texts = [
            pair_text(changed[row].persona if row in changed else persona, history)
            for row, (persona, history) in zip(indices, self._store.texts(indices), strict=True)
        ]
        local = [rank == self._rank for rank, _ in owner]
        pairs, targets = contrast_pairs(texts, local, bleu_threshold)
        return Contrast(owner, pairs, targets, pair_count=len(owner) * (len(owner) - 1) // 2)


class PersonaDropout:
    """Encodes examples with a part of their persona.

    What is hidden follows from the seed, the step and the example alone, so it is the same on any
    number of ranks and in a run that resumes.
    """

    def __init__(self, encoder: Encoder, shares: PersonaDropoutConfig, seed: int) -> None:
        self._encoder = encoder
        self._shares = shares
        self._seed = seed

    def hidden(self, store: ExampleStore, rows: Sequence[int], step: int) -> dict[int, Encoded]:
        """The examples of a window that lose something, by row."""
        changed = {}
        for row in rows:
            draw = random.Random(keyed_seed(self._seed, "persona dropout", step, row))
            example = store.example(row)
            kept = self._kept(example.persona, draw)
            if kept != example.persona:
                changed[row] = self._encoder.example(replace(example, persona=kept))
        return changed

    def _kept(self, persona: tuple[str, ...], draw: random.Random) -> tuple[str, ...]:
        if draw.random() < self._shares.whole:
            return ()
        return tuple(text for text in persona if draw.random() >= self._shares.sentences)


def _owners(dealt: list[list[list[Slot]]], examples: int) -> tuple[tuple[int, int], ...]:
    """(rank, slot) of each window position."""
    owner = [(-1, -1)] * examples
    for rank, micro in enumerate(dealt):
        for number, slot in enumerate(slot for slots in micro for slot in slots):
            if slot.position >= 0:
                owner[slot.position] = (rank, number)
    return tuple(owner)


def _batch(
    store: ExampleStore, slots: list[Slot], changed: Mapping[int, Encoded] = MappingProxyType({})
) -> Batch:
    """The examples of `slots`; `changed` has the rows that are not read as the store has them."""
    indices = tuple(slot.row for slot in slots)
    weights = tuple(slot.weight for slot in slots)
    if changed:
        rows = [changed.get(row) or store.encoded(row) for row in indices]
        return Batch(
            np.concatenate([row.context_ids for row in rows]).astype(np.int64),
            np.concatenate([row.response_ids for row in rows]).astype(np.int64),
            tuple(len(row.context_ids) for row in rows),
            tuple(len(row.response_ids) for row in rows),
            indices,
            weights,
            tuple(row.prompt_at for row in rows),
        )
    context_ids, response_ids = store.ids(indices)
    context_lens, response_lens = (
        tuple(lengths[list(indices)].tolist()) for lengths in store.lengths
    )
    prompt_at = tuple(store.prompt_at[list(indices)].tolist())
    return Batch(
        context_ids, response_ids, context_lens, response_lens, indices, weights, prompt_at
    )


def _same(item: Any) -> Any:
    """Collate function: a window is already whole."""
    return item
