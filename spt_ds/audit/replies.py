"""Replies of a bank compared with those of other systems, such as one prompt that is sampled.

A bank makes replies more varied; so does sampling, at the price of fit. Only systems of the same F1
can be compared in variety.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spt_ds.evaluate.corpus_metrics import CorpusMetrics, corpus_metrics
from spt_ds.evaluate.significance import Paired
from spt_ds.run.predictions import read_predictions

SHOWN = ("f1_spt", "bleu", "dist1", "dist2")


@dataclass(frozen=True)
class Control:
    """Another system's replies to the same examples."""

    folder: str
    values: dict[str, float]
    """Its scores."""
    differences: dict[str, Paired]
    """The bank's scores minus its own."""
    matched: bool
    """Whether of all controls its F1 is the nearest to the bank's."""


def controls(own: Path, others: Sequence[Path]) -> list[Control]:
    """Compare the replies in the folder `own` with those in each other folder."""
    bank = corpus_metrics(read_predictions(own))
    found = [(folder, corpus_metrics(read_predictions(folder))) for folder in others]
    away = [abs(_values(metrics)["f1_spt"] - _values(bank)["f1_spt"]) for _, metrics in found]
    return [
        Control(
            str(folder),
            _values(metrics),
            {key: pair for key, pair in bank.against(metrics).items() if key in SHOWN},
            matched=number == away.index(min(away)),
        )
        for number, (folder, metrics) in enumerate(found)
    ]


def _values(metrics: CorpusMetrics) -> dict[str, float]:
    return {key: metrics.statistics[key].value() for key in SHOWN}
