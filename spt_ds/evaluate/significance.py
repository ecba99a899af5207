"""How sure a score is: 95 % intervals, for one file and for the difference of two, and p-values.

All of them come from one set of resamples: the metric computed again without each unit in turn
(jackknife). They give a standard error, and Student's t with U - 1 degrees of freedom gives the
rest, so that an interval and a p-value of the same difference never contradict each other. Nothing
is drawn at random. docs/metrics.md shows how often the intervals hold the truth.

* The interval of one metric is made for its logarithm, or for the logarithm of its odds where it
  has an upper bound: small and large shares, BLEU and perplexity are skewed, these hardly.
* A mean that is 0 in all of U units has no spread, and yet it may be more: what 1 - 0.05^(1/U) of
  all units have, U units miss once in twenty times. An entropy of few units is too small: by U - 1
  times as much as it shrinks when one is left out.
* For `Distinct` the plain jackknife errs to the wide side, by 10 to 25 % here. `_excess` removes
  what it counts too often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from spt_ds.evaluate.statistic import Distinct, Statistic, Sums

METHOD = "jackknife over dialogues, Student's t"
# What the variance of a jackknife holds too much of, by the number k = 2, 3, ... of units that
# share an n-gram: P(at least k heads in 6 throws) with alternating sign.
_EXCESS = {2: 57 / 64, 3: -42 / 64, 4: 22 / 64, 5: -7 / 64, 6: 1 / 64}
_LEAST_SHARE = 1 / 4  # of the plain jackknife's variance that is always left: few units are noisy


@dataclass(frozen=True)
class Paired:
    """A difference (first minus second file), its 95 % interval and the two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def interval(statistic: Statistic, most: float = math.inf) -> tuple[float, float]:
    """Return the 95 % interval of a metric of at most `most`. There must be two units or more."""
    value = statistic.value()
    reach = quantile_95(statistic.units - 1) * standard_error([(statistic, 1.0)])
    if not 0.0 < value < most:  # there is no logarithm
        if reach == 0.0 and isinstance(statistic, Sums) and statistic.is_mean and most < math.inf:
            reach = most * (1.0 - 0.05 ** (1.0 / statistic.units))
            return (0.0, reach) if value <= 0.0 else (most - reach, most)
        return value - reach, value + reach if value > most else min(value + reach, most)
    bias = 0.0
    if isinstance(statistic, Sums) and statistic.is_biased:
        bias = (statistic.units - 1) * (float(statistic.leave_one_out().mean()) - value)
    low, high = _moved(value, most, -bias - reach), _moved(value, most, -bias + reach)
    return min(low, value), max(high, value)


def _moved(value: float, most: float, by: float) -> float:
    """Move a value as far on the scale of the logarithm of its odds as `by` is on its own scale.

    Without a bound that is the scale of its logarithm.
    """
    share = value / most
    # A factor beyond e^100 says no more than one below.
    factor = math.exp(max(-100.0, min(100.0, by / value / (1.0 - share))))
    return value / (share + (1.0 - share) / factor)


def paired(first: Statistic, second: Statistic) -> Paired:
    """Compare one metric on two files of the same units in the same order."""
    return paired_means([first], [second])


def paired_means(firsts: Sequence[Statistic], seconds: Sequence[Statistic]) -> Paired:
    """Compare the mean of a metric over some files with that over others, all of the same units."""
    if len({type(statistic) for statistic in (*firsts, *seconds)}) > 1:
        raise TypeError("the statistics are of different forms")
    terms = [(statistic, 1.0 / len(firsts)) for statistic in firsts]
    terms += [(statistic, -1.0 / len(seconds)) for statistic in seconds]
    difference = math.fsum(factor * statistic.value() for statistic, factor in terms)
    error = standard_error(terms)
    degrees = firsts[0].units - 1
    reach = quantile_95(degrees) * error
    if error > 0.0:
        p = two_sided_p(difference / error, degrees)
    else:  # the same difference in every unit
        p = 1.0 if difference == 0.0 else 0.0
    return Paired(difference, difference - reach, difference + reach, p)


def p_text(p: float) -> str:
    """A p-value as tables show it."""
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def standard_error(terms: Sequence[tuple[Statistic, float]]) -> float:
    """Return that of the sum of (statistic, factor) terms over the same units."""
    left_out = np.sum([factor * statistic.leave_one_out() for statistic, factor in terms], axis=0)
    units = len(left_out)
    variance = (units - 1) / units * float(np.square(left_out - left_out.mean()).sum())
    distinct = [(each, factor) for each, factor in terms if isinstance(each, Distinct)]
    if distinct:
        variance = max(variance - _excess(distinct), _LEAST_SHARE * variance)
    return math.sqrt(variance)


def _excess(terms: Sequence[tuple[Distinct, float]]) -> float:
    """What the jackknife's variance of distinct n-grams holds beyond the true one.

    Leaving out a unit loses the n-grams of that unit alone. Their number varies between units for
    two reasons: units differ, which belongs to the variance, and it is chance which n-grams no
    other unit repeated, which does not. The second part is estimated, without bias, from the
    n-grams that exactly k = 2, 3, ... units share: for each set of k units the square of their
    weighted number, with alternating sign (as Good and Toulmin 1956 predict new species; their
    series converges slowly, the weights make six terms of it enough).
    """
    excess = 0.0
    for k, weight in _EXCESS.items():
        if 2 * k > terms[0][0].units:  # an n-gram of most units is hardly ever absent
            break
        sets, weights = [], []
        for statistic, factor in terms:
            shared = statistic.shared_by(k)
            sets.append(shared)
            weights.append(np.full(len(shared), factor * statistic.value_of_one_more()))
        _, which = np.unique(np.concatenate(sets), axis=0, return_inverse=True)
        totals = np.bincount(which.reshape(-1), weights=np.concatenate(weights))
        excess += weight * float(np.square(totals).sum())
    return excess


# Student's t distribution for whole degrees of freedom, so that scoring needs no scipy. Both
# functions rest on the same finite sum: an interval made with `quantile_95` excludes 0 exactly
# where `two_sided_p` is below 0.05.


def two_sided_p(t: float, degrees: int) -> float:
    """Return the probability of a value at least as far from 0 as `t`."""
    return max(0.0, 1.0 - _central(abs(t), degrees))


@lru_cache
def quantile_95(degrees: int) -> float:
    """Return the bound that |t| stays below with probability 0.95."""
    low, high = 0.0, 16.0  # it is 12.71 with 1 degree of freedom and less with more
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _central(middle, degrees) >= 0.95 else (middle, high)
    return high


def _central(t: float, degrees: int) -> float:
    """P(|T| < t): Abramowitz and Stegun 1964, 26.7.3 (odd degrees of freedom) and 26.7.4 (even)."""
    if math.isinf(t):
        return 1.0
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    # A term of the sum is the one before it times cos^2 and (2j - 1) / 2j, or 2j / (2j + 1) if odd.
    steps = np.arange(1, (degrees - odd) // 2)
    factors = (2 * steps - 1 + odd) / (2 * steps + odd) * cosine**2
    total = 1.0 + float(np.cumprod(factors).sum())
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * cosine * total if degrees > 1 else 0.0))
