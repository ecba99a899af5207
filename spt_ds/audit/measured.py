"""What a bank of prompts does on held-out examples, as plain arrays. No torch.

Legend: N examples, K prompts, F numbers that a gate could read of a context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spt_ds.evaluate.statistic import Statistic, Sums, grouped, ratio
from spt_ds.evaluate.text_metrics import Floats

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """The words of one example."""

    persona: tuple[str, ...]
    history: tuple[str, ...]
    response: str
    dialogue: str
    """The same for all examples of one dialogue."""


@dataclass(frozen=True)
class Measured:
    """Losses are in nats a reply, the sum over its tokens."""

    losses: Floats
    """[N, K] of each reply under each prompt."""
    tokens: Floats
    """[N] target tokens of each reply."""
    ensemble: Floats
    """[N] where the probabilities of each token are averaged over the prompts."""
    scores: Floats
    """[N, K] of the retriever."""
    features: dict[str, Floats]
    """[N, F] by name: what a gate could read of the contexts."""
    texts: list[Text]

    @property
    def count(self) -> int:
        """K."""
        return self.losses.shape[1]

    @property
    def selected(self) -> Ints:
        """[N] prompts of the highest score."""
        return self.scores.argmax(axis=1)

    @property
    def best(self) -> Ints:
        """[N] prompts of the lowest loss."""
        return self.losses.argmin(axis=1)

    @property
    def units(self) -> Ints:
        """[N] dialogue of each example, numbered from 0 in order of appearance."""
        known: dict[str, int] = {}
        return np.asarray([known.setdefault(text.dialogue, len(known)) for text in self.texts])

    def of(self, prompts: Ints) -> Floats:
        """[N] losses of each reply under the given prompt of each."""
        return self.losses[np.arange(len(prompts)), prompts]

    def folds(self, count: int) -> Ints:
        """[N] number of the fold of each example; a dialogue is never in two."""
        return self.units % count

    def per_token(self, losses: Floats) -> Statistic:
        """The mean of [N] losses of replies over all tokens, in nats, by dialogues."""
        return grouped(ratio(losses, self.tokens, lambda mean: mean), self.units.tolist())

    def of_sums(self, columns: Sequence[Floats], finish: Callable[[Floats], Floats]) -> Statistic:
        """`finish` of the sums of [N] columns, by dialogues."""
        return grouped(Sums(np.stack(columns, axis=1), finish), self.units.tolist())
