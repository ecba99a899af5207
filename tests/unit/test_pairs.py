"""Contrastive targets: the same BLEU as sacrebleu's, the golden direction and text, pairs over the
whole window.
"""

from __future__ import annotations

import json
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from spt_ds.data.pairs import contrast_pairs, pair_text, sentence_bleu_matrix

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden_opt_tiny_k3"
# Few words, so that texts share n-grams, repeat them, and are often shorter than four words.
texts = st.lists(st.text(alphabet="ab3,.-& ", max_size=24), min_size=2, max_size=5)


@given(texts)
def test_matrix_equals_sacrebleu(given_texts: list[str]) -> None:
    got = sentence_bleu_matrix(given_texts)
    for i, j in permutations(range(len(given_texts)), 2):
        expected = sacrebleu.sentence_bleu(
            given_texts[i], [given_texts[j]], use_effective_order=True
        ).score
        assert got[i, j] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_earlier_example_is_the_hypothesis() -> None:
    """A short hypothesis is punished for its brevity, a long one for its words: the direction
    shows.
    """
    long, short = "i like to ski in the alps every single winter", "i like to ski"
    matrix = sentence_bleu_matrix([long, short])
    assert matrix[0, 1] == pytest.approx(26.269098944241588)
    assert matrix[1, 0] == pytest.approx(22.31301601484299)
    assert contrast_pairs([long, short], [True, True], 24.0)[1].tolist() == [1.0]
    assert contrast_pairs([short, long], [True, True], 24.0)[1].tolist() == [-1.0]


def test_threshold_itself_is_not_similar() -> None:
    score = sentence_bleu_matrix(["a b c d e", "a b c d f"])[0, 1]
    assert contrast_pairs(["a b c d e", "a b c d f"], [True, True], score)[1].tolist() == [-1.0]
    assert contrast_pairs(["a b c d e", "a b c d f"], [True, True], np.nextafter(score, 0))[
        1
    ].tolist() == [1.0]


@given(st.lists(st.booleans(), min_size=2, max_size=9))
def test_fault_09_pairs_with_a_local_side_over_the_whole_window(local: list[bool]) -> None:
    pairs, targets = contrast_pairs(
        [f"text {n % 3} of many" for n in range(len(local))], local, 20.0
    )
    assert [tuple(pair) for pair in pairs] == [
        (i, j) for i, j in combinations(range(len(local)), 2) if local[i] or local[j]
    ]
    assert pairs.shape == (len(targets), 2)
    assert (pairs.dtype, targets.dtype) == (np.int64, np.float32)


def test_examples_are_compared_by_persona_and_without_one_by_dialogue() -> None:
    assert pair_text(("i ski.", "i cook."), ("hi",)) == "i ski. i cook."
    assert pair_text((), ("hi", "hello")) == "hi hello"


def test_golden_pairs() -> None:
    golden = np.load(GOLDEN / "golden.npz")
    personas = json.loads((GOLDEN / "batch.json").read_text(encoding="utf-8"))["persona_list"]
    found = [pair_text(persona, ()) for persona in personas]
    pairs, targets = contrast_pairs(found, [True] * 3, 20.0)
    assert pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert targets.tolist() == golden["ctr_target"].tolist()
    scores = sentence_bleu_matrix(found)[pairs[:, 0], pairs[:, 1]]
    np.testing.assert_allclose(scores, golden["bleu_pairs"], rtol=1e-8)
