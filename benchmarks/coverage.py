"""How often the 95 % intervals of `spt-ds evaluate` hold the truth, for every metric.

    python benchmarks/coverage.py [--dialogues 10,20,50,200,500] [--tables 10000]

Draws a population of dialogues that two systems answer, and from it many test sets (tables) of a
few dialogues each. For each table it makes the intervals of the first system's scores and of the
difference of both. The truth is the metric over the whole population. DIST and EAD depend on the
size of the test set: there the truth is the mean over all tables of that size, and a table holds no
dialogue twice, whose n-grams would be distinct no more. BERTScore has no drawn text: its rows are
drawn numbers, of which it is the mean. Limit: 94 to 96 %, from 50 dialogues on. The last line is
one JSON object, the exit code is 1 when a metric lies outside the limit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spt_ds.evaluate.columns import METRIC_OF, METRICS
from spt_ds.evaluate.corpus_metrics import corpus_metrics
from spt_ds.evaluate.label_metrics import accuracy, errors, f1_macro
from spt_ds.evaluate.significance import interval, paired
from spt_ds.evaluate.statistic import Statistic, Sums, grouped, mean
from spt_ds.run.predictions import Prediction, PredictionFile

LIMIT, LIMIT_FROM = (0.94, 0.96), 50
VOCABULARY, PROMPTS, TOPIC_WORDS = 4000, 4, 12
FREQUENT = ("the", "I", "a", "you")  # words that metrics treat in their own ways
ALONE = {"prompt_entropy"}  # is not compared: banks of two sizes have no common table of counts


@dataclass(frozen=True)
class Coverage:
    """Shares of tables whose interval holds the truth."""

    single: float
    paired: float | None
    """Of the difference of the two systems; None where it is not compared."""


Population = list[dict[str, Statistic]]


def draw_population(dialogues: int, seed: int) -> Population:
    """The metrics, by key, of two systems that answered the same dialogues."""
    out = []
    for system in range(2):
        rows = list(_answers(dialogues, seed, system))
        file = PredictionFile(Path(f"system-{system}"), "", tuple(rows))
        statistics = dict(corpus_metrics(file).statistics)
        random = np.random.default_rng([seed, system, 1])
        level = np.random.default_rng([seed, 2]).normal(55.0, 6.0, dialogues)[file.units]
        for key in ("bert_f1", "bert_p", "bert_r"):
            rows_of_key = mean(level + random.normal(0.0, 8.0, len(rows)))
            statistics[key] = grouped(rows_of_key, file.units)
        for key, statistic in _of_labels(file.units, seed, system).items():
            statistics[key] = grouped(statistic, file.units)
        out.append(statistics)
    return out


def _of_labels(units: Sequence[int], seed: int, system: int) -> dict[str, Statistic]:
    """Grades from 1 to 5, some rarer than others, that a system gets right or misses by a few."""
    shared, random = np.random.default_rng([seed, 5]), np.random.default_rng([seed, 6, system])
    golds = shared.choice(5, len(units), p=[0.1, 0.1, 0.2, 0.25, 0.35]) + 1
    ease = shared.normal(0.0, 0.5, max(units) + 1)[list(units)]
    noise = random.normal(ease, 1.0 + 0.1 * system)
    answers = np.clip(np.rint(golds + noise), 1, 5).astype(int)
    told, given = [str(gold) for gold in golds], [str(answer) for answer in answers]
    return {
        "accuracy": accuracy(told, given),
        "f1_macro": f1_macro(told, given, list("12345")),
        **errors(told, given),
    }


def _answers(dialogues: int, seed: int, system: int) -> Iterator[Prediction]:
    """Replies that copy part of their reference, more in easy dialogues than in hard ones.

    Words follow Zipf's law, and each dialogue has words of its own.
    """
    frequency = 1.0 / np.arange(1, VOCABULARY + 1) ** 1.05
    reach = np.cumsum(frequency / frequency.sum())

    def words(random: np.random.Generator, count: int, topic: np.ndarray) -> np.ndarray:
        common = np.searchsorted(reach, random.random(count))
        own = topic[random.integers(len(topic), size=count)]
        return np.where(random.random(count) < 0.3, own, common)

    shared = np.random.default_rng([seed, 3])  # both systems meet the same dialogues
    random = np.random.default_rng([seed, 4, system])
    index = 0
    for dialogue in range(dialogues):
        topic = np.searchsorted(reach, shared.random(TOPIC_WORDS)) * 7 % VOCABULARY
        ease = float(np.clip(shared.normal(0.3, 0.15), 0.02, 0.9))
        silent = 0.15 if shared.random() < 0.15 else 0.03
        usage = random.dirichlet([0.6, 0.3, 0.2, 0.1])
        for _ in range(shared.integers(2, 8)):
            length = max(2, int(shared.poisson(10)))
            reference = words(shared, length, topic)
            count = 0 if random.random() < silent else max(1, int(random.poisson(9 - system)))
            copied = reference[(random.integers(length) + np.arange(count)) % length]
            skill = float(np.clip(ease + random.normal(0.02 * system, 0.08), 0.01, 0.95))
            reply = np.where(random.random(count) < skill, copied, words(random, count, topic))
            yield Prediction(
                index=index,
                id=str(index),
                dialogue_id=str(dialogue),
                reference=_text(reference, " ."),
                raw=_text(reply, "!"),
                choices=(),
                prompt=int(random.choice(PROMPTS, p=usage)),
                scores=(0.0,) * PROMPTS,
                nll_sum=float(random.gamma(2.0, 1.3) * (0.6 + ease) * length),
                nll_tokens=length + 1,
                new_tokens=None,
                context_tokens=None,
            )
            index += 1


def _text(words: np.ndarray, end: str) -> str:
    """With articles, capitals and punctuation, on which F1, F1-ParlAI, ROUGE and BLEU differ."""
    told = [FREQUENT[word] if word < len(FREQUENT) else f"w{word}" for word in words.tolist()]
    return " ".join(told) + (end if told else "")


def coverage(
    population: Population, dialogues: int, tables: int, seed: int, keys: Sequence[str] = ()
) -> dict[str, Coverage]:
    """Draw `tables` test sets of so many dialogues; return the shares by metric."""
    ours, theirs = population
    keys = keys or [metric.key for metric in METRICS if metric.key in ours]
    out = {}
    for key in keys:
        random = np.random.default_rng([seed, dialogues])  # the same tables for every metric
        singles, pairs = [], []
        for _ in range(tables):
            again = isinstance(ours[key], Sums)
            picks = random.choice(ours[key].units, dialogues, replace=again).tolist()
            one, other = ours[key].of(picks), theirs[key].of(picks)
            singles.append((one.value(), *interval(one, METRIC_OF[key].most)))
            if key not in ALONE:
                pair = paired(one, other)
                pairs.append((pair.difference, pair.low, pair.high))
        by_size = key.startswith(("dist", "ead"))
        truth = None if by_size else ours[key].value()
        gap = None if by_size else ours[key].value() - theirs[key].value()
        out[key] = Coverage(_held(singles, truth), _held(pairs, gap) if pairs else None)
    return out


def _held(rows: Sequence[tuple[float, float, float]], truth: float | None) -> float:
    values, low, high = np.asarray(rows).T
    target = values.mean() if truth is None else truth
    return float(np.mean((low <= target) & (target <= high)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dialogues", default="10,20,50,200,500", help="comma-separated")
    parser.add_argument("--tables", type=int, default=10000)
    parser.add_argument("--metrics", nargs="*", default=(), help="keys; default all")
    parser.add_argument("--population", type=int, default=16000, help="dialogues")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    population = draw_population(args.population, args.seed)
    sizes = [int(size) for size in args.dialogues.split(",")]
    results = {}
    for size in sizes:
        results[size] = coverage(population, size, args.tables, args.seed, args.metrics)
        print(f"{size} dialogues: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print("| metric | " + " | ".join(f"{size}: score | difference" for size in sizes) + " |")
    print("|---|" + "---:|" * 2 * len(sizes))
    for metric in METRICS:
        if metric.key not in results[sizes[0]]:
            continue
        cells = [results[size][metric.key] for size in sizes]
        shares = [share for row in cells for share in (row.single, row.paired)]
        told = ("" if share is None else f"{100 * share:.1f}" for share in shares)
        print(f"| {metric.label} | " + " | ".join(told) + " |")
    outside = [
        f"{key} at {size}"
        for size in sizes
        if size >= LIMIT_FROM
        for key, row in results[size].items()
        for share in (row.single, row.paired)
        if share is not None and not LIMIT[0] <= share <= LIMIT[1]
    ]
    rows = {
        size: {key: [row.single, row.paired] for key, row in by_key.items()}
        for size, by_key in results.items()
    }
    report = {"tables": args.tables, "passed": not outside, "outside": outside, "coverage": rows}
    print(json.dumps(report))
    return int(bool(outside))


if __name__ == "__main__":
    raise SystemExit(main())
