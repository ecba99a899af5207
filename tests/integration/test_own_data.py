"""The tutorial on one's own dialogues, word for word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.pages import ROOT, bash
from tests.helpers.real_base import real_base

PAGE = ROOT / "docs" / "tutorial" / "own-data.md"


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_every_command_of_the_page(tmp_path: Path) -> None:
    *first, talk = blocks("")
    for script in first:
        out = bash(script, tmp_path)
    check_runs(tmp_path, out)
    assert bash(talk, tmp_path).strip()


@pytest.mark.slow
def test_the_same_with_a_language_model(tmp_path: Path) -> None:
    logs, settings, commands, talk = blocks("")
    bash(logs, tmp_path)
    bash(settings, tmp_path)
    (lines,) = blocks("yaml")
    text = (tmp_path / "bank.yaml").read_text(encoding="utf-8")
    for line in lines.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(real_base())).splitlines():
        key = line.partition(":")[0]
        text, count = re.subn(rf"^{key}: .*$", lambda _: line, text, flags=re.M)  # noqa: B023
        assert count == 1
    (tmp_path / "bank.yaml").write_text(text, encoding="utf-8")
    check_runs(tmp_path, bash(commands, tmp_path))
    assert bash(talk, tmp_path).strip()


def check_runs(folder: Path, said: str) -> None:
    """Both runs answered the held-out dialogues and are in the table that was printed."""
    assert re.search(r"^metric +one +bank ", said, re.M)
    for run in ("one", "bank"):
        replies = folder / "runs" / run / "generate" / "predictions.jsonl"
        assert replies.read_text(encoding="utf-8").count("\n") == 4
