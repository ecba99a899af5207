"""Text scores as pure functions over replies and references; docs/metrics.md holds each
definition's source.

Percentages are on a scale of 0 to 100. Nothing here reads files or draws random numbers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A column of the tables: its key in `scores.json`, its heading, its meaning in a few words."""

    key: str
    label: str
    meaning: str


METRICS = (
    Metric("f1_spt", "F1", "word overlap with the reference, %, words as they stand"),
    Metric("bleu", "BLEU", "corpus BLEU of sacrebleu"),
    Metric("rouge1", "R-1", "ROUGE-1 F-measure, %"),
    Metric("rouge2", "R-2", "ROUGE-2 F-measure, %"),
    Metric("rougeL", "R-L", "ROUGE-L F-measure, %"),
    Metric("bert_f1", "BERT-F1", "BERTScore F1, %"),
    Metric("bert_p", "BERT-P", "BERTScore precision, %"),
    Metric("bert_r", "BERT-R", "BERTScore recall, %"),
    Metric("dist1", "DIST-1", "distinct over total words of all replies, %"),
    Metric("dist2", "DIST-2", "distinct over total bigrams of all replies, %"),
    Metric("f1_parlai", "F1-ParlAI", "word overlap after ParlAI's normalisation, %"),
    Metric("dist3", "DIST-3", "distinct over total trigrams of all replies, %"),
    Metric("ead1", "EAD-1", "distinct over expected distinct words, %"),
    Metric("ead2", "EAD-2", "distinct over expected distinct bigrams, %"),
    Metric("ppl_token", "PPL/token", "perplexity of the reference per token; lower is better"),
    Metric("ppl_word", "PPL/word", "perplexity of the reference per word; lower is better"),
    Metric("reply_words", "words", "mean words per reply"),
    Metric("empty_replies", "empty %", "replies without a word, %"),
    Metric("prompt_entropy", "prompt H", "normalised entropy of the prompts' use, 0 to 1"),
)
PAPER_COLUMNS = tuple(metric.key for metric in METRICS[:10])
WIDE_COLUMNS = (*PAPER_COLUMNS, "ead1", "ead2", "ppl_token")  # of a table with a system in each row

_STOP = re.compile(r"R:|Q:|Summary:|\n|:")
_PUNCTUATION = re.compile(r'[!"#$%&()*+,-./:;<=>?@\[\]\\^`{|}~_\']')
_ARTICLES = re.compile(r"\b(a|an|the)\b")
BLEU_ORDERS = 4


def clean(prediction: str) -> str:
    """Cut a raw prediction before the first `R:`, `Q:`, `Summary:`, line end or colon, as the
    paper's scores do.
    """
    return _STOP.split(prediction, maxsplit=1)[0]


def f1_spt(reply: str, reference: str) -> float:
    """Return the F1 (0 to 1) of the two multisets of words, words as `str.split()` gives them."""
    return _overlap(reply.split(), reference.split())


def f1_parlai(reply: str, reference: str) -> float:
    """Return the F1 (0 to 1) of the words after `parlai_normal`."""
    return _overlap(parlai_normal(reply).split(), parlai_normal(reference).split())


def parlai_normal(text: str) -> str:
    """Lower the case, turn punctuation into blanks, drop a, an and the, join by single blanks."""
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).split())


def _overlap(reply: list[str], reference: list[str]) -> float:
    same = sum((Counter(reply) & Counter(reference)).values())
    # 2PR / (P + R) with P = same / |reply| and R = same / |reference|.
    return 2.0 * same / (len(reply) + len(reference)) if same else 0.0


def bleu_rows(replies: Sequence[str], references: Sequence[str]) -> Floats:
    """Return `[N, 10]`: reply length, reference length, matches and totals of 1- to 4-grams of
    every example.

    Summed over examples and given to `bleu_of_sums` they are the corpus BLEU of sacrebleu's
    defaults.
    """
    from sacrebleu.metrics import BLEU

    scorer = BLEU(
        effective_order=True
    )  # moves only the sentence score, which is not used; spares a warning
    rows = []
    for reply, reference in zip(replies, references, strict=True):
        one = scorer.sentence_score(reply, [reference])
        rows.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
    return np.asarray(rows, dtype=np.float64)


def bleu_of_sums(sums: Floats) -> Floats:
    """Return corpus BLEU `[R]` of summed `bleu_rows` `[R, 10]`."""
    from sacrebleu.metrics import BLEU

    values = []
    for row in np.rint(sums).astype(int).tolist():
        matches, totals = row[2 : 2 + BLEU_ORDERS], row[2 + BLEU_ORDERS :]
        values.append(BLEU.compute_bleu(matches, totals, row[0], row[1], smooth_method="exp").score)
    return np.asarray(values, dtype=np.float64)


def bleu_signature() -> str:
    """Return sacrebleu's signature of the corpus score: what must agree for two BLEU figures to be
    comparable.
    """
    from sacrebleu.metrics import BLEU

    scorer = BLEU()
    scorer.corpus_score(
        ["a"], [["a"]]
    )  # the signature holds the number of references, known from a first use
    return str(scorer.get_signature())


def ngrams(reply: str, n: int) -> list[str]:
    """Return the n-grams of the reply's words, split on every single blank.

    As in the paper's scores an empty reply holds one empty word, and two blanks in a row hold one
    between them.
    """
    words = reply.strip().split(" ")
    return [" ".join(words[start : start + n]) for start in range(len(words) - n + 1)]


def distinct_and_total(replies: Iterable[str], n: int) -> tuple[int, int]:
    """Return how many different n-grams all replies hold together, and how many at all."""
    grams = [gram for reply in replies for gram in ngrams(reply, n)]
    return len(set(grams)), len(grams)


def dist_of_counts(distinct: Floats, total: Floats) -> Floats:
    """Return DIST in percent; 0 where there is no n-gram. Any shape."""
    return 100.0 * distinct / np.maximum(total, 1.0)


def ead_of_counts(distinct: Floats, total: Floats, vocabulary: int) -> Floats:
    """Return EAD in percent: distinct n-grams over those expected of `total` uniform draws from
    `vocabulary`.

    `100 N / (V (1 - ((V - 1) / V)^C))` of arXiv 2202.13587; 0 where there is no n-gram. Any shape.
    """
    # expm1 and log1p keep all digits where C is much smaller than V.
    expected = -vocabulary * np.expm1(np.maximum(total, 1.0) * math.log1p(-1.0 / vocabulary))
    return 100.0 * distinct / expected


def dist(replies: Iterable[str], n: int) -> float:
    """Return DIST-n of all replies together, in percent."""
    distinct, total = distinct_and_total(replies, n)
    return float(dist_of_counts(np.asarray(float(distinct)), np.asarray(float(total))))


def ead(replies: Iterable[str], n: int, vocabulary: int) -> float:
    """Return EAD-n of all replies together, in percent."""
    distinct, total = distinct_and_total(replies, n)
    return float(ead_of_counts(np.asarray(float(distinct)), np.asarray(float(total)), vocabulary))


def normalised_entropy(counts: Floats) -> Floats:
    """Return `[R]`, the entropy of each row of `counts` `[R, K]` over log K: 1 all alike, 0 one
    prompt alone.

    A bank of one prompt has entropy 0.
    """
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
    logs = np.log(np.where(share > 0, share, 1.0))
    bank = counts.shape[-1]
    entropy = -(share * logs).sum(axis=-1) / (math.log(bank) if bank > 1 else 1.0)
    return np.abs(entropy)  # no minus zero


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return mean, smallest, median and largest of `values`."""
    array = np.asarray(values, dtype=np.float64)
    return {
        "mean": float(array.mean()),
        "min": float(array.min()),
        "median": float(np.median(array)),
        "max": float(array.max()),
    }
