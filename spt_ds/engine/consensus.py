"""Which of several replies to a context to give: the one that is most like all of them.

Minimum Bayes risk over a handful of candidates (Kumar and Byrne 2004; Eikema and Aziz 2020): each
candidate stands for the share of replies that its prompt would give, and the loss of a reply is
1 - F1 of words. Equal texts have an F1 of 1, also where they have no words.
"""

from __future__ import annotations

from collections.abc import Sequence

from spt_ds.evaluate.text_metrics import f1_parlai


def consensus(replies: Sequence[str], weights: Sequence[float]) -> int:
    """The index of the reply with the highest expected F1 against all, itself included.

    Args: weights, the share of each, not negative. Where replies are equally good, the one of the
    larger share is taken, then the first.
    """

    def worth(place: int) -> tuple[float, float, int]:
        gains = (
            weight * (1.0 if other == replies[place] else f1_parlai(replies[place], other))
            for other, weight in zip(replies, weights, strict=True)
        )
        # Equal texts must be equally good, whatever the order of the sum's rounding.
        return round(sum(gains), 12), weights[place], -place

    return max(range(len(replies)), key=worth)
