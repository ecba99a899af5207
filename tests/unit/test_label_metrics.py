"""Accuracy, macro F1, MAE and RMSE: by hand, as scikit-learn has them, with intervals and tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spt_ds import cli
from spt_ds.errors import DataError
from spt_ds.evaluate.corpus_metrics import corpus_metrics
from spt_ds.evaluate.label_metrics import accuracy, errors, f1_macro
from spt_ds.evaluate.scores_json import evaluate
from spt_ds.run.predictions import read_predictions
from tests.helpers.predictions import lines, write

LABELS = ("red", "blue", "green", "grey")
GOLDS = ["red", "red", "blue", "blue", "blue", "green", "red", "green", "blue", "red"]
ANSWERS = ["red", "blue", "blue", "green", "blue", "green", "red", "pink", "red", "red"]


def labelled(golds: list[str], answers: list[str], choices: Any) -> list[dict[str, Any]]:
    (row, *_) = lines()
    return [
        {
            **row,
            "index": place,
            "id": f"q{place}",
            "dialogue_id": f"d{place}",
            "reference": gold,
            "raw": f" {answer}\n",
            "clean": "none",
            "choices": list(choices),
        }
        for place, (gold, answer) in enumerate(zip(golds, answers, strict=True))
    ]


def test_by_hand_and_as_scikit_learn_has_them() -> None:
    """Red: 3 right of 4 given and 4 wanted; blue 2 of 3 and 4; green 1 of 2 and 2; grey never.

    scikit-learn 1.7.2 gives accuracy_score 0.6 and f1_score 0.45535714285714285 with these labels,
    mean_absolute_error 0.875 and root_mean_squared_error 1.3693063937629153 below.
    """
    by_hand = 100 * (2 * 3 / 8 + 2 * 2 / 7 + 2 * 1 / 4 + 0) / 4
    assert f1_macro(GOLDS, ANSWERS, LABELS).value() == pytest.approx(by_hand, abs=1e-12)
    assert by_hand == pytest.approx(45.535714285714285)
    assert accuracy(GOLDS, ANSWERS).value() == pytest.approx(60.0)
    found = errors(list("15324451"), list("25125421"))
    assert found["mae"].value() == pytest.approx((1 + 0 + 2 + 0 + 1 + 0 + 3 + 0) / 8)
    assert found["rmse"].value() == pytest.approx(((1 + 4 + 1 + 9) / 8) ** 0.5)
    assert found["rmse"].value() == pytest.approx(1.3693063937629153)


@pytest.mark.parametrize(
    ("seed", "right", "f1", "mae", "rmse"),
    [
        (0, 26.6666666667, 24.701754386, 1.1, 1.3540064008),
        (1, 40.0, 39.577020202, 1.1, 1.5383974346),
        (2, 20.0, 18.8492063492, 1.7666666667, 2.2435091561),
        (3, 50.0, 49.3333333333, 0.7, 1.0488088482),
    ],
)
def test_drawn_labels_give_what_scikit_learn_gave(
    seed: int, right: float, f1: float, mae: float, rmse: float
) -> None:
    """Recorded with scikit-learn 1.7.2, which is no package of ours."""
    draw, labels = random.Random(seed), list("12345"[: 3 + seed % 3])
    golds, answers = draw.choices(labels, k=30), draw.choices(labels, k=30)
    assert accuracy(golds, answers).value() == pytest.approx(right)
    assert f1_macro(golds, answers, labels).value() == pytest.approx(f1)
    found = errors(golds, answers)
    assert (found["mae"].value(), found["rmse"].value()) == pytest.approx((mae, rmse))


def test_a_file_with_choices_has_them_with_intervals(tmp_path: Path) -> None:
    path = write(tmp_path / "predictions.jsonl", labelled(GOLDS, ANSWERS, LABELS))
    found = evaluate(path)
    assert found.values["accuracy"] == pytest.approx(60.0)
    assert found.values["f1_macro"] == pytest.approx(45.535714285714285)
    assert "mae" not in found.values
    for key in ("accuracy", "f1_macro"):
        low, high = found.intervals[key]
        assert 0 < low < found.values[key] < high < 100
    # Left out one by one, as the intervals need it.
    statistic = corpus_metrics(read_predictions(path)).statistics["f1_macro"]
    rest = []
    for n in range(len(GOLDS)):
        kept = (GOLDS[:n] + GOLDS[n + 1 :], ANSWERS[:n] + ANSWERS[n + 1 :])
        rest.append(f1_macro(*kept, LABELS).value())
    assert statistic.leave_one_out().tolist() == pytest.approx(rest)


def test_numbers_have_errors_and_two_files_are_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    golds = [draw.choice("12345") for _ in range(60)]
    near = [str(min(5, int(gold) + (n % 4 == 0))) for n, gold in enumerate(golds)]
    far = [draw.choice("12345") for _ in golds]
    good = write(tmp_path / "a" / "predictions.jsonl", labelled(golds, near, "12345"))
    poor = write(tmp_path / "b" / "predictions.jsonl", labelled(golds, far, "12345"))
    pairs = corpus_metrics(read_predictions(good)).against(corpus_metrics(read_predictions(poor)))
    for key, better in (("accuracy", 1), ("f1_macro", 1), ("mae", -1), ("rmse", -1)):
        assert pairs[key].difference * better > 0
        assert pairs[key].p < 0.01
    assert cli.main(["evaluate", str(good), "--against", str(poor)]) == 0
    out = capsys.readouterr().out
    for label in ("accuracy", "F1 macro", "MAE", "RMSE"):
        assert f"\n{label} " in out


def leave_out(rows: list[dict[str, Any]]) -> None:
    del rows[2]["choices"]


def other_choices(rows: list[dict[str, Any]]) -> None:
    rows[3]["choices"] = [*rows[3]["choices"], "9"]


def no_number(rows: list[dict[str, Any]]) -> None:
    rows[1]["raw"] = "five"


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (leave_out, "labels", "line 3 lists no 'choices'"),
        (other_choices, "F1 macro", "choices on line 4 are not those on line 1"),
        (no_number, "MAE and RMSE", "reply on line 2 is no number"),
    ],
)
def test_what_cannot_be_scored_is_told(
    tmp_path: Path, change: Callable[[Any], None], name: str, words: str
) -> None:
    rows = labelled(list("12312"), list("12312"), "123")
    change(rows)
    found = evaluate(write(tmp_path / "predictions.jsonl", rows))
    assert words in found.skipped[name]
    assert ("accuracy" in found.values) == (name != "labels")


def test_choices_without_the_reference_are_refused(tmp_path: Path) -> None:
    rows = labelled(["1", "4"], ["1", "2"], "123")
    with pytest.raises(DataError, match=r"predictions\.jsonl:2: field 'choices' .* lacks"):
        evaluate(write(tmp_path / "predictions.jsonl", rows))
