"""What is typical of the examples that one prompt answered, next to those of all others.

Words are runs of letters and digits in lower case. Nothing here is trained or downloaded, so a page
is the same each time.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from spt_ds.report.runs import Reply

_WORD = re.compile(r"\w+(?:['\N{RIGHT SINGLE QUOTATION MARK}]\w+)?")
LEAST_TEXTS = 2  # of a prompt that hold a word before it can be called typical
LEAST_LEAD = 0.05  # of its share of texts over that among the others


@dataclass(frozen=True)
class Word:
    """A word that one prompt's texts hold more often than those of the others."""

    text: str
    own: float
    """Share of the prompt's texts that hold it, 0 to 1."""
    others: float
    """The same share of all other texts."""


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Corpus:
    """How many texts there are, and how many of them hold each word."""

    texts: int
    held: Counter[str]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Corpus:
        return cls(len(texts), Counter(word for text in texts for word in set(words(text))))

    def weight(self, word: str) -> float:
        """The logarithm of one over the share of texts that hold a word: rare ones weigh more."""
        return math.log((1 + self.texts) / self.held[word])


def distinctive(texts: Sequence[str], corpus: Corpus, most: int) -> list[Word]:
    """Return up to `most` words by the lead of their share in `texts`, the largest first.

    `corpus` is of `texts` and of the others that they are compared with.
    """
    own, others = Corpus.of(texts), max(corpus.texts - len(texts), 1)
    found = [
        Word(word, count / own.texts, (corpus.held[word] - count) / others)
        for word, count in own.held.items()
        if count >= LEAST_TEXTS
    ]
    # Each prompt says "the" a little more or less often: without a least lead it would be shown.
    leading = [word for word in found if word.own - word.others >= LEAST_LEAD]
    return sorted(leading, key=lambda word: (word.others - word.own, word.text))[:most]


def central(texts: Sequence[str], corpus: Corpus) -> list[int]:
    """Return the places of the different texts, from the one most like all others on.

    Likeness is the mean cosine between bags of words, weighted by rarity in `corpus`. A text that
    occurs more than once counts each time and is named where it occurs first.
    """
    bags = [_unit(Counter(words(text)), corpus) for text in texts]
    total: dict[str, float] = defaultdict(float)
    for bag in bags:
        for word, weight in bag.items():
            total[word] += weight
    # Two replies that differ in a full stop would fill the list with one answer.
    first: dict[tuple[str, ...], int] = {}
    for place, text in enumerate(texts):
        first.setdefault(tuple(words(text)), place)
    # The mean cosine to all others orders as the product with the sum of all bags does, and needs
    # no table of pairs: a prompt may have thousands of replies.
    likeness = {
        place: sum(weight * total[word] for word, weight in bags[place].items())
        for place in first.values()
    }
    return sorted(likeness, key=lambda place: (-likeness[place], place))


def surest(replies: Sequence[Reply], prompt: int) -> list[Reply]:
    """One reply for each context, by the prompt's lead over the next best one: largest first."""
    # A test set asks the same of several personas, and repeats of one context would hide the next.
    ranked = sorted(replies, key=lambda reply: (-lead(reply, prompt), reply.row.index))
    first: dict[str, Reply] = {}
    for reply in ranked:
        first.setdefault(context(reply), reply)
    return list(first.values())


def lead(reply: Reply, prompt: int) -> float:
    """How far the score of `prompt` is above the best of the others, below 0 if it is not."""
    scores = reply.row.scores
    others = [score for number, score in enumerate(scores) if number != prompt]
    return scores[prompt] - max(others) if others else 0.0


def context(reply: Reply) -> str:
    """What a prompt is chosen by: the persona and what the partner said last."""
    return "\n".join([*reply.row.persona, *reply.row.history[-1:]])


def _unit(counts: Counter[str], corpus: Corpus) -> dict[str, float]:
    bag = {word: count * corpus.weight(word) for word, count in counts.items()}
    norm = math.sqrt(sum(weight * weight for weight in bag.values()))
    return {word: weight / norm for word, weight in bag.items()} if norm else {}
