"""What is typical of the examples that one prompt answered, next to those of all others.

Words are runs of letters and digits in lower case. Nothing here is trained or downloaded, so a page
is the same each time.
"""

from __future__ import annotations

import math
import re
from collections import Counter
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


def distinctive(own: Sequence[str], others: Sequence[str], most: int) -> list[Word]:
    """Return up to `most` words with the largest lead in their share of texts, largest first."""
    counts = [
        Counter(word for text in texts for word in set(words(text))) for texts in (own, others)
    ]
    found = [
        Word(word, count / len(own), counts[1][word] / max(len(others), 1))
        for word, count in counts[0].items()
        if count >= LEAST_TEXTS
    ]
    leading = [word for word in found if word.own - word.others >= LEAST_LEAD]
    return sorted(leading, key=lambda word: (word.others - word.own, word.text))[:most]


def rarities(texts: Sequence[str]) -> dict[str, float]:
    """The weight of each word: the logarithm of one over the share of texts that hold it."""
    held = Counter(word for text in texts for word in set(words(text)))
    return {word: math.log((1 + len(texts)) / count) for word, count in held.items()}


def central(texts: Sequence[str], weights: dict[str, float]) -> list[int]:
    """Return the places of the different texts, from the one most like all others on.

    Likeness is the mean cosine between bags of words, weighted by `weights`. A text that occurs
    more than once counts each time and is named where it occurs first.
    """
    bags = [_unit(Counter(words(text)), weights) for text in texts]
    total: Counter[str] = Counter()
    for bag in bags:
        for word, weight in bag.items():
            total[word] += weight  # type: ignore[assignment]
    first: dict[tuple[str, ...], int] = {}
    for place, text in enumerate(texts):
        first.setdefault(tuple(words(text)), place)
    likeness = {
        place: sum(weight * total[word] for word, weight in bags[place].items())
        for place in first.values()
    }
    return sorted(likeness, key=lambda place: (-likeness[place], place))


def surest(replies: Sequence[Reply], prompt: int) -> list[Reply]:
    """The replies of a prompt by its lead, in score, over the next best one: largest first."""
    return sorted(replies, key=lambda reply: (-lead(reply, prompt), reply.row.index))


def lead(reply: Reply, prompt: int) -> float:
    """How far the score of `prompt` is above the best of the others, below 0 if it is not."""
    scores = reply.row.scores
    others = [score for number, score in enumerate(scores) if number != prompt]
    return scores[prompt] - max(others) if others else 0.0


def context(reply: Reply) -> str:
    """What a prompt is chosen by: the persona and what the partner said last."""
    return "\n".join([*reply.row.persona, *reply.row.history[-1:]])


def _unit(counts: Counter[str], weights: dict[str, float]) -> dict[str, float]:
    bag = {word: count * weights[word] for word, count in counts.items()}
    norm = math.sqrt(sum(weight * weight for weight in bag.values()))
    return {word: weight / norm for word, weight in bag.items()} if norm else {}
