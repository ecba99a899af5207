"""Every metric of the tables for one predictions file, each as a statistic of its dialogues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spt_ds.errors import DataError
from spt_ds.evaluate import rouge_bert, significance, text_metrics
from spt_ds.evaluate.columns import FAMILIES, METRIC_OF, METRICS
from spt_ds.evaluate.label_metrics import label_metrics
from spt_ds.evaluate.significance import Paired
from spt_ds.evaluate.statistic import Distinct, Statistic, Sums, grouped, mean, ratio
from spt_ds.evaluate.text_metrics import Floats
from spt_ds.run.predictions import PredictionFile, check_same_examples

OPT_VOCABULARY = 50265
"""Words of OPT's tokenizer, the largest vocabulary among the paper's models: EAD's authors ask for
that one.
"""


@dataclass(frozen=True)
class CorpusMetrics:
    """A file and its metrics by key, in the tables' order. Their unit is the dialogue."""

    file: PredictionFile[Any]
    replies: list[str]
    """The cleaned predictions: what is scored."""
    statistics: dict[str, Statistic]
    skipped: dict[str, str]
    """Metric families that could not be computed, and how to mend it."""
    ead_vocabulary: int

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % interval of each metric; empty for a single dialogue."""
        if max(self.file.units) == 0:
            return {}
        return {
            key: significance.interval(statistic, METRIC_OF[key].most)
            for key, statistic in self.statistics.items()
        }

    def against(self, other: CorpusMetrics) -> dict[str, Paired]:
        """Compare with another file of the same examples: this one minus the other, by metric.

        Raises DataError when the examples differ or all are of one dialogue.
        """
        if max(self.file.units) == 0:
            raise DataError(
                f"{self.file.path}: all examples are of one dialogue; a comparison needs two or"
                " more"
            )
        return tested_gains([self], [other])


def tested_gains(
    ours: Sequence[CorpusMetrics], theirs: Sequence[CorpusMetrics]
) -> dict[str, Paired]:
    """The mean of each metric over some files minus that over others, paired over dialogues.

    Empty where all examples are of one dialogue. Raises DataError when the examples differ.
    """
    files = [*ours, *theirs]
    for other in files[1:]:
        check_same_examples(files[0].file, other.file)
    if max(files[0].file.units) == 0:
        return {}
    # Banks of two sizes have no common table of counts.
    apart = {"prompt_entropy"}
    if other_tokens(files):
        apart.add("ppl_token")
    return {
        key: significance.paired_means(
            [file.statistics[key] for file in ours], [file.statistics[key] for file in theirs]
        )
        for key in files[0].statistics
        if key not in apart and all(key in file.statistics for file in files)
    }


def other_tokens(files: Sequence[CorpusMetrics]) -> bool:
    """Whether references are cut into other tokens in some files than in others.

    A perplexity per token then means another thing.
    """
    counts = {tuple(row.nll_tokens for row in each.file.rows) for each in files}
    return len({count for count in counts if count[0] is not None}) > 1


def corpus_metrics(
    file: PredictionFile[Any], ead_vocabulary: int = OPT_VOCABULARY, *, bert_score: bool = True
) -> CorpusMetrics:
    """Compute the metrics of `file`, those of BERTScore only with `bert_score`.

    A family whose library or field is not there is noted under `skipped`.
    """
    replies = [text_metrics.cleaned(row.raw, row.clean) for row in file.rows]
    references = [row.reference for row in file.rows]
    of_labels, skipped = label_metrics(file, replies)
    of_examples: dict[str, Statistic] = {
        **of_labels,
        **_overlap(replies, references),
        **_diversity(replies, ead_vocabulary),
        **_reply_lengths(replies),
    }
    # As functions: what is skipped is never computed, and a missing library is never imported.
    families: tuple[tuple[str, str | None, Callable[[], dict[str, Statistic]]], ...] = (
        (
            "ROUGE",
            rouge_bert.rouge_missing(),
            lambda: _means(FAMILIES["ROUGE"], rouge_bert.rouge_rows(replies, references)),
        ),
        (
            "BERTScore",
            rouge_bert.bert_missing(),
            lambda: _means(FAMILIES["BERTScore"], rouge_bert.bert_rows(replies, references)),
        ),
        ("perplexity", _no_nll(file), lambda: _perplexity(file)),
        ("prompt use", _no_prompt(file), lambda: _prompt_use(file)),
    )
    for name, missing, compute in families:
        if name == "BERTScore" and not bert_score:
            continue
        if missing is None:
            of_examples.update(compute())
        else:
            skipped[name] = missing
    dialogues = file.units
    # Dialogues are the units of every interval: the turns of one share a persona and are no
    # independent draws.
    of_dialogues = {
        metric.key: grouped(of_examples[metric.key], dialogues)
        for metric in METRICS
        if metric.key in of_examples
    }
    return CorpusMetrics(file, replies, of_dialogues, skipped, ead_vocabulary)


def prompt_rows(file: PredictionFile[Any]) -> Floats:
    """`[N, K]`, 1 where prompt k spoke in example n.

    K is the number of scores, or without scores one more than the largest prompt seen.
    """
    chosen = [row.prompt for row in file.rows if row.prompt is not None]
    # A prompt that never spoke is known from the scores alone, and entropy needs the size of the
    # bank.
    bank = len(file.rows[0].scores) or max(chosen, default=-1) + 1
    rows = np.zeros((len(chosen), bank))
    rows[np.arange(len(chosen)), chosen] = 1.0
    return rows


def _means(keys: Sequence[str], rows: Floats) -> dict[str, Statistic]:
    return {key: mean(rows[:, column], 100.0) for column, key in enumerate(keys)}


def _overlap(replies: list[str], references: list[str]) -> dict[str, Statistic]:
    pairs = list(zip(replies, references, strict=True))
    return {
        "f1_spt": mean(np.asarray([text_metrics.f1_spt(*pair) for pair in pairs]), 100.0),
        "f1_parlai": mean(np.asarray([text_metrics.f1_parlai(*pair) for pair in pairs]), 100.0),
        "bleu": Sums(text_metrics.bleu_rows(replies, references), text_metrics.bleu_of_sums),
    }


def _diversity(replies: list[str], vocabulary: int) -> dict[str, Statistic]:
    def ead(distinct: Floats, total: Floats) -> Floats:
        return text_metrics.ead_of_counts(distinct, total, vocabulary)

    grams = {n: [text_metrics.ngrams(reply, n) for reply in replies] for n in (1, 2, 3)}
    dist: dict[str, Statistic] = {
        f"dist{n}": Distinct(grams[n], text_metrics.dist_of_counts) for n in grams
    }
    return {**dist, "ead1": Distinct(grams[1], ead), "ead2": Distinct(grams[2], ead)}


def _reply_lengths(replies: list[str]) -> dict[str, Statistic]:
    words = np.asarray([len(reply.split()) for reply in replies], dtype=np.float64)
    return {
        "reply_words": mean(words),
        "empty_replies": mean((words == 0).astype(np.float64), 100.0),
    }


def _no_nll(file: PredictionFile[Any]) -> str | None:
    if file.rows[0].nll_sum is None:
        return "the file has no 'nll_sum'; generate it with --ppl"
    return None


def _perplexity(file: PredictionFile[Any]) -> dict[str, Statistic]:
    nll = np.asarray([row.nll_sum for row in file.rows], dtype=np.float64)
    tokens = np.asarray([row.nll_tokens for row in file.rows], dtype=np.float64)
    words = np.asarray([len(row.reference.split()) for row in file.rows], dtype=np.float64)
    # Sums over sums, so that each token counts the same. A mean of per-reply perplexities would be
    # led by the few worst ones.
    return {"ppl_token": ratio(nll, tokens, np.exp), "ppl_word": ratio(nll, words, np.exp)}


def _no_prompt(file: PredictionFile[Any]) -> str | None:
    if file.rows[0].prompt is None:
        return (
            "the file names no prompt; one is chosen per example in the modes select, random, fixed"
            " and noise"
        )
    return None


def _prompt_use(file: PredictionFile[Any]) -> dict[str, Statistic]:
    entropy = Sums(prompt_rows(file), text_metrics.normalised_entropy, is_biased=True)
    return {"prompt_entropy": entropy}
