"""The guide to labels and choices, word for word: a bank learns a label that a profile tells."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pages import ROOT, bash

PAGE = ROOT / "docs" / "how-to" / "labels-and-choices.md"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which all that the page says was done, and what the last command printed."""
    folder = tmp_path_factory.mktemp("choices")
    out = ""
    text = PAGE.read_text(encoding="utf-8")
    for language, script in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        out = out if language else bash(script, folder)
    return folder, out


def predictions(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_bank_learns_a_label_that_follows_from_the_profile(followed: tuple[Path, str]) -> None:
    folder, out = followed
    values = json.loads((folder / "runs/colours/generate/scores.json").read_text())["values"]
    before = predictions(folder / "runs/colours/before")
    right = sum(line["reply"] == line["reference"] for line in before)
    assert values["accuracy"] > 90, "chance is 33"
    assert values["f1_macro"] > 90
    assert right <= 0.6 * len(before), "the base alone does not know it"
    (row,) = re.findall(r"^accuracy +.*$", out, re.M)
    assert float(row.split()[4]) == pytest.approx(values["accuracy"] - 100 * right / 60, abs=0.01)
    assert row.endswith("< 0.0001")


def test_the_lines_tell_what_was_chosen_and_why(followed: tuple[Path, str]) -> None:
    for line in predictions(followed[0] / "runs/colours/generate"):
        assert line["choices"] == ["red", "blue", "green"]
        best = line["choice_nll"].index(min(line["choice_nll"]))
        assert line["reply"] == line["raw"] == line["choices"][best]
        assert line["nll_sum"] == line["choice_nll"][line["choices"].index(line["reference"])]
        assert line["new_tokens"] == line["choice_tokens"][best]
        assert re.fullmatch(r"(tag|text): .+; (tag|text): .+", line["persona"][0])


def test_without_the_profile_it_is_at_chance(followed: tuple[Path, str]) -> None:
    """What tells the label is the profile, and nothing else."""
    folder, _ = followed
    bash("spt-ds generate runs/colours --set data.persona=false --out blind", folder)
    lines = predictions(folder / "blind")
    assert sum(line["reply"] == line["reference"] for line in lines) <= 0.5 * len(lines)


def test_a_question_may_be_answered_as_text_and_scored_as_a_label(
    followed: tuple[Path, str],
) -> None:
    folder, _ = followed
    free = "--set generate.choices=none --set data.max_test_examples=9 --out free"
    bash(f"spt-ds generate runs/colours {free}", folder)
    assert all(
        line["choices"] and "choice_nll" not in line for line in predictions(folder / "free")
    )
    assert re.search(r"^accuracy +\d", bash("spt-ds evaluate free", folder), re.M)
