"""Intervals and p-values against scipy, brute force, cases by hand and drawn tables."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks import coverage
from spt_ds.evaluate import significance, text_metrics
from spt_ds.evaluate.columns import METRICS
from spt_ds.evaluate.significance import interval, paired, standard_error
from spt_ds.evaluate.statistic import Distinct, Statistic, Sums, grouped, mean, ratio

words = st.text(alphabet="ab c.", max_size=12)
numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


def distinct(replies: list[str], n: int = 1) -> Distinct:
    grams = [text_metrics.ngrams(reply, n) for reply in replies]
    return Distinct(grams, text_metrics.dist_of_counts)


def error_of(statistic: Statistic) -> float:
    return standard_error([(statistic, 1.0)])


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 10, 99, 1000])
def test_students_t_is_scipys(degrees: int) -> None:
    assert significance.quantile_95(degrees) == pytest.approx(
        stats.t.ppf(0.975, degrees), rel=1e-12
    )
    for t in (0.0, 0.3, -1.0, 2.0, 2.5, 7.0, 50.0, math.inf):
        expected = 2 * stats.t.sf(abs(t), degrees)
        assert significance.two_sided_p(t, degrees) == pytest.approx(expected, abs=1e-13)


def test_a_paired_mean_is_scipys_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(5.0, 1.0, 60)
    for shift in (0.0, 0.1, 0.4):
        second = first + rng.normal(shift, 0.5, 60)
        expected = stats.ttest_rel(first, second)
        bounds = expected.confidence_interval(0.95)
        pair = paired(mean(first), mean(second))
        assert pair.p == pytest.approx(expected.pvalue, abs=1e-12)
        assert (pair.low, pair.high) == pytest.approx((bounds.low, bounds.high))


def test_the_interval_of_a_mean_is_that_of_its_logarithm() -> None:
    values = np.random.default_rng(1).gamma(2.0, 3.0, 80)
    error = stats.sem(values)
    assert error_of(mean(values)) == pytest.approx(error)
    factor = math.exp(stats.t.ppf(0.975, 79) * error / values.mean())
    assert interval(mean(values)) == pytest.approx((values.mean() / factor, values.mean() * factor))


def test_a_bounded_metric_has_its_interval_in_log_odds() -> None:
    values = np.random.default_rng(1).beta(8.0, 1.0, 40)
    share, error = values.mean(), stats.sem(values)
    odds = math.log(share / (1 - share))
    reach = stats.t.ppf(0.975, 39) * error / (share * (1 - share))
    expected = [100 / (1 + math.exp(-bound)) for bound in (odds - reach, odds + reach)]
    assert interval(mean(values, 100.0), most=100.0) == pytest.approx(expected)


def test_what_no_unit_has_may_still_be() -> None:
    """Scipy's one-sided bound of 0 among n; what all units have is its mirror."""
    found = stats.binomtest(0, 30, alternative="less").proportion_ci(0.95)
    low, high = interval(mean(np.zeros(30), 100.0), most=100.0)
    assert (low, high) == (0.0, pytest.approx(100 * found.high))
    assert interval(mean(np.ones(30), 100.0), most=100.0) == pytest.approx((100 - high, 100))


def test_an_entropy_of_few_units_is_moved_up() -> None:
    """The mean of the interval's middle is nearer to the truth than the mean of the values."""
    rng = np.random.default_rng(0)
    share = np.asarray([0.5, 0.25, 0.15, 0.1])
    truth = float(text_metrics.normalised_entropy(share[None])[0])
    values, middles = [], []
    for _ in range(200):
        rows = rng.multinomial(1, share, 15).astype(np.float64)
        entropy = Sums(rows, text_metrics.normalised_entropy, is_biased=True)
        values.append(entropy.value())
        middles.append(entropy.value() - 14 * (entropy.leave_one_out().mean() - entropy.value()))
        low, high = interval(entropy, 1.0)
        plain = interval(Sums(rows, text_metrics.normalised_entropy), 1.0)
        assert low >= plain[0]
        assert high >= plain[1]
    assert abs(np.mean(middles) - truth) < abs(np.mean(values) - truth) / 3


def test_the_error_of_bleu_is_that_of_scipys_bootstrap() -> None:
    rng = random.Random(4)
    vocabulary = [f"w{number}" for number in range(30)]
    references = [" ".join(rng.choices(vocabulary, k=12)) for _ in range(120)]
    replies = [
        " ".join(word if rng.random() < 0.6 else rng.choice(vocabulary) for word in text.split())
        for text in references
    ]
    bleu = Sums(text_metrics.bleu_rows(replies, references), text_metrics.bleu_of_sums)

    def score(picks: np.ndarray) -> float:
        return float(bleu.of(picks.tolist()).value())

    drawn = stats.bootstrap(
        (np.arange(120),), score, n_resamples=400, vectorized=False, rng=0, method="percentile"
    )
    assert error_of(bleu) == pytest.approx(drawn.standard_error, rel=0.12)


def test_the_p_value_of_f1_is_near_that_of_scipys_permutation_test() -> None:
    rng = np.random.default_rng(2)
    first = rng.beta(2.0, 5.0, 80)
    second = np.clip(first + rng.normal(0.015, 0.15, 80), 0.0, 1.0)
    expected = stats.permutation_test(
        (first, second),
        lambda one, other: one.mean() - other.mean(),
        permutation_type="samples",
        n_resamples=4000,
        vectorized=False,
        rng=0,
    )
    assert 0.02 < expected.pvalue < 0.5
    assert paired(mean(first), mean(second)).p == pytest.approx(expected.pvalue, abs=0.02)


@settings(max_examples=50, deadline=None)
@given(st.lists(words, min_size=2, max_size=6), st.integers(1, 2))
def test_leave_one_out_is_dist_of_the_others(replies: list[str], n: int) -> None:
    others = [replies[:unit] + replies[unit + 1 :] for unit in range(len(replies))]
    expected = [text_metrics.dist(left, n) for left in others]
    assert distinct(replies, n).leave_one_out().tolist() == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(numbers, st.randoms(use_true_random=False))
def test_leave_one_out_of_sums_is_the_metric_of_the_others(
    values: list[float], rng: random.Random
) -> None:
    below = np.asarray([rng.uniform(1.0, 2.0) for _ in values])
    statistic = ratio(np.asarray(values), below, np.tanh)
    for unit, got in enumerate(statistic.leave_one_out()):
        others = [other for other in range(len(values)) if other != unit]
        assert got == pytest.approx(statistic.of(others).value(), abs=1e-9)


def test_jackknife_by_hand() -> None:
    # DIST-1 is 50 of both, 100 and 50 of one alone: the error is sqrt(1/2 (25^2 + 25^2)) = 25.
    statistic = distinct(["a a", "a b"])
    assert error_of(statistic) == pytest.approx(25.0)
    factor = math.exp(12.706204736 * 25 / 50)
    assert interval(statistic) == pytest.approx((50 / factor, 50 * factor))


def test_shared_by_names_the_units() -> None:
    statistic = distinct(["a b", "b c", "b d", "c e"])
    assert statistic.shared_by(1).tolist() == [[0], [2], [3]]  # a, d, e
    assert statistic.shared_by(2).tolist() == [[1, 3]]  # c
    assert statistic.shared_by(3).tolist() == [[0, 1, 2]]  # b
    assert statistic.shared_by(4).tolist() == []


def test_excess_by_hand() -> None:
    """The number of distinct words of five replies, of which two pairs share 2 and 1 words."""
    replies = ["a b s t u v w", "a b y", "c z", "c x", "q"]
    count = Distinct([reply.split() for reply in replies], lambda distinct, total: distinct)
    assert (12 - count.leave_one_out()).tolist() == [5, 1, 1, 1, 1]
    plain = 4 / 5 * (3.2**2 + 4 * 0.8**2)
    assert error_of(count) == pytest.approx(math.sqrt(plain - 57 / 64 * (2**2 + 1**2)))


def test_the_excess_of_a_file_against_itself_is_nothing() -> None:
    statistic = distinct(["a b", "a c", "b c", "d", "e"])
    assert standard_error([(statistic, 1.0), (statistic, -1.0)]) == 0.0


def test_the_error_of_dist_is_the_spread_of_fresh_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain jackknife, without its correction, lies a quarter above it here."""
    rng = random.Random(5)

    def draw() -> Distinct:
        """150 replies of five words of a Zipf-like vocabulary of 200."""
        return distinct(
            [" ".join(str(int(200 ** rng.random())) for _ in range(5)) for _ in range(150)]
        )

    spread = np.std([draw().value() for _ in range(600)])
    samples = [draw() for _ in range(60)]
    assert np.mean([error_of(sample) for sample in samples]) == pytest.approx(spread, rel=0.08)
    monkeypatch.setattr(significance, "_EXCESS", {})
    assert np.mean([error_of(sample) for sample in samples]) > 1.15 * spread


def test_grouping_keeps_the_value_and_widens_the_interval_of_dependent_rows() -> None:
    values = np.repeat(
        np.random.default_rng(0).gamma(3.0, size=50), 8
    )  # eight equal turns per dialogue
    groups = np.repeat(np.arange(50), 8).tolist()
    rows, dialogues = mean(values), grouped(mean(values), groups)
    assert dialogues.value() == pytest.approx(rows.value())
    assert error_of(dialogues) / error_of(rows) == pytest.approx(math.sqrt(8), rel=0.02)
    replies = ["a b", "b c", "c"]
    assert grouped(distinct(replies), [0, 1, 0]) == Distinct(
        [["a", "b", "c"], ["b", "c"]], text_metrics.dist_of_counts
    )


@settings(max_examples=200, deadline=None)
@given(numbers, numbers)
def test_an_interval_and_its_p_value_never_contradict(one: list[float], two: list[float]) -> None:
    size = min(len(one), len(two))
    pair = paired(mean(np.asarray(one[:size])), mean(np.asarray(two[:size])))
    assert pair.low <= pair.difference <= pair.high
    if abs(pair.p - 0.05) > 1e-9:
        assert (pair.low > 0.0 or pair.high < 0.0) == (pair.p < 0.05)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=2, max_size=12), st.integers(1, 2))
def test_neither_do_those_of_dist(pairs: list[tuple[str, str]], n: int) -> None:
    ours, theirs = map(list, zip(*pairs, strict=True))
    pair = paired(distinct(ours, n), distinct(theirs, n))
    back = paired(distinct(theirs, n), distinct(ours, n))
    assert (pair.low, pair.high) == pytest.approx((-back.high, -back.low))
    if abs(pair.p - 0.05) > 1e-9:
        assert (pair.low > 0.0 or pair.high < 0.0) == (pair.p < 0.05)


def test_the_difference_that_once_contradicted_its_p_value() -> None:
    """Two systems of which one repeats itself: p was 0.006 beside an interval that held 0."""
    rng = random.Random(11)
    varied = [" ".join(rng.choice("abcdefghij") for _ in range(3)) for _ in range(8)]
    pair = paired(distinct(["a b c"] * 8), distinct(varied))
    assert (pair.high < 0.0) == (pair.p < 0.05)


def test_paired_tells_a_real_difference_from_none() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=300)
    better = paired(mean(base + 0.2 + 0.1 * rng.normal(size=300)), mean(base))
    assert better.p < 1e-10
    assert 0.0 < better.low < better.difference < better.high
    same = paired(mean(base), mean(base))
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    shifted = paired(mean(np.ones(5)), mean(np.zeros(5)))
    assert (shifted.difference, shifted.low, shifted.high, shifted.p) == (1.0, 1.0, 1.0, 0.0)
    with pytest.raises(TypeError, match="different forms"):
        paired(mean(base), distinct(["a"]))


def test_a_metric_of_zero_has_no_logarithm_and_still_an_interval() -> None:
    assert interval(mean(np.zeros(4))) == (0.0, 0.0)
    low, high = interval(mean(np.asarray([-1.0, 1.0, -2.0, 2.0])))
    assert low == -high < 0.0
    assert interval(distinct(["", "", ""])) == pytest.approx((100 / 3, 100 / 3))


@pytest.fixture(scope="module")
def population() -> coverage.Population:
    return coverage.draw_population(dialogues=1000, seed=1)


def test_intervals_cover_the_truth_of_drawn_tables(population: coverage.Population) -> None:
    """A small version of benchmarks/coverage.py: of 200 tables 190, give or take 3, hold it."""
    rows = coverage.coverage(population, dialogues=50, tables=200, seed=2)
    assert set(rows) == {metric.key for metric in METRICS}
    for key, row in rows.items():
        assert 0.9 <= row.single <= 0.995, key
        assert row.paired is None or 0.9 <= row.paired <= 0.995, key


def test_the_drawn_tables_see_a_wrong_method(
    population: coverage.Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(significance, "quantile_95", lambda degrees: 1.6)
    row = coverage.coverage(population, 50, 200, 2, ["f1_spt"])["f1_spt"]
    assert row.single < 0.93
    assert row.paired is not None
    assert row.paired < 0.93
