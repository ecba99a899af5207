"""Text metrics as pure functions over replies and references.

Percentages are on a scale of 0 to 100; docs/metrics.md holds each definition's source. Nothing here
reads files or draws random numbers. Shape letters: N examples, R rows of sums or counts, K prompts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_STOP = re.compile(r"R:|Q:|Summary:|\n|:")
_PUNCTUATION = re.compile(r'[!"#$%&()*+,-./:;<=>?@\[\]\\^`{|}~_\']')
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# What may be the beginning of a marker of `_STOP`, as a word of its own at the end.
_HALF_MARKER = re.compile(r"(^|\s)(R|Q|S(u(m(m(a(ry?)?)?)?)?)?)\s*$")
BLEU_ORDERS = 4


def clean(prediction: str) -> str:
    """Cut a raw prediction before the first `R:`, `Q:`, `Summary:`, line end or colon.

    The paper's scores do the same. The reference is not cut.
    """
    return _STOP.split(prediction, maxsplit=1)[0]


def cleaned(prediction: str, rule: str) -> str:
    """Return what is scored of a raw prediction: cut by `spt`, or with `none` all of it."""
    return clean(prediction) if rule == "spt" else prediction.strip()


def without_half_marker(prediction: str) -> str:
    """Drop `Q`, `R` or the beginning of `Summary` at the end of a text that a limit has cut."""
    return _HALF_MARKER.sub("", prediction)


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
    """Return `[N, 10]` of every example: lengths of reply and reference, then n-gram counts.

    The counts are the matches and the totals of 1- to 4-grams. Summed over examples and given to
    `bleu_of_sums` the rows are the corpus BLEU of sacrebleu's defaults.
    """
    from sacrebleu.metrics import BLEU

    # The option changes the sentence score alone, which is not used. It spares a warning.
    scorer = BLEU(effective_order=True)
    rows = []
    for reply, reference in zip(replies, references, strict=True):
        sentence = scorer.sentence_score(reply, [reference])
        rows.append([sentence.sys_len, sentence.ref_len, *sentence.counts, *sentence.totals])
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
    """Return sacrebleu's signature of the corpus score.

    It must agree for two BLEU figures to be comparable.
    """
    from sacrebleu.metrics import BLEU

    scorer = BLEU()
    # The signature holds the number of references, which the scorer learns from a first use.
    scorer.corpus_score(["a"], [["a"]])
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
    """Return EAD in percent; 0 where there is no n-gram. Any shape.

    It divides the distinct n-grams by those expected of `total` uniform draws from `vocabulary`:
    `100 N / (V (1 - ((V - 1) / V)^C))` of arXiv 2202.13587.
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
    """Return `[R]`, the entropy of each row of `counts` `[R, K]` over log K.

    1 means that all prompts are used alike, 0 that one prompt is used alone. A bank of one prompt
    has entropy 0.
    """
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1.0)
    logs = np.log(np.where(share > 0, share, 1.0))
    bank = counts.shape[-1]
    entropy = -(share * logs).sum(axis=-1) / (math.log(bank) if bank > 1 else 1.0)
    return np.abs(entropy)  # the sum of a bank in which one prompt speaks is -0.0


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return mean, smallest, median and largest of `values`."""
    array = np.asarray(values, dtype=np.float64)
    return {
        "mean": float(array.mean()),
        "min": float(array.min()),
        "median": float(np.median(array)),
        "max": float(array.max()),
    }
