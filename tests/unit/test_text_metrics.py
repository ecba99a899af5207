"""Every metric against its library, a hand-worked case or a second writing of its definition."""

from __future__ import annotations

import json
import math
import random
import re
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from spt_ds.evaluate import rouge_bert, text_metrics
from spt_ds.evaluate.scores_json import evaluate
from spt_ds.evaluate.statistic import Sums

# (raw prediction, reference, the prediction cut by hand)
FIXED = [
    (
        " i like to read and hike . Q: what do you like ?",
        "i love to hike and read books .",
        " i like to read and hike . ",
    ),
    (
        "hello , how are you today ?\nR: good",
        "hi , how are you doing today ?",
        "hello , how are you today ?",
    ),
    ("i am a teacher . i am happy .", "i work as a teacher .", "i am a teacher . i am happy ."),
    ("Summary: nothing", "that is nice to hear .", ""),
    ("i wake up at 5:30 every day", "i wake up early .", "i wake up at 5"),
    (" R: i have two dogs and a cat", "i have a dog and two cats .", " "),
    ("The dog's name is Max!", "my dog's name is max .", "The dog's name is Max!"),
    ("i do  not know .", "i do not know what to say .", "i do  not know ."),
    ("i am a teacher . i teach maths .", "what do you teach ?", "i am a teacher . i teach maths ."),
    (
        "i like to read and hike .",
        "me too , i like to read and hike .",
        "i like to read and hike .",
    ),
]
REPLIES = [cut for _, _, cut in FIXED]
REFERENCES = [reference for _, reference, _ in FIXED]
# Of the fixed replies, to four digits: held apart so that the code and its second writing cannot
# drift together.
FIXED_SCORES = {
    "f1_spt": 50.1441,
    "f1_parlai": 52.5668,
    "bleu": 26.7838,
    "dist1": 57.8947,
    "dist2": 74.4681,
    "dist3": 76.9231,
}

words = st.text(alphabet="ab c.", max_size=12)
reply_lists = st.lists(words, min_size=1, max_size=8)


@pytest.mark.parametrize(("raw", "_reference", "cut"), FIXED)
def test_clean_cuts_before_the_first_stop(raw: str, _reference: str, cut: str) -> None:
    assert text_metrics.clean(raw) == cut


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ("i like dogs . Q", "i like dogs ."),
        ("i like dogs . R", "i like dogs ."),
        ("so Summ", "so"),
        ("so Summary", "so"),
        ("Q", ""),
        ("ok Q ", "ok"),
        ("i got an A", "i got an A"),
        ("my IQ", "my IQ"),
        ("Qs and R , Sum , then", "Qs and R , Sum , then"),
        ("", ""),
    ],
)
def test_half_a_marker_at_the_end_is_dropped(cut: str, kept: str) -> None:
    assert text_metrics.without_half_marker(cut) == kept


@given(st.text(alphabet="RQ:Summary\n ", max_size=20))
def test_clean_is_a_prefix_without_stops_and_stays(raw: str) -> None:
    cut = text_metrics.clean(raw)
    assert raw.startswith(cut)
    assert ":" not in cut
    assert "\n" not in cut
    assert text_metrics.clean(cut) == cut


def _again(replies: list[str], references: list[str]) -> dict[str, float]:
    """The definitions of the paper's scores, written a second time."""

    def f1(one: list[str], other: list[str]) -> float:
        left, same = list(other), 0
        for word in one:
            if word in left:
                left.remove(word)
                same += 1
        if same == 0:
            return 0.0
        precision, recall = same / len(one), same / len(other)
        return 2 * precision * recall / (precision + recall)

    def normal(text: str) -> list[str]:
        spaced = "".join(" " if letter in string.punctuation else letter for letter in text.lower())
        return [word for word in spaced.split() if word not in ("a", "an", "the")]

    found = {
        "f1_spt": (
            100
            * sum(f1(a.split(), b.split()) for a, b in zip(replies, references, strict=True))
            / len(replies)
        ),
        "f1_parlai": (
            100
            * sum(f1(normal(a), normal(b)) for a, b in zip(replies, references, strict=True))
            / len(replies)
        ),
        "bleu": BLEU().corpus_score(replies, [references]).score,
    }
    for n in (1, 2, 3):
        grams = []
        for reply in replies:
            tokens = reply.strip().split(" ")
            grams += [tuple(tokens[i : i + n]) for i in range(len(tokens)) if i + n <= len(tokens)]
        found[f"dist{n}"] = 100 * len(set(grams)) / len(grams)
    return found


def test_fixed_replies_reproduce_the_definitions_to_four_digits() -> None:
    cleaned = [re.split(r"R:|Q:|Summary:|\n|:", raw)[0] for raw, _, _ in FIXED]
    expected = _again(cleaned, REFERENCES)
    pairs = [(text_metrics.clean(raw), reference) for raw, reference, _ in FIXED]
    got = {
        "f1_spt": 100 * np.mean([text_metrics.f1_spt(*pair) for pair in pairs]),
        "f1_parlai": 100 * np.mean([text_metrics.f1_parlai(*pair) for pair in pairs]),
        "bleu": (
            Sums(
                text_metrics.bleu_rows(*map(list, zip(*pairs, strict=True))),
                text_metrics.bleu_of_sums,
            ).value()
        ),
        **{f"dist{n}": text_metrics.dist([reply for reply, _ in pairs], n) for n in (1, 2, 3)},
    }
    assert got == pytest.approx(expected, abs=5e-5)
    assert {key: round(float(value), 4) for key, value in got.items()} == FIXED_SCORES


def test_a_file_of_the_fixed_replies_scores_the_same(tmp_path: Path) -> None:
    rows = [
        {"index": n, "id": str(n), "dialogue_id": str(n), "reference": reference, "raw": raw}
        for n, (raw, reference, _) in enumerate(FIXED)
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = evaluate(path).values
    assert {key: round(values[key], 4) for key in FIXED_SCORES} == FIXED_SCORES


def test_f1_by_hand() -> None:
    assert text_metrics.f1_spt("a b b c", "b b b d") == pytest.approx(
        2 * (2 / 4) * (2 / 4) / (2 / 4 + 2 / 4)
    )
    assert text_metrics.f1_spt("the cat", "The cat") == pytest.approx(0.5)
    assert text_metrics.f1_parlai("the cat!", "The, cat") == 1.0
    assert text_metrics.f1_spt("", "a") == 0.0
    assert text_metrics.f1_parlai("the", "a") == 0.0


def test_parlai_normalisation_turns_punctuation_to_blanks() -> None:
    # SQuAD's normalisation would join "dont" and "wellknown"; ParlAI's does not.
    assert (
        text_metrics.parlai_normal("The well-known cat, an  ox: don't A+")
        == "well known cat ox don t"
    )


@given(words, words)
def test_f1_is_symmetric_bounded_and_blind_to_order(one: str, other: str) -> None:
    for f1 in (text_metrics.f1_spt, text_metrics.f1_parlai):
        value = f1(one, other)
        assert 0.0 <= value <= 1.0
        assert value == f1(other, one)
        assert value == f1(" ".join(reversed(one.split())), other)
    assert text_metrics.f1_spt(one, one) == (1.0 if one.split() else 0.0)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(words, words.filter(lambda text: bool(text.strip()))), min_size=1, max_size=6
    )
)
def test_bleu_of_summed_rows_is_sacrebleus_corpus_score(pairs: list[tuple[str, str]]) -> None:
    replies, references = map(list, zip(*pairs, strict=True))
    expected = BLEU().corpus_score(replies, [references]).score
    assert Sums(
        text_metrics.bleu_rows(replies, references), text_metrics.bleu_of_sums
    ).value() == pytest.approx(expected, abs=1e-9)


def test_bleu_signature_is_that_of_the_corpus_score() -> None:
    scorer = BLEU()
    scorer.corpus_score(REPLIES, [REFERENCES])
    assert text_metrics.bleu_signature() == str(scorer.get_signature())


def test_rouge_is_the_librarys_f_measure_without_stemmer() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(
        ["rouge1", "rouge2", "rougeL"], use_stemmer=False
    )
    rows = rouge_bert.rouge_rows(REPLIES, REFERENCES)
    for row, reply, reference in zip(rows, REPLIES, REFERENCES, strict=True):
        expected = scorer.score(target=reference, prediction=reply)
        assert row.tolist() == [expected[kind].fmeasure for kind in ("rouge1", "rouge2", "rougeL")]
    # By hand: "dog" and "dogs" are two words without a stemmer; LCS is "i", "dogs".
    one = rouge_bert.rouge_rows(["i love dogs"], ["i like the dogs"])[0]
    assert one.tolist() == pytest.approx([2 * 2 / 7, 0.0, 2 * 2 / 7])
    assert rouge_bert.rouge_rows(["dog"], ["dogs"])[0].tolist() == [0.0, 0.0, 0.0]


def test_dist_by_hand() -> None:
    assert text_metrics.distinct_and_total(["a b a", "a b"], 1) == (2, 5)
    assert text_metrics.distinct_and_total(["a b a", "a b"], 2) == (2, 3)
    assert text_metrics.dist(["a b a", "a b"], 2) == pytest.approx(200 / 3)
    # As in the paper's scores: an empty reply is one empty word, and so is the gap between two
    # blanks.
    assert text_metrics.distinct_and_total(["", " "], 1) == (1, 2)
    assert text_metrics.distinct_and_total(["a  b"], 1) == (3, 3)
    assert text_metrics.dist(["a", "b"], 2) == 0.0


def test_ead_by_hand_and_against_draws() -> None:
    # Two draws of three words: 3 (1 - (2/3)^2) = 5/3 distinct words are expected.
    assert text_metrics.ead(["x y"], 1, 3) == pytest.approx(100 * 2 / (5 / 3))
    rng = random.Random(0)
    corpora = [[" ".join(str(rng.randrange(50)) for _ in range(30))] for _ in range(400)]
    assert np.mean([text_metrics.ead(corpus, 1, 50) for corpus in corpora]) == pytest.approx(
        100.0, abs=1.0
    )
    assert np.mean([text_metrics.dist(corpus, 1) for corpus in corpora]) < 80.0


@given(reply_lists, st.integers(1, 3), st.integers(2, 10**6))
def test_diversity_bounds(replies: list[str], n: int, vocabulary: int) -> None:
    distinct, total = text_metrics.distinct_and_total(replies, n)
    dist, ead = text_metrics.dist(replies, n), text_metrics.ead(replies, n, vocabulary)
    assert 0.0 <= dist <= 100.0
    assert (dist == 100.0) == (distinct == total > 0)
    assert ead >= dist * (1 - 1e-9)  # no more than `total` distinct draws can be expected
    if n == 1:
        assert dist > 0.0
    if total:
        assert text_metrics.dist(replies * 2, n) == pytest.approx(dist / 2)
        assert text_metrics.ead(replies, n, 10**12) == pytest.approx(dist, rel=1e-6)


def test_normalised_entropy_by_hand() -> None:
    counts = np.asarray([[5, 5, 5, 5], [7, 0, 0, 0], [1, 1, 0, 0]], dtype=float)
    assert text_metrics.normalised_entropy(counts).tolist() == pytest.approx(
        [1.0, 0.0, math.log(2) / math.log(4)]
    )
    assert text_metrics.normalised_entropy(np.asarray([[3.0]])).tolist() == [0.0]


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6))
def test_normalised_entropy_is_bounded_and_blind_to_order(counts: list[int]) -> None:
    value = text_metrics.normalised_entropy(np.asarray([counts, counts[::-1]], dtype=float))
    assert value[0] == pytest.approx(value[1])
    assert 0.0 <= value[0] <= 1.0 + 1e-12


def test_summary_by_hand() -> None:
    assert text_metrics.summary([4, 1, 1]) == {"mean": 2.0, "min": 1.0, "median": 1.0, "max": 4.0}
