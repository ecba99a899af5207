"""Which examples make an optimizer step, and which rank reads which. No torch.

Pure functions of their arguments. n examples in the dataset, G in a window (one optimizer step over
all ranks), W ranks. A position in training is the step number alone: what a window holds depends on
n, G and the seed, never on W or the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from spt_ds.config.method import SUFFIX_POSITIONS
from spt_ds.config.schema import Config


class Slot(NamedTuple):
    """One row of a micro-batch."""

    position: int  # in the window (evaluation: in the dataset); -1 for a filler
    row: int  # of the dataset
    weight: float  # 1.0; 0.0 for a filler


@dataclass(frozen=True)
class MicroSize:
    """The most that a rank reads in one forward pass."""

    examples: int
    tokens: int = 0
    """Above 0 these decide; `prompts`, `virtual` and `suffix` say what an example takes of them."""
    prompts: int = 1
    virtual: int = 0
    suffix: bool = False
    """Whether a context is read once, not under each prompt."""

    @classmethod
    def of(cls, config: Config) -> MicroSize:
        """That of a run, in training and in validation."""
        settings, prompts = config.train, config.prompts
        suffix = prompts.position in SUFFIX_POSITIONS
        tokens = settings.micro_batch_tokens
        return cls(settings.micro_batch, tokens, prompts.count, prompts.tokens, suffix)

    def costs(self, context: np.ndarray, response: np.ndarray) -> np.ndarray:
        """Tokens of each example's rows, int64 [G], from those of its context and response."""
        own = self.prompts * (self.virtual + response.astype(np.int64))
        return own + context * (1 if self.suffix else self.prompts)

    def borders(self, costs: np.ndarray) -> list[int]:
        """Where micro-batches begin and end among rows of these costs, int64 [rows]."""
        count = len(costs)
        if not self.tokens:
            steps = -(-count // self.examples)
            # Micro-batches as equal as can be, instead of full ones and a small rest.
            return [count * step // steps for step in range(steps + 1)]
        found, used = [0], 0
        # Greedy and in order: rows are sorted by length, so that a pass holds rows of like length.
        for row, cost in enumerate(costs.tolist()):
            if used and used + cost > self.tokens:
                found.append(row)
                used = 0
            used += cost
        return [*found, count]


def total_steps(examples: int, global_batch: int, epochs: int) -> int:
    """Steps in which every example is read at least `epochs` times.

    The last window is filled from the next epoch.
    """
    return -(-examples * epochs // global_batch)


@lru_cache(maxsize=2)
def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of an epoch, int64 [n].

    Sorted raw Philox numbers, because NumPy promises that raw streams stay the same over its
    versions, which it does not promise of `Generator.permutation`: a resumed run must see the order
    it began with.
    """
    raw = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(examples)
    return np.argsort(raw, kind="stable")


def window_indices(examples: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """Dataset rows of window `step` (from 0), int64 [G].

    Windows are cut from the endless stream of epoch permutations, so one may hold two epochs.
    """
    start, end = step * global_batch, (step + 1) * global_batch
    parts = []
    while start < end:
        epoch, offset = divmod(start, examples)
        part = epoch_order(examples, seed, epoch)[offset : offset + end - start]
        parts.append(part)
        start += len(part)
    return np.concatenate(parts)


def assign(
    indices: np.ndarray, context: np.ndarray, response: np.ndarray, world: int, micro: MicroSize
) -> list[list[list[Slot]]]:
    """Deal a window's examples to ranks and micro-batches.

    `result[rank][micro-step]` is a list of slots, `indices` [G] dataset rows, `context` and
    `response` [G] their tokens. Every rank gets the same number of micro-batches of the same
    numbers of examples, at most as large as `micro` says. Rows are dealt longest first, in a
    snake, so that a micro-batch holds rows of like length, ranks have like token counts in every
    micro-step, and memory peaks in the first one. Where W does not divide G, up to W - 1 fillers
    (the shortest example, weight 0) complete the last row.
    """
    order = np.argsort(-(context + response).astype(np.int64), kind="stable")
    rows = [Slot(int(position), int(indices[position]), 1.0) for position in order]
    per_rank = -(-len(rows) // world)
    rows += [Slot(-1, rows[-1].row, 0.0)] * (per_rank * world - len(rows))
    costs = micro.costs(context, response)[order]
    # Ranks have as many examples in a micro-step, so that its dearest row counts for each of them.
    dearest = np.maximum.reduceat(costs, np.arange(0, len(order), world))
    borders = micro.borders(dearest)
    dealt: list[list[list[Slot]]] = [[] for _ in range(world)]
    for start, end in pairwise(borders):
        for rank in range(world):
            # A snake: even rounds deal from the first rank on, odd ones from the last.
            numbers = [
                turn * world + (world - 1 - rank if turn % 2 else rank)
                for turn in range(start, end)
            ]
            dealt[rank].append([rows[number] for number in numbers])
    return dealt
