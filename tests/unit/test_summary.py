"""The table of a finished run, from its files alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from spt_ds.summary import main

LOSSES = {"loss": 7.0, "nll": 2.5, "nll_selected": 2.4}


def finished(folder: Path, *, scored: bool) -> Path:
    done = {
        "step": 40,
        "world_size": 2,
        "trained_parameters": 1024,
        "valid_before": LOSSES,
        "valid_after": {**LOSSES, "loss": 5.25},
    }
    (folder / "DONE.json").write_text(json.dumps(done))
    if scored:
        (folder / "generate").mkdir()
        values = {"f1_spt": 12.345, "bleu": 1.0, "dist1": 2.0, "dist2": 3.0}
        lines = "".join(json.dumps({"prompt": k}) + "\n" for k in (0, 2, 2))
        (folder / "generate" / "predictions.jsonl").write_text(lines)
        settings = {"predictions_sha256": hashlib.sha256(lines.encode()).hexdigest()}
        (folder / "generate" / "scores.json").write_text(
            json.dumps({"values": values, "settings": settings})
        )
    return folder


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished(tmp_path, scored=True))]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {name: text.strip() for name, text in lines.items()}
    assert rows["steps"] == "40 on 2 rank(s)"
    assert rows["validation loss"] == "7.0000 before, 5.2500 after"
    assert rows["F1 (SPT)"] == "12.35"
    assert rows["prompt usage"] == "0: 1, 2: 2"
    assert rows["run folder"] == str(tmp_path)


def test_scores_of_other_replies_are_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path, scored=True)
    (run / "generate" / "predictions.jsonl").write_text('{"prompt": 1}\n')
    assert main([str(run)]) == 0
    out = capsys.readouterr().out
    assert "F1" not in out
    assert "those of other replies; run `spt-ds evaluate` again" in out


def test_without_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished(tmp_path, scored=False))]) == 0
    assert "F1" not in capsys.readouterr().out


def test_a_run_that_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "train it to the end first" in capsys.readouterr().err


def test_three_replies_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path, scored=False)
    for name in ("generate", "before"):
        (run / name).mkdir()
        lines = [
            {
                "index": number,
                "id": f"d-{number}",
                "dialogue_id": "d",
                "persona": ["i ski.", f"i am {number}."],
                "history": ["hi", f"how old are you {number}?"],
                "reference": f"reference {number}",
                "raw": f"said {number} {name}\x1b[2J Q: and you?",
                "prompt": number % 2 if name == "generate" else None,
            }
            for number in range(6)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / name / "predictions.jsonl").write_text(text)
    assert main([str(run)]) == 0
    table, *blocks = capsys.readouterr().out.split("\n\n")
    assert "prompt usage" in table
    assert [block.splitlines() for block in blocks][1:] == [
        [
            f"persona       i ski. i am {number}.",
            f"partner       how old are you {number}?",
            f"reply before  said {number} before\\x1b[2J",
            f"reply after   said {number} generate\\x1b[2J  (prompt {number % 2})",
            f"reference     reference {number}",
        ]
        for number in (3, 5)
    ]
    assert len(blocks) == 3
    (run / "before" / "predictions.jsonl").write_text(text.replace("d-3", "e-3"))
    assert main([str(run)]) == 2
    assert "field 'id' is 'e-3'" in capsys.readouterr().err
