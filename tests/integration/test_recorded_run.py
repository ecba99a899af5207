"""A run folder that release 0.1.0 wrote still resumes, answers, generates and is told of."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spt_ds import dist
from spt_ds.cli import main as spt_ds_main
from spt_ds.config.load import options_of
from spt_ds.config.schema import Config
from spt_ds.evaluate.scored_runs import read_run
from spt_ds.generate import main as generate_main
from spt_ds.train import main as train_main
from tests.helpers.ranks import run_ranks

RECORDED = Path(__file__).resolve().parents[1] / "data" / "run_0_1_0"
LAST = Path("checkpoints") / "step-00000004"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the recorded folder; the paths in its configuration are relative to it."""
    return Path(shutil.copytree(RECORDED, tmp_path / "recorded"))


def call(world: dist.World, folder: Path, command: str, argv: list[str]) -> int:
    os.chdir(folder)
    mains = {"train": train_main, "generate": generate_main}
    return mains[command](argv)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("world", [1, 2])
def test_it_resumes_and_ends_as_0_1_0_did(folder: Path, world: int) -> None:
    shutil.rmtree(folder / "run" / LAST)
    (folder / "run" / "DONE.json").unlink()
    argv = ["--config", "recipe.yaml", "--run-dir", "run"]
    assert run_ranks(world, call, folder, "train", argv) == [0] * world
    names = "trainables.safetensors", "optimizer.safetensors"
    for name in names:
        ours = load_file(folder / "run" / LAST / name)
        recorded = load_file(RECORDED / "run" / LAST / name)
        assert ours.keys() == recorded.keys()
        for key, value in recorded.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)
    told = rows(folder / "run" / "metrics.jsonl")
    recorded_rows = rows(RECORDED / "run" / "metrics.jsonl")
    assert [(row["step"], row["kind"]) for row in told] == [
        (row["step"], row["kind"]) for row in recorded_rows
    ]
    assert [row["loss"] for row in told] == pytest.approx(
        [row["loss"] for row in recorded_rows], rel=1e-5
    )


def test_it_is_known_to_be_done(folder: Path) -> None:
    before = sorted(path.stat().st_mtime_ns for path in (folder / "run").rglob("*"))
    argv = ["--config", "recipe.yaml", "--run-dir", "run"]
    assert run_ranks(1, call, folder, "train", argv) == [0]
    assert sorted(path.stat().st_mtime_ns for path in (folder / "run").rglob("*")) == before


def test_it_generates_the_same_replies(folder: Path) -> None:
    assert run_ranks(2, call, folder, "generate", ["run", "--out", "again"]) == [0, 0]
    again = rows(folder / "again" / "predictions.jsonl")
    recorded = rows(RECORDED / "run" / "generate" / "predictions.jsonl")
    for ours, theirs in zip(again, recorded, strict=True):
        assert ours.pop("scores") == pytest.approx(theirs.pop("scores"), abs=1e-5)
        assert ours == theirs


def test_it_is_told_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "run")
    assert spt_ds_main(["summary", run]) == 0
    shown = capsys.readouterr().out
    assert "4 on 1 rank(s)" in shown
    assert "0: 5, 2: 1" in shown
    same = str(folder / "run" / "generate")
    assert spt_ds_main(["compare", run, same, "--out", str(folder / "table")]) == 0
    options = read_run(folder / "run").options  # keys of 0.1.0 have their names of today
    assert options.keys() <= options_of(Config()).keys()
    assert spt_ds_main(["report", run, "--out", str(folder / "report.html")]) == 0
    assert "recorded" in (folder / "report.html").read_text(encoding="utf-8")
