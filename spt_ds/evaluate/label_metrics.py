"""Metrics of replies that are one of given answers, with the definitions of scikit-learn.

They need the field `choices` of a predictions file: the answers to choose among. A reply counts as
the answer that it equals, blanks around it aside; it need not have been chosen by likelihood.

Shape letters: N examples, L labels, R rows of sums.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from spt_ds.evaluate.statistic import Statistic, Sums, mean, ratio
from spt_ds.evaluate.text_metrics import Floats
from spt_ds.run.predictions import PredictionFile

MAX_LABELS = 256  # a row of sums has three numbers for each
_NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d{1,15})?")


def label_metrics(
    file: PredictionFile[Any], replies: Sequence[str]
) -> tuple[dict[str, Statistic], dict[str, str]]:
    """Return the statistics by key, of the examples, and families that were skipped with why.

    Both are empty for a file whose first line lists no choices.
    """
    if not file.rows[0].choices:
        return {}, {}
    for number, row in enumerate(file.rows, start=1):
        if not row.choices:
            return {}, {"labels": f"line {number} lists no 'choices', and line 1 does"}
    golds, answers = [row.reference for row in file.rows], [reply.strip() for reply in replies]
    found: dict[str, Statistic] = {"accuracy": accuracy(golds, answers)}
    skipped: dict[str, str] = {}
    labels = file.rows[0].choices
    other = next((n for n, row in enumerate(file.rows, 1) if set(row.choices) != set(labels)), 0)
    if other:
        skipped["F1 macro"] = f"the choices on line {other} are not those on line 1: no labels"
    elif len(labels) > MAX_LABELS:
        skipped["F1 macro"] = f"{len(labels)} labels, at most {MAX_LABELS} are scored"
    else:
        found["f1_macro"] = f1_macro(golds, answers, labels)
    if all(_NUMBER.fullmatch(choice) for row in file.rows for choice in row.choices):
        wrong = next((n for n, text in enumerate(answers, 1) if not _NUMBER.fullmatch(text)), 0)
        if wrong:
            skipped["MAE and RMSE"] = f"the reply on line {wrong} is no number"
        else:
            found |= errors(golds, answers)
    return found, skipped


def accuracy(golds: Sequence[str], answers: Sequence[str]) -> Sums:
    """The share of answers that equal the gold one, in percent (`accuracy_score`)."""
    right = [gold == answer for gold, answer in zip(golds, answers, strict=True)]
    return mean(np.asarray(right, dtype=np.float64), 100.0)


def f1_macro(golds: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> Sums:
    """The mean over all labels of the F1 of each, in percent.

    That is `f1_score(golds, answers, labels=labels, average="macro", zero_division=0)`: a label
    that neither a gold nor an answer is has F1 0, and an answer that is no label is a miss.
    """
    place = {label: n for n, label in enumerate(labels)}
    count = len(labels)
    rows = np.zeros((len(golds), 3 * count))  # right answers, answers and golds of each label
    for row, gold, answer in zip(rows, golds, answers, strict=True):
        row[2 * count + place[gold]] = 1.0
        if answer in place:
            row[count + place[answer]] = 1.0
            row[place[answer]] = float(answer == gold)

    def finish(sums: Floats) -> Floats:
        right, given, wanted = (sums[:, n * count : (n + 1) * count] for n in range(3))
        f1 = 2.0 * right / np.maximum(given + wanted, 1.0)
        return 100.0 * f1.mean(axis=1)

    # At the end of its scale it is so in every example, as a mean is.
    return Sums(rows, finish, is_mean=True)


def errors(golds: Sequence[str], answers: Sequence[str]) -> dict[str, Statistic]:
    """Errors of labels that are numbers: `mean_absolute_error`, `root_mean_squared_error`."""
    gaps = np.asarray([float(a) - float(b) for a, b in zip(answers, golds, strict=True)])
    squares = ratio(np.square(gaps), np.ones_like(gaps), np.sqrt)
    return {"mae": mean(np.abs(gaps)), "rmse": squares}
