"""The order of training examples that come from several weighted sources. No torch.

Pure functions of their arguments, as those of `sampler`: what a window holds depends on the
sources, their weights, the seed and the step alone. An epoch has as many examples as the sources
have together. Each source gives its share of them, and continues in the next epoch where it
stopped: its own examples come equally often, whatever its weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from spt_ds.data.sampler import epoch_order, window_indices
from spt_ds.errors import DataError


@dataclass(frozen=True)
class Mixture:
    """Sources whose rows lie end to end."""

    sizes: tuple[int, ...]  # examples of each
    quotas: tuple[int, ...]  # examples of each in an epoch

    @classmethod
    def weighted(cls, sizes: Sequence[int], weights: Sequence[float], name: str) -> Mixture:
        """Shares of an epoch by weight; DataError (about `name`) where a source gets no example."""
        total = sum(sizes)
        exact = np.array(weights, dtype=np.float64) / sum(weights) * total
        quotas = np.floor(exact).astype(np.int64)
        # The largest remainders get what rounding down has left.
        left = total - int(quotas.sum())
        quotas[np.argsort(quotas - exact, kind="stable")[:left]] += 1
        if not quotas.all():
            raise DataError(
                f"{name}: source {int(quotas.argmin()) + 1} would give none of the {total} examples"
                f" of an epoch by its weight {weights[int(quotas.argmin())]:g}; give it more"
            )
        return cls(tuple(sizes), tuple(quotas.tolist()))

    def window(self, global_batch: int, seed: int, step: int) -> np.ndarray:
        """Rows of window `step` (from 0), int64 [G]."""
        places = np.arange(step * global_batch, (step + 1) * global_batch)
        epochs, offsets = np.divmod(places, sum(self.sizes))
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = _epoch_rows(self, seed, int(epoch))[offsets[here]]
        return rows


@lru_cache(maxsize=2)
def _epoch_rows(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch in their order, int64 [n]."""
    starts = np.cumsum([0, *mixture.sizes])
    pool = [
        # A source is an endless stream of permutations, of which an epoch takes one window.
        starts[number] + window_indices(size, quota, _seed(seed, number), epoch)
        for number, (size, quota) in enumerate(zip(mixture.sizes, mixture.quotas, strict=True))
    ]
    return np.concatenate(pool)[epoch_order(sum(mixture.quotas), seed, epoch)]


def _seed(seed: int, number: int) -> int:
    """A 63-bit seed for the order within a source."""
    text = f"{seed}:source:{number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
