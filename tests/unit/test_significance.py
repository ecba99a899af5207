"""Intervals and p-values against the normal law, cases by hand and brute force."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_ds.evaluate import significance, text_metrics
from spt_ds.evaluate.statistic import Distinct, Statistic, grouped, leave_one_out, mean

words = st.text(alphabet="ab c.", max_size=12)


def test_bootstrap_interval_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(3).normal(10.0, 2.0, 400)
    low, high = significance.interval(mean(values), 2000, seed=0)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert significance.interval(mean(values), 2000, seed=0) == (low, high)
    assert significance.interval(mean(values), 2000, seed=1) != (low, high)


def _draw_replies(rng: random.Random, count: int) -> list[str]:
    """Replies of five words of a Zipf-like vocabulary of 200."""
    return [" ".join(str(int(200 ** rng.random())) for _ in range(5)) for _ in range(count)]


def _distinct(replies: list[str], n: int = 1) -> Distinct:
    return Distinct(
        [text_metrics.ngrams(reply, n) for reply in replies], text_metrics.dist_of_counts
    )


@settings(max_examples=50)
@given(st.lists(words, min_size=2, max_size=6), st.integers(1, 2))
def test_leave_one_out_is_dist_of_the_others(replies: list[str], n: int) -> None:
    others = [replies[:unit] + replies[unit + 1 :] for unit in range(len(replies))]
    expected = [text_metrics.dist(left, n) for left in others]
    assert leave_one_out(_distinct(replies, n)).tolist() == pytest.approx(expected)


def test_jackknife_interval_by_hand() -> None:
    # DIST-1 is 50 of both, 100 and 50 of one alone: the error is sqrt(1/2 (25^2 + 25^2)) = 25.
    assert significance.interval(_distinct(["a a", "a b"]), 1, seed=0) == pytest.approx(
        (50 - 1.96 * 25, 50 + 1.96 * 25), abs=1e-2
    )


def test_interval_of_dist_is_no_narrower_than_the_spread_of_fresh_samples() -> None:
    rng = random.Random(5)
    values = [text_metrics.dist(_draw_replies(rng, 150), 1) for _ in range(300)]
    widths = []
    for _ in range(40):
        low, high = significance.interval(_distinct(_draw_replies(rng, 150)), 10, seed=0)
        widths.append((high - low) / (2 * 1.96))
    # The jackknife's variance errs to the safe side (Efron and Stein 1981); here by 28 % in the
    # deviation.
    assert 0.95 < np.mean(widths) / np.std(values) < 1.5


def test_grouping_keeps_the_value_and_widens_the_interval_of_dependent_rows() -> None:
    values = np.repeat(
        np.random.default_rng(0).normal(size=50), 8
    )  # eight equal turns per dialogue
    units = np.repeat(np.arange(50), 8).tolist()
    rows, groups = mean(values), grouped(mean(values), units)
    assert groups.value() == pytest.approx(rows.value())
    width = [
        high - low for low, high in (significance.interval(one, 1000, 0) for one in (rows, groups))
    ]
    assert width[1] / width[0] == pytest.approx(math.sqrt(8), rel=0.15)
    replies = ["a b", "b c", "c"]
    assert grouped(_distinct(replies), [0, 1, 0]) == Distinct(
        [["a", "b", "c"], ["b", "c"]], text_metrics.dist_of_counts
    )


@pytest.mark.parametrize("form", ["sums", "distinct"])
def test_randomisation_p_value_is_that_of_all_swaps(form: str) -> None:
    rng = random.Random(2)
    left = [" ".join(rng.choice("abcdefgh") for _ in range(4)) for _ in range(8)]
    right = [" ".join(rng.choice("abcd") for _ in range(4)) for _ in range(8)]

    def measured(replies: list[str]) -> Statistic:
        if form == "distinct":
            return _distinct(replies)
        return mean(np.asarray([float(reply.count("a")) for reply in replies]))

    observed = measured(left).value() - measured(right).value()
    assert observed != 0.0
    extreme = 0
    for swap in itertools.product((False, True), repeat=8):
        ours = [b if moved else a for a, b, moved in zip(left, right, swap, strict=True)]
        theirs = [a if moved else b for a, b, moved in zip(left, right, swap, strict=True)]
        extreme += abs(measured(ours).value() - measured(theirs).value()) >= abs(observed) - 1e-9
    found = significance.paired(measured(left), measured(right), 4000, seed=0)
    assert found.difference == pytest.approx(observed)
    assert found.p == pytest.approx(extreme / 2**8, abs=0.03)
    assert found.low <= found.difference <= found.high


def test_paired_tells_a_real_difference_from_none() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=300)
    better = significance.paired(
        mean(base + 0.2 + 0.1 * rng.normal(size=300)), mean(base), 999, seed=0
    )
    assert better.p == pytest.approx(1 / 1000)
    assert 0.0 < better.low < better.difference < better.high
    same = significance.paired(mean(base), mean(base), 999, seed=0)
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    with pytest.raises(TypeError, match="different forms"):
        significance.paired(mean(base), _distinct(["a"]), 10, seed=0)
