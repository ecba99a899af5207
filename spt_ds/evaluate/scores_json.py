"""All scores of one predictions file: plain data that is written to and read from `scores.json`."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import spt_ds
from spt_ds.display import printable, shortened
from spt_ds.errors import DataError
from spt_ds.evaluate import significance, text_metrics
from spt_ds.evaluate.corpus_metrics import (
    OPT_VOCABULARY,
    CorpusMetrics,
    corpus_metrics,
    prompt_rows,
)
from spt_ds.run.predictions import read_predictions

LARGEST = 1e150  # sums and squares of scores are doubles too
LIBRARIES = ("sacrebleu", "rouge-score", "bert-score", "numpy")


@dataclass(frozen=True)
class Settings:
    """How the numbers were made."""

    examples: int
    dialogues: int
    predictions_sha256: str
    data_sha256: str
    """Digest of ids and references: equal means the same examples."""
    bleu_signature: str
    ead_vocabulary: int
    versions: dict[str, str]
    interval_method: str = "percentile bootstrap"
    """How intervals were made; files of version 0.1.0 do not say it."""


@dataclass(frozen=True)
class Scores:
    """The scores of one file. Keys are those of `columns.METRICS`; a skipped metric has no key."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    """95 % intervals; empty where all examples are of one dialogue."""
    prompt_counts: list[int]
    """How often each prompt of the bank spoke; empty where none was chosen."""
    lengths: dict[str, dict[str, float]]
    """Mean, min, median and max of words and tokens."""
    skipped: dict[str, str]
    """Metric families that were not computed, and how to mend it."""
    settings: Settings

    def to_json(self) -> dict[str, Any]:
        """Plain data for `scores.json`."""
        return asdict(self)


def evaluate(path: str | Path, *, ead_vocabulary: int = OPT_VOCABULARY) -> Scores:
    """Score a predictions file, or the folder that holds one.

    Raises DataError for a file that cannot be used.
    """
    return scores_of(corpus_metrics(read_predictions(path), ead_vocabulary))


def scores_of(metrics: CorpusMetrics) -> Scores:
    """Turn the metrics of a file into its scores."""
    file = metrics.file
    return Scores(
        values={key: statistic.value() for key, statistic in metrics.statistics.items()},
        intervals=metrics.intervals(),
        prompt_counts=(
            []
            if "prompt use" in metrics.skipped
            else prompt_rows(file).sum(axis=0).astype(int).tolist()
        ),
        lengths=_lengths(metrics),
        skipped=metrics.skipped,
        settings=Settings(
            examples=len(file.rows),
            dialogues=max(file.units) + 1,
            predictions_sha256=file.sha256,
            data_sha256=file.data_sha256,
            bleu_signature=text_metrics.bleu_signature(),
            ead_vocabulary=metrics.ead_vocabulary,
            versions={"spt-ds": spt_ds.__version__, **_versions()},
            interval_method=significance.METHOD,
        ),
    )


def load_scores(path: Path) -> Scores:
    """Read a `scores.json`. Raises DataError, naming the key, when it does not hold scores."""
    try:
        scores = TypeAdapter(Scores).validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); `spt-ds evaluate` writes one"
        ) from error
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        key = shortened(printable(".".join(map(str, fault["loc"])))) or "the file"
        raise DataError(
            f"{path}: {key}: {shortened(fault['msg'])}; write the file again with: spt-ds evaluate"
            f" {path.parent}"
        ) from error
    # pydantic takes NaN and 1e300 for numbers; tables and differences of scores do not.
    numbers = [*scores.values.values(), *itertools.chain(*scores.intervals.values())]
    if not all(abs(number) <= LARGEST for number in numbers):  # false for what is no number too
        raise DataError(
            f"{path}: a score is not between -{LARGEST:g} and {LARGEST:g}; write the file again"
            f" with: spt-ds evaluate {path.parent}"
        )
    return scores


def _lengths(metrics: CorpusMetrics) -> dict[str, dict[str, float]]:
    rows = metrics.file.rows
    columns = {
        "reply_words": [len(reply.split()) for reply in metrics.replies],
        "reference_words": [len(row.reference.split()) for row in rows],
        "new_tokens": [row.new_tokens for row in rows if row.new_tokens is not None],
        "context_tokens": [row.context_tokens for row in rows if row.context_tokens is not None],
    }
    return {name: text_metrics.summary(values) for name, values in columns.items() if values}


def _versions() -> dict[str, str]:
    # Not by import: bert-score would load torch for its version alone.
    present = [name for name in LIBRARIES if find_spec(name.replace("-", "_")) is not None]
    return {name: metadata.version(name) for name in present}
