"""Makes a persona and a last turn fit where they are longer than the window. No torch.

An example overflows when its persona, its last turn and its reply do not fit together. The persona
is then cut by whole sentences, to what the dialogue leaves of the window, or to half of it where
the dialogue is long. A last turn that is still too long loses its beginning: a question mostly
comes at the end of a document.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spt_ds.data.pieces import plain_ids
from spt_ds.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overflow = Literal["error", "truncate", "drop", "retrieve"]
Persona = tuple[str, ...]
History = tuple[str, ...]
# Tokens of a context with such a persona and dialogue.
Count = Callable[[Persona, History], int]

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")
_WORD = r"(?u)\b\w+\b"  # also words of one letter, which some languages are full of
_SPARE = 8  # tokens: texts together may have a few more than each by itself
_LONGEST_WORD = 40  # characters: a text is cut between words, where there are any


class Cutter:
    """Cuts examples for one tokenizer and one way of `data.overflow`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, count: Count, retrieve: bool = False
    ) -> None:
        if retrieve:
            check_installed()
        self._retrieve = retrieve
        self._tokenizer = tokenizer
        self._count = count
        self._sentences = lru_cache(maxsize=4)(self._counted)

    def overflows(self, persona: Persona, history: History, room: int) -> bool:
        """Whether persona and last turn take more than `room` tokens."""
        last = history[-1:]
        # A text of 128 k tokens is not put into the template to learn that: that would keep the
        # ids of each such text. Sentences by themselves have about as many.
        _, tokens = self._sentences(persona)
        rough = int(tokens.sum()) + sum(map(len, self._ids(last)))
        return rough > 2 * room or self._count(persona, last) > room

    def cut(self, persona: Persona, history: History, room: int) -> tuple[Persona, History]:
        """Return persona and dialogue so that the persona and the last turn fit together."""
        # A short dialogue leaves more than half to the persona.
        dialogue = self._count((), history) - self._count((), ())
        last = history[-1:]
        persona = self._cut_persona(persona, last, max(room // 2, room - dialogue - _SPARE))
        if last and self._count(persona, last) > room:
            # Only what could fit is looked at: no text of 128 k tokens is tried in the template.
            text = last[0]
            kept = _longest(
                len(text), lambda size: self._count(persona, (text[len(text) - size :],)) <= room
            )
            last = (_from_a_word(text[len(text) - kept :], cut=kept < len(text)),)
        return persona, (*history[:-1], *last)

    def _cut_persona(self, persona: Persona, last: History, most: int) -> Persona:
        sentences, tokens = self._sentences(persona)
        if int(tokens.sum()) <= 2 * most and self._count(persona, ()) <= most:
            return persona
        order = np.arange(len(sentences))
        if self._retrieve and last:
            order = nearest_first(sentences, last[-1])
        spare = most - self._count((), ())
        taken = int(np.searchsorted(np.cumsum(tokens[order]), spare, side="right"))
        # The template may need a token or two more than its pieces by themselves.
        while taken and self._count(self._chosen(sentences, order[:taken]), ()) > most:
            taken -= 1
        if taken or not sentences:
            return self._chosen(sentences, order[:taken])
        first = sentences[order[0]]
        kept = _longest(len(first), lambda size: self._count((first[:size],), ()) <= most)
        text = _to_a_word(first[:kept], cut=kept < len(first))
        return (text,) if text else ()

    @staticmethod
    def _chosen(sentences: Persona, numbers: np.ndarray) -> Persona:
        """The chosen sentences in the order of the persona."""
        return tuple(sentences[number] for number in sorted(numbers))

    def _counted(self, persona: Persona) -> tuple[Persona, np.ndarray]:
        """The sentences of a persona, and the tokens of each, int64 [n]."""
        sentences = tuple(
            sentence.strip()
            for text in persona
            for sentence in _SENTENCE_END.split(text)
            if sentence.strip()
        )
        return sentences, np.array([len(ids) for ids in self._ids(sentences)], dtype=np.int64)

    def _ids(self, texts: tuple[str, ...]) -> list[list[int]]:
        return plain_ids(self._tokenizer, [f" {text}" for text in texts])


def _longest(size: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `size` that fits, where all below one that fits do; else 0."""
    low, high = 0, min(64, size)
    while high < size and fits(high):
        low, high = high, min(2 * high, size)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _to_a_word(text: str, cut: bool) -> str:
    """`text` without the beginning of a word at its end."""
    end = max(text.rfind(blank) for blank in (" ", "\n"))
    return text[:end].strip() if cut and 0 < len(text) - end <= _LONGEST_WORD else text.strip()


def _from_a_word(text: str, cut: bool) -> str:
    """`text` without the end of a word at its beginning."""
    starts = [at for blank in (" ", "\n") if 0 <= (at := text.find(blank)) < _LONGEST_WORD]
    return text[min(starts) :].strip() if cut and starts else text.strip()


# BM25, by the package bm25s


def check_installed() -> None:
    """Raise DataError where the package is missing."""
    try:
        import bm25s  # noqa: F401 (only its presence is asked for)
    except ImportError as error:
        raise DataError(
            "data.overflow: retrieve needs the package bm25s, which is not installed; install it"
            " with: pip install 'spt-ds[retrieve]', or set data.overflow: truncate"
        ) from error


def nearest_first(sentences: tuple[str, ...], query: str) -> np.ndarray:
    """Numbers of the sentences, the best score first, int64 [n]; equals keep their order."""
    words = _words([query])[0]
    index = _index(sentences)
    if index is None or not words:
        return np.arange(len(sentences))
    scores = np.asarray(index.get_scores(words))
    return np.argsort(-scores, kind="stable")


# The examples of a dialogue, which share a persona, follow one another.
@lru_cache(maxsize=4)
def _index(sentences: tuple[str, ...]) -> Any:
    """The index of a persona; None where no sentence has a word."""
    import bm25s

    corpus = _words(sentences)
    if not any(corpus):
        return None
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    return index


def _words(texts: Sequence[str]) -> list[list[str]]:
    import bm25s

    words: list[list[str]] = bm25s.tokenize(
        list(texts), token_pattern=_WORD, stopwords=None, return_ids=False, show_progress=False
    )
    return words
