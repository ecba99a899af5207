"""Targets of the contrastive loss: sentence BLEU between the contexts of a window. No torch.

The public SPT reference compares the personas, joined by blanks, with
`sacrebleu.sentence_bleu(use_effective_order)`, the earlier example of the batch as hypothesis, the
later as reference. The same here; an example without a persona is compared by its dialogue, as
personas that do not exist say nothing about likeness.

All pairs of a window are scored together: an n-gram that a text holds c times becomes the features
(n-gram, 1) to (n-gram, c), so that the clipped matches of two texts are the features they share, a
product of 0/1 matrices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER

_TOKENIZE = BLEU().tokenizer  # 13a, sacrebleu's default


def pair_text(persona: Sequence[str], history: Sequence[str]) -> str:
    """Return the text by which an example is compared."""
    return " ".join(persona or history)


def sentence_bleu_matrix(texts: Sequence[str]) -> np.ndarray:
    """Sentence BLEU (0 to 100) of every two texts, float64 [G, G].

    Row i is the hypothesis, column j the reference. Off the diagonal it equals
    `sacrebleu.sentence_bleu(texts[i], [texts[j]], use_effective_order=True).score`; the diagonal
    means nothing.
    """
    words = [_TOKENIZE(text.rstrip()).split() for text in texts]
    lengths = np.array([len(row) for row in words])
    log_sum = np.zeros((len(texts), len(texts)))
    # Orders so far without a match: each halves the smoothed precision once more.
    zeros = np.zeros_like(log_sum)
    any_match = np.zeros_like(log_sum, dtype=bool)
    for order in range(1, MAX_NGRAM_ORDER + 1):
        matches = _matches(words, order)
        any_match |= matches > 0
        zeros += matches == 0
        totals = np.maximum(lengths - order + 1, 0)[:, None]
        smoothed = np.where(matches > 0, matches, 0.5**zeros)
        log_sum += np.where(totals > 0, np.log(100.0 * smoothed / np.maximum(totals, 1)), 0.0)
    # Effective order: the orders that the hypothesis is long enough for.
    orders = np.clip(lengths, 1, MAX_NGRAM_ORDER)[:, None]
    brevity = np.minimum(0.0, 1.0 - lengths[None, :] / np.maximum(lengths, 1)[:, None])
    return np.where(any_match, np.exp(brevity + log_sum / orders), 0.0)


def contrast_pairs(
    texts: Sequence[str], local: Sequence[bool], threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of window positions with a side in `local`, and their targets.

    Pairs are int64 [m, 2], i < j, targets float32 [m]. `texts` [G] in window order; a target is +1
    where BLEU (0 to 100) lies above `threshold`, else -1.
    """
    first, second = np.triu_indices(len(texts), k=1)
    here = np.asarray(local, dtype=bool)
    wanted = here[first] | here[second]
    first, second = first[wanted], second[wanted]
    similar = sentence_bleu_matrix(texts)[first, second] > threshold
    return np.stack([first, second], axis=1), np.where(similar, 1.0, -1.0).astype(np.float32)


def _matches(words: Sequence[Sequence[str]], order: int) -> np.ndarray:
    """Clipped n-gram matches of every two texts off the diagonal, float32 [G, G]."""
    # The c-th occurrence of an n-gram in a text is a feature of its own, so the dot product of two
    # texts counts min(c_i, c_j) for each n-gram. float32 is exact below 2^24 matches.
    holders: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for text, row in enumerate(words):
        seen: Counter[tuple[str, ...]] = Counter()
        for start in range(len(row) - order + 1):
            ngram = tuple(row[start : start + order])
            seen[ngram] += 1
            holders.setdefault((ngram, seen[ngram]), []).append(text)
    # What one text has alone matches nothing.
    shared = [texts for texts in holders.values() if len(texts) > 1]
    features = np.zeros((len(words), len(shared)), dtype=np.float32)
    for column, texts in enumerate(shared):
        features[texts, column] = 1.0
    return features @ features.T
