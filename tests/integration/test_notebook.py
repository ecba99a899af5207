"""The notebook on one's own dialogues: its cells run in order, and its text keeps the rules."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_words import BANNED, paragraphs, plain, sentences, too_long

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial" / "own-dialogues.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def sources(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind]


def test_every_cell_runs(tmp_path: Path) -> None:
    # As a kernel would: one process, one namespace, cell by cell.
    script = "import json, sys\nfor cell in json.load(sys.stdin):\n    exec(cell, globals())\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SPT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(sources("code")),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    replies = (tmp_path / "runs/notebook/generate/predictions.jsonl").read_text(encoding="utf-8")
    assert replies.count("\n") == 2
    assert re.search(r"^F1", done.stdout, re.M)
    assert (
        len(re.findall(r"^i answer for the \w+\. .* from prompt [01]; scores", done.stdout, re.M))
        == 2
    )
    assert re.findall(r"^([01]) ", done.stdout, re.M)[-2:] == ["0", "1"]


def test_it_is_stored_without_outputs() -> None:
    for cell in CELLS:
        assert not cell.get("outputs"), cell["id"]
        assert cell.get("execution_count") is None, cell["id"]


@pytest.mark.parametrize("text", sources("markdown"), ids=lambda text: text.splitlines()[0])
def test_its_text_is_plain_and_its_links_hold(text: str) -> None:
    for paragraph in paragraphs(text):
        assert [s for s in sentences(paragraph) if too_long(s)] == []
        assert [p for p in BANNED if re.search(rf"\b(?:{p})\b", plain(paragraph), re.I)] == []
    for name in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (NOTEBOOK.parent / name).exists(), name
