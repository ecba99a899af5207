"""Turns a predictions file into measures: every metric of the tables, ready to be summed, resampled
and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spt_ds.errors import DataError
from spt_ds.evaluate import optional, resample
from spt_ds.evaluate import scores as text
from spt_ds.evaluate.predictions import PredictionFile, check_same_examples
from spt_ds.evaluate.resample import Distinct, Measure, Paired, Sums
from spt_ds.evaluate.scores import Floats

OPT_VOCABULARY = 50265
"""Words of OPT's tokenizer, the largest vocabulary among the paper's models: EAD's authors ask for
that one.
"""


@dataclass(frozen=True)
class Measured:
    """A file and its measures, by metric key in the tables' order. The unit of resampling is the
    dialogue.
    """

    file: PredictionFile
    replies: list[str]
    """The cleaned predictions: what is scored."""
    measures: dict[str, Measure]
    skipped: dict[str, str]
    """Metric families that could not be computed, and how to mend it."""
    ead_vocabulary: int

    def intervals(self, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
        """The 95 % interval of each metric; empty for no resamples and for a single dialogue."""
        if not resamples or max(self.file.units) == 0:
            return {}
        return {key: resample.interval(one, resamples, seed) for key, one in self.measures.items()}

    def against(self, other: Measured, resamples: int, seed: int) -> dict[str, Paired]:
        """Compare with another file of the same examples, metric by metric: this one minus the
        other.

        Raises DataError when the examples differ or all are of one dialogue.
        """
        check_same_examples(self.file, other.file)
        if max(self.file.units) == 0:
            raise DataError(
                f"{self.file.path}: all examples are of one dialogue; a comparison needs two or"
                " more"
            )
        # Banks of two sizes have no common table of counts.
        shared = [key for key in self.measures if key in other.measures and key != "prompt_entropy"]
        return {
            key: resample.paired(self.measures[key], other.measures[key], resamples, seed)
            for key in shared
        }


def measure(file: PredictionFile, ead_vocabulary: int = OPT_VOCABULARY) -> Measured:
    """Compute the measures of `file`; a library or field that is not there is noted under
    `skipped`.
    """
    replies, references = (
        [text.clean(row.raw) for row in file.rows],
        [row.reference for row in file.rows],
    )
    skipped: dict[str, str] = {}
    found: dict[str, Measure] = {
        **_overlap(replies, references),
        **_diversity(replies, ead_vocabulary),
        **_lengths(replies),
    }
    families: tuple[tuple[str, str | None, Callable[[], dict[str, Measure]]], ...] = (
        (
            "ROUGE",
            optional.rouge_missing(),
            lambda: _columns(_ROUGE, optional.rouge_rows(replies, references)),
        ),
        (
            "BERTScore",
            optional.bert_missing(),
            lambda: _columns(_BERT, optional.bert_rows(replies, references)),
        ),
        ("perplexity", _no_nll(file), lambda: _perplexity(file)),
        ("prompt use", _no_prompt(file), lambda: _prompt_use(file)),
    )
    for name, missing, compute in families:
        if missing is None:
            found.update(compute())
        else:
            skipped[name] = missing
    units = file.units
    ordered = {
        one.key: resample.grouped(found[one.key], units) for one in text.METRICS if one.key in found
    }
    return Measured(file, replies, ordered, skipped, ead_vocabulary)


def prompt_rows(file: PredictionFile) -> Floats:
    """`[N, K]`, 1 where prompt k spoke in example n; K from the scores, else from the largest
    prompt seen.
    """
    chosen = [row.prompt for row in file.rows if row.prompt is not None]
    bank = len(file.rows[0].scores) or max(chosen, default=-1) + 1
    rows = np.zeros((len(chosen), bank))
    rows[np.arange(len(chosen)), chosen] = 1.0
    return rows


_ROUGE = ("rouge1", "rouge2", "rougeL")
_BERT = ("bert_f1", "bert_p", "bert_r")


def _columns(keys: Sequence[str], rows: Floats) -> dict[str, Measure]:
    return {key: resample.mean(rows[:, place], 100.0) for place, key in enumerate(keys)}


def _overlap(replies: list[str], references: list[str]) -> dict[str, Measure]:
    pairs = list(zip(replies, references, strict=True))
    return {
        "f1_spt": resample.mean(np.asarray([text.f1_spt(*pair) for pair in pairs]), 100.0),
        "f1_parlai": resample.mean(np.asarray([text.f1_parlai(*pair) for pair in pairs]), 100.0),
        "bleu": Sums(text.bleu_rows(replies, references), text.bleu_of_sums),
    }


def _diversity(replies: list[str], vocabulary: int) -> dict[str, Measure]:
    def ead(distinct: Floats, total: Floats) -> Floats:
        return text.ead_of_counts(distinct, total, vocabulary)

    grams = {n: [text.ngrams(reply, n) for reply in replies] for n in (1, 2, 3)}
    dist: dict[str, Measure] = {f"dist{n}": Distinct(grams[n], text.dist_of_counts) for n in grams}
    return {**dist, "ead1": Distinct(grams[1], ead), "ead2": Distinct(grams[2], ead)}


def _lengths(replies: list[str]) -> dict[str, Measure]:
    words = np.asarray([len(reply.split()) for reply in replies], dtype=np.float64)
    return {
        "reply_words": resample.mean(words),
        "empty_replies": resample.mean((words == 0).astype(np.float64), 100.0),
    }


def _no_nll(file: PredictionFile) -> str | None:
    if file.rows[0].nll_sum is None:
        return "the file has no 'nll_sum'; generate it with --ppl"
    return None


def _perplexity(file: PredictionFile) -> dict[str, Measure]:
    nll = np.asarray([row.nll_sum for row in file.rows], dtype=np.float64)
    tokens = np.asarray([row.nll_tokens for row in file.rows], dtype=np.float64)
    words = np.asarray([len(row.reference.split()) for row in file.rows], dtype=np.float64)
    return {
        "ppl_token": resample.ratio(nll, tokens, np.exp),
        "ppl_word": resample.ratio(nll, words, np.exp),
    }


def _no_prompt(file: PredictionFile) -> str | None:
    if file.rows[0].prompt is None:
        return (
            "the file names no prompt; one is chosen per example in the modes select, random, fixed"
            " and noise"
        )
    return None


def _prompt_use(file: PredictionFile) -> dict[str, Measure]:
    return {"prompt_entropy": Sums(prompt_rows(file), text.normalised_entropy)}
