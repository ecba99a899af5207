"""A corpus metric as a statistic of units, so that it can be computed again without some of them.

The units are the examples, or groups of them (`grouped`) such as the turns of one dialogue, which
share a persona and are no independent draws. A metric has one of two forms. `Sums` is a function of
sums over units: F1, BLEU, ROUGE, perplexity and others. `Distinct` is a function of how many
distinct n-grams the units hold together, which is no sum: DIST and EAD.

Shape letters: U units, C columns, R rows of sums, G n-grams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from spt_ds.evaluate.text_metrics import Floats

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sums:
    """`rows` `[U, C]` of the units; `finish` turns sums over units `[R, C]` into values `[R]`."""

    rows: Floats
    finish: Callable[[Floats], Floats]
    is_mean: bool = False
    """Whether it is the mean of a number of each turn: at the end of its scale it is so in all."""
    is_biased: bool = False
    """Whether few units shift it to one side, as they make an entropy too small."""

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.rows)

    def value(self) -> float:
        """The metric over all units."""
        return float(self.finish(self.rows.sum(axis=0, keepdims=True))[0])

    def leave_one_out(self) -> Floats:
        """The metric `[U]` over all units but one, for each one."""
        # One subtraction per unit instead of a sum over the others, because the metric is a
        # function of sums.
        return self.finish(self.rows.sum(axis=0) - self.rows)

    def of(self, units: Sequence[int]) -> Sums:
        """The same metric of these units, which may repeat."""
        return replace(self, rows=self.rows[units])


@dataclass(frozen=True)
class Distinct:
    """N-grams of each unit; `finish` turns (distinct, total) into values of the same shape.

    It must be proportional to the first of the two.
    """

    grams: Sequence[Sequence[str]]
    finish: Callable[[Floats, Floats], Floats]

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.grams)

    def value(self) -> float:
        """The metric over all units."""
        return float(self.finish(np.asarray(float(self._distinct)), np.asarray(self._total)))

    def value_of_one_more(self) -> float:
        """By how much one more distinct n-gram among as many raises the metric."""
        return float(self.finish(np.asarray(1.0), np.asarray(self._total)))

    def leave_one_out(self) -> Floats:
        """The metric `[U]` over all units but one, for each one."""
        # Without a unit, the n-grams that no other unit holds are gone.
        lost = np.bincount(self.shared_by(1)[:, 0], minlength=self.units)
        sizes = np.asarray([len(unit) for unit in self.grams])
        return self.finish(
            (self._distinct - lost).astype(np.float64), (self._total - sizes).astype(np.float64)
        )

    def shared_by(self, count: int) -> Ints:
        """For each n-gram that exactly `count` units hold, those units `[G, count]`, ascending."""
        holders, starts, counts = self._holders
        first = starts[counts == count]
        return holders[first[:, None] + np.arange(count)]

    def of(self, units: Sequence[int]) -> Distinct:
        """The same metric of these units, which may repeat."""
        return Distinct([self.grams[unit] for unit in units], self.finish)

    @cached_property
    def _holders(self) -> tuple[Ints, Ints, Ints]:
        """The units that hold each n-gram, one n-gram after another; its start there; how many."""
        known: dict[str, int] = {}
        ids = [known.setdefault(gram, len(known)) for unit in self.grams for gram in unit]
        owners = np.repeat(np.arange(self.units), [len(unit) for unit in self.grams])
        # One number for n-gram and unit: it sorts by n-gram first, and repeats in a unit go.
        pairs = np.unique(np.asarray(ids, dtype=np.int64) * self.units + owners)
        counts = np.bincount(pairs // self.units, minlength=len(known))
        return pairs % self.units, np.cumsum(counts) - counts, counts

    @property
    def _distinct(self) -> int:
        return len(self._holders[2])

    @property
    def _total(self) -> int:
        return sum(map(len, self.grams))


Statistic = Sums | Distinct


def mean(values: Floats, scale: float = 1.0) -> Sums:
    """The mean of `values` `[U]` times `scale`."""
    sums = ratio(values, np.ones_like(values), lambda quotient: scale * quotient)
    return replace(sums, is_mean=True)


def ratio(above: Floats, below: Floats, finish: Callable[[Floats], Floats]) -> Sums:
    """`finish` of the sum of `above` `[U]` over the sum of `below` `[U]`."""
    return Sums(
        np.stack([above, below], axis=1).astype(np.float64),
        lambda sums: finish(sums[:, 0] / sums[:, 1]),
    )


def grouped(statistic: Statistic, groups: Sequence[int]) -> Statistic:
    """The same metric over groups: `groups[i]` in 0 .. G-1 is the group of the i-th unit."""
    count = max(groups) + 1
    if isinstance(statistic, Sums):
        rows = np.zeros((count, statistic.rows.shape[1]))
        # Not `rows[groups] += ...`, which adds a group that comes several times only once.
        np.add.at(rows, np.asarray(groups), statistic.rows)
        return replace(statistic, rows=rows)
    grams: list[list[str]] = [[] for _ in range(count)]
    for group, own in zip(groups, statistic.grams, strict=True):
        grams[group].extend(own)
    return Distinct(grams, statistic.finish)
