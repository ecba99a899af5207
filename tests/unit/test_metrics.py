"""The log of a run that was killed and goes on: each step and each validation once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spt_ds.engine.metrics import Metrics
from spt_ds.run.folder import RunFolder

LINES = [(0, "valid"), (1, "train"), (2, "train"), (2, "valid"), (3, "train")]


@pytest.mark.parametrize(
    ("start", "revalidates", "kept"),
    [
        (2, False, LINES[:4]),
        (2, True, LINES[:3]),
        (0, True, []),
        (3, False, LINES),
        (3, True, LINES),
    ],
)
def test_what_is_done_again_is_forgotten(
    tmp_path: Path, start: int, revalidates: bool, kept: list[tuple[int, str]]
) -> None:
    folder = RunFolder(tmp_path)
    text = "".join(
        json.dumps({"step": step, "kind": kind, "time": 1.0}) + "\n" for step, kind in LINES
    )
    folder.metrics.write_text(text + '{"step": 1, "ki', encoding="utf-8")
    Metrics(folder, 4, start, revalidates=revalidates, active=True, tensorboard=False)
    found = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["kind"]) for line in found] == kept
