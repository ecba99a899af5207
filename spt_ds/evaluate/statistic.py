"""A corpus metric as a statistic of units, so that it can be computed again for other units.

The units are the examples, or groups of them (`grouped`) such as the turns of one dialogue, which
share a persona and are no independent draws. A metric has one of two forms. `Sums` is a function of
sums over units: F1, BLEU, ROUGE, perplexity and others. `Distinct` is a function of how many
distinct n-grams the units hold together, which is no sum: DIST and EAD.

Shape letters: U units, C columns, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spt_ds.evaluate.text_metrics import Floats


@dataclass(frozen=True)
class Sums:
    """`rows` `[U, C]` of the units; `finish` turns sums over units `[R, C]` into values `[R]`."""

    rows: Floats
    finish: Callable[[Floats], Floats]

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.rows)

    def value(self) -> float:
        """The metric over all units."""
        return float(self.finish(self.rows.sum(axis=0, keepdims=True))[0])


@dataclass(frozen=True)
class Distinct:
    """N-grams of each unit; `finish` turns (distinct, total) into values of the same shape."""

    grams: Sequence[Sequence[str]]
    finish: Callable[[Floats, Floats], Floats]

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.grams)

    def value(self) -> float:
        """The metric over all units."""
        flat = [gram for unit in self.grams for gram in unit]
        return float(self.finish(*as_arrays(len(set(flat)), len(flat))))


Statistic = Sums | Distinct


def mean(values: Floats, scale: float = 1.0) -> Sums:
    """The mean of `values` `[U]` times `scale`."""
    return ratio(values, np.ones_like(values), lambda quotient: scale * quotient)


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
        np.add.at(rows, np.asarray(groups), statistic.rows)
        return Sums(rows, statistic.finish)
    grams: list[list[str]] = [[] for _ in range(count)]
    for group, own in zip(groups, statistic.grams, strict=True):
        grams[group].extend(own)
    return Distinct(grams, statistic.finish)


def as_arrays(distinct: int, total: int) -> tuple[Floats, Floats]:
    """Two counts as arrays without dimensions, which `Distinct.finish` takes."""
    return np.asarray(float(distinct)), np.asarray(float(total))


def numbered(
    grams: Sequence[Sequence[str]], known: dict[str, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number every n-gram in `known`.

    Return the numbers `[C]` of all n-grams, repeats included, and the unit of each `[C]`.
    """
    ids = [known.setdefault(gram, len(known)) for unit in grams for gram in unit]
    owner = np.repeat(np.arange(len(grams)), [len(unit) for unit in grams])
    return np.asarray(ids, dtype=np.int64), owner


def leave_one_out(statistic: Distinct) -> Floats:
    """The metric `[U]` over all units but one, for each one."""
    known: dict[str, int] = {}
    ids, owner = numbered(statistic.grams, known)
    pairs = np.unique(ids * statistic.units + owner)  # each n-gram once per unit that holds it
    holders = np.bincount(pairs // statistic.units, minlength=len(known))
    # Without a unit, the n-grams that no other unit holds are gone.
    alone = holders[pairs // statistic.units] == 1
    lost = np.bincount((pairs % statistic.units)[alone], minlength=statistic.units)
    size = np.bincount(owner, minlength=statistic.units)
    return statistic.finish(
        (len(known) - lost).astype(np.float64), (len(ids) - size).astype(np.float64)
    )
