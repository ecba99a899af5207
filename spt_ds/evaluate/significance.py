"""How sure a score is: seeded resampling, for one file and for two files of the same examples.

Each form of a statistic has the resampling that is right for it:

* `Sums`: percentile bootstrap over units.
* `Distinct`: jackknife over units. Drawing units with replacement repeats them and so loses
  distinct n-grams, whatever the system: the bootstrap would give intervals that miss the score.

Two files are compared on the same draws. The p-value is that of a two-sided approximate
randomisation test, which swaps the two systems' replies to a unit at random: it is right for both
forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spt_ds.evaluate.statistic import (
    Distinct,
    Statistic,
    Sums,
    as_arrays,
    leave_one_out,
    numbered,
)
from spt_ds.evaluate.text_metrics import Floats

Z_95 = 1.959963984540054
PERCENTILES_95 = (2.5, 97.5)
CHUNK = 64  # resamples at a time, to bound memory: CHUNK x U doubles
RELATIVE_SLACK = 1e-9  # differences that agree up to rounding count as equal


@dataclass(frozen=True)
class Paired:
    """A difference (first minus second file), its 95 % interval and the two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def interval(statistic: Statistic, resamples: int, seed: int) -> tuple[float, float]:
    """Return the 95 % interval of the metric. There must be two units or more."""
    if isinstance(statistic, Distinct):
        return _around(statistic.value(), leave_one_out(statistic))
    draws = _draws(statistic.units, resamples, seed)
    return _percentiles(
        np.concatenate([statistic.finish(weights @ statistic.rows) for weights in draws])
    )


def paired(first: Statistic, second: Statistic, resamples: int, seed: int) -> Paired:
    """Compare one metric on two files of the same units in the same order, on the same draws."""
    difference = first.value() - second.value()
    if isinstance(first, Sums) and isinstance(second, Sums):
        swapped = _swap_sums(first, second, resamples, seed)
        bounds = _paired_bootstrap(first, second, resamples, seed)
    elif isinstance(first, Distinct) and isinstance(second, Distinct):
        swapped = _swap_distinct(first, second, resamples, seed)
        bounds = _around(difference, leave_one_out(first) - leave_one_out(second))
    else:
        raise TypeError("the two statistics are of different forms")
    slack = RELATIVE_SLACK * max(abs(first.value()), abs(second.value()), 1e-300)
    as_large = int((np.abs(swapped) >= abs(difference) - slack).sum())
    return Paired(difference, *bounds, p=(as_large + 1) / (resamples + 1))


def _draws(count: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Chunks `[r, U]` of how often each unit is drawn."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        picks = random.integers(count, size=(size, count))
        yield np.stack([np.bincount(row, minlength=count) for row in picks]).astype(np.float64)


def _swaps(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Chunks `[r, U]` of which units change sides."""
    random = np.random.default_rng([seed, 1])  # another stream than the draws
    for start in range(0, resamples, CHUNK):
        yield random.random((min(CHUNK, resamples - start), count)) < 0.5


def _paired_bootstrap(first: Sums, second: Sums, resamples: int, seed: int) -> tuple[float, float]:
    values = [
        first.finish(weights @ first.rows) - second.finish(weights @ second.rows)
        for weights in _draws(first.units, resamples, seed)
    ]
    return _percentiles(np.concatenate(values))


def _swap_sums(first: Sums, second: Sums, resamples: int, seed: int) -> Floats:
    gap = second.rows - first.rows
    totals = first.rows.sum(axis=0), second.rows.sum(axis=0)
    values = []
    for swap in _swaps(first.units, resamples, seed):
        moved = swap @ gap
        values.append(first.finish(totals[0] + moved) - second.finish(totals[1] - moved))
    return np.concatenate(values)


def _swap_distinct(first: Distinct, second: Distinct, resamples: int, seed: int) -> Floats:
    known: dict[str, int] = {}
    sides = [numbered(statistic.grams, known) for statistic in (first, second)]
    values = []
    for chunk in _swaps(first.units, resamples, seed):
        for swap in chunk:
            counts = []
            for side in (False, True):
                kept = [
                    ids[swap[owner] == (other != side)] for other, (ids, owner) in enumerate(sides)
                ]
                seen = np.zeros(len(known), dtype=bool)
                for ids in kept:
                    seen[ids] = True
                counts.append(as_arrays(int(seen.sum()), sum(map(len, kept))))
            values.append(first.finish(*counts[0]) - second.finish(*counts[1]))
    return np.asarray(values, dtype=np.float64)


def _around(value: float, left_out: Floats) -> tuple[float, float]:
    """The normal 95 % interval around `value` with the jackknife's standard error."""
    count = len(left_out)
    error = float(np.sqrt((count - 1) / count * np.square(left_out - left_out.mean()).sum()))
    return value - Z_95 * error, value + Z_95 * error


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, PERCENTILES_95)
    return float(low), float(high)
