"""The reply that is kept of several."""

from __future__ import annotations

import itertools
import random

import pytest

from spt_ds.engine.consensus import consensus
from spt_ds.evaluate.text_metrics import f1_parlai

TEXTS = ["i like tea", "i like tea a lot", "cats sleep all day", "", "i like cats"]


def test_the_reply_that_is_most_like_the_others() -> None:
    assert consensus(["cats sleep", "i like tea", "i like green tea"], [1 / 3] * 3) == 1
    assert consensus(["i like tea"], [1.0]) == 0
    assert consensus(["", "", "tea"], [0.3, 0.3, 0.4]) == 0  # two that say nothing agree


def test_shares_decide_where_prompts_contradict_each_other() -> None:
    texts = ["SURE WE DO", "yes indeed sir", "yes indeed madam"]
    assert consensus(texts, [0.9, 0.05, 0.05]) == 0
    assert consensus(texts, [0.1, 0.5, 0.4]) == 1


def test_ties_go_to_the_larger_share_and_then_to_the_first() -> None:
    assert consensus(["a b", "c d"], [0.5, 0.5]) == 0
    assert consensus(["tea", "tea", "tea"], [0.2, 0.5, 0.3]) == 1


@pytest.mark.parametrize("seed", range(20))
def test_against_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    texts = draw.choices(TEXTS, k=5)
    weights = [draw.random() for _ in texts]
    gains = [
        sum(
            weight * (1.0 if texts[one] == texts[other] else f1_parlai(texts[one], texts[other]))
            for other, weight in enumerate(weights)
        )
        for one in range(5)
    ]
    assert gains[consensus(texts, weights)] == pytest.approx(max(gains))


def test_the_order_of_the_candidates_does_not_change_the_text() -> None:
    texts, weights = TEXTS[:3] + TEXTS[4:], [0.1, 0.2, 0.3, 0.4]
    kept = {
        texts[order[consensus([texts[n] for n in order], [weights[n] for n in order])]]
        for order in itertools.permutations(range(4))
    }
    assert len(kept) == 1
