"""How sure a score is: seeded resampling, for one file and for two files of the same examples.

What is resampled are units: the examples, or groups of them (`grouped`) such as the turns of one
dialogue, which share a persona and are no independent draws. A metric comes in one of two forms,
each with the resampling that is right for it:

* `Sums`: a function of sums over units (F1, BLEU, ROUGE, perplexity ...). Interval: percentile bootstrap.
* `Distinct`: a function of the number of distinct n-grams. Drawing units with replacement repeats them and so
  loses distinct n-grams, whatever the system: the bootstrap would give intervals that miss the
  score itself. Interval: jackknife over units.

Two files are compared on the same draws. The p-value is that of a two-sided approximate
randomisation test, which swaps the two systems' replies to a unit at random: it is right for both
forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spt_ds.evaluate.scores import Floats

Z_95 = 1.959963984540054
PERCENTILES_95 = (2.5, 97.5)
CHUNK = 64  # resamples at a time, to bound memory: CHUNK x N doubles
RELATIVE_SLACK = 1e-9  # differences that agree up to rounding count as equal


@dataclass(frozen=True)
class Sums:
    """`rows` `[N, C]` of the units; `finish` turns sums over units `[R, C]` into values `[R]`."""

    rows: Floats
    finish: Callable[[Floats], Floats]

    def value(self) -> float:
        """The metric over all units."""
        return float(self.finish(self.rows.sum(axis=0, keepdims=True))[0])


@dataclass(frozen=True)
class Distinct:
    """N-grams of each unit; `finish` turns counts (distinct, total) into values of the same shape."""

    grams: Sequence[Sequence[str]]
    finish: Callable[[Floats, Floats], Floats]

    def value(self) -> float:
        """The metric over all units."""
        flat = [gram for unit in self.grams for gram in unit]
        return float(self.finish(*_counts(len(set(flat)), len(flat))))


Measure = Sums | Distinct


@dataclass(frozen=True)
class Paired:
    """A difference (first minus second file), its 95 % interval and the two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def mean(values: Floats, scale: float = 1.0) -> Sums:
    """The mean of `values` `[N]` times `scale`."""
    return ratio(values, np.ones_like(values), lambda quotient: scale * quotient)


def ratio(above: Floats, below: Floats, finish: Callable[[Floats], Floats]) -> Sums:
    """`finish` of the sum of `above` `[N]` over the sum of `below` `[N]`."""
    return Sums(
        np.stack([above, below], axis=1).astype(np.float64),
        lambda sums: finish(sums[:, 0] / sums[:, 1]),
    )


def grouped(measure: Measure, units: Sequence[int]) -> Measure:
    """The same metric over groups: `units[i]` in 0 .. U-1 is the group of the i-th row."""
    count = max(units) + 1
    if isinstance(measure, Sums):
        rows = np.zeros((count, measure.rows.shape[1]))
        np.add.at(rows, np.asarray(units), measure.rows)
        return Sums(rows, measure.finish)
    grams: list[list[str]] = [[] for _ in range(count)]
    for unit, own in zip(units, measure.grams, strict=True):
        grams[unit].extend(own)
    return Distinct(grams, measure.finish)


def interval(measure: Measure, resamples: int, seed: int) -> tuple[float, float]:
    """Return the 95 % interval of the metric. There must be two units or more."""
    if isinstance(measure, Distinct):
        return _around(measure.value(), _leave_one_out(measure))
    draws = _draws(len(measure.rows), resamples, seed)
    return _percentiles(
        np.concatenate([measure.finish(weights @ measure.rows) for weights in draws])
    )


def paired(first: Measure, second: Measure, resamples: int, seed: int) -> Paired:
    """Compare one metric on two files of the same units in the same order, on the same draws."""
    difference = first.value() - second.value()
    if isinstance(first, Sums) and isinstance(second, Sums):
        swapped = _swap_sums(first, second, resamples, seed)
        bounds = _paired_bootstrap(first, second, resamples, seed)
    elif isinstance(first, Distinct) and isinstance(second, Distinct):
        swapped = _swap_distinct(first, second, resamples, seed)
        bounds = _around(difference, _leave_one_out(first) - _leave_one_out(second))
    else:
        raise TypeError("the two measures are of different forms")
    slack = RELATIVE_SLACK * max(abs(first.value()), abs(second.value()), 1e-300)
    as_large = int((np.abs(swapped) >= abs(difference) - slack).sum())
    return Paired(difference, *bounds, p=(as_large + 1) / (resamples + 1))


def _draws(count: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Chunks `[r, N]` of how often each unit is drawn."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        picks = random.integers(count, size=(size, count))
        yield np.stack([np.bincount(row, minlength=count) for row in picks]).astype(np.float64)


def _swaps(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Chunks `[r, N]` of which units change sides."""
    random = np.random.default_rng([seed, 1])  # another stream than the draws
    for start in range(0, resamples, CHUNK):
        yield random.random((min(CHUNK, resamples - start), count)) < 0.5


def _paired_bootstrap(first: Sums, second: Sums, resamples: int, seed: int) -> tuple[float, float]:
    values = [
        first.finish(weights @ first.rows) - second.finish(weights @ second.rows)
        for weights in _draws(len(first.rows), resamples, seed)
    ]
    return _percentiles(np.concatenate(values))


def _swap_sums(first: Sums, second: Sums, resamples: int, seed: int) -> Floats:
    gap = second.rows - first.rows
    totals = first.rows.sum(axis=0), second.rows.sum(axis=0)
    values = []
    for swap in _swaps(len(gap), resamples, seed):
        moved = swap @ gap
        values.append(first.finish(totals[0] + moved) - second.finish(totals[1] - moved))
    return np.concatenate(values)


def _swap_distinct(first: Distinct, second: Distinct, resamples: int, seed: int) -> Floats:
    known: dict[str, int] = {}
    sides = [_numbered(measure.grams, known) for measure in (first, second)]
    values = []
    for chunk in _swaps(len(first.grams), resamples, seed):
        for swap in chunk:
            counts = []
            for side in (False, True):
                kept = [
                    ids[swap[owner] == (other != side)] for other, (ids, owner) in enumerate(sides)
                ]
                seen = np.zeros(len(known), dtype=bool)
                for ids in kept:
                    seen[ids] = True
                counts.append(_counts(int(seen.sum()), sum(map(len, kept))))
            values.append(first.finish(*counts[0]) - second.finish(*counts[1]))
    return np.asarray(values, dtype=np.float64)


def _counts(distinct: int, total: int) -> tuple[Floats, Floats]:
    return np.asarray(float(distinct)), np.asarray(float(total))


def _numbered(
    grams: Sequence[Sequence[str]], known: dict[str, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number every n-gram in `known`; return the numbers `[C]` and the unit each belongs to `[C]`."""
    ids = [known.setdefault(gram, len(known)) for unit in grams for gram in unit]
    owner = np.repeat(np.arange(len(grams)), [len(unit) for unit in grams])
    return np.asarray(ids, dtype=np.int64), owner


def _leave_one_out(measure: Distinct) -> Floats:
    """The metric `[N]` over all units but one, for each one."""
    known: dict[str, int] = {}
    ids, owner = _numbered(measure.grams, known)
    units = len(measure.grams)
    pairs = np.unique(ids * units + owner)  # each n-gram once per unit that holds it
    holders = np.bincount(pairs // units, minlength=len(known))
    alone = holders[pairs // units] == 1
    lost = np.bincount((pairs % units)[alone], minlength=units)
    size = np.bincount(owner, minlength=units)
    return measure.finish(
        (len(known) - lost).astype(np.float64), (len(ids) - size).astype(np.float64)
    )


def _around(value: float, left_out: Floats) -> tuple[float, float]:
    """The normal 95 % interval around `value` with the jackknife's standard error."""
    count = len(left_out)
    error = float(np.sqrt((count - 1) / count * np.square(left_out - left_out.mean()).sum()))
    return value - Z_95 * error, value + Z_95 * error


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, PERCENTILES_95)
    return float(low), float(high)
