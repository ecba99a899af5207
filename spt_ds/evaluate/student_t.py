"""Student's t distribution for whole degrees of freedom, so that scoring needs no scipy.

Both functions rest on the same finite sum. An interval made with `quantile_95` therefore excludes 0
exactly where `two_sided_p` is below 0.05.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np


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
