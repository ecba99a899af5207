"""A disk that fills up during a run: training goes on or stops, as configured, and what was saved
stays.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spt_ds import dist
from spt_ds.engine.trainer import Trainer
from spt_ds.errors import CheckpointError
from spt_ds.run import checkpoint
from spt_ds.run.folder import RunFolder
from tests.distributed.scenes import Scene, scene_trainer, train_scene
from tests.distributed.test_agree import ask_after
from tests.helpers.ranks import run_ranks


def train(world: dist.World, options: list[str], run_dir: Path, full: list[int]) -> tuple[str, int]:
    """Train 6 steps, saving each second one; the first rank's disk is full in the saves of the
    steps `full`.
    """
    write = checkpoint._write

    def refuse(path: Path, data: bytes) -> None:
        if any(path.parent.name == f".step-{step:08d}.writing" for step in full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    checkpoint._write = refuse
    with scene_trainer(world, options, run_dir) as trainer:
        try:
            return str(trainer.run()), trainer.state.step
        except CheckpointError as error:
            return str(error), trainer.state.step


@pytest.mark.parametrize(
    ("choice", "full", "ends", "at", "left"),
    [
        ("continue", [4], "0", 6, [2, 6]),
        ("continue", [2, 4], "0", 6, [6]),
        ("stop", [4], "No space left on device", 4, [2]),
        (
            "continue",
            [6],
            "No space left on device",
            6,
            [2, 4],
        ),  # a run without its result is not done
    ],
)
def test_a_full_disk(
    scene: Scene, tmp_path: Path, choice: str, full: list[int], ends: str, at: int, left: Any
) -> None:
    options = scene.overrides(
        "opt",
        "train.max_steps=6",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=9",
        f"checkpoint.on_save_error={choice}",
    )
    run_dir = tmp_path / "run"
    for text, step in run_ranks(2, train, options, run_dir, full):  # both ranks alike
        assert ends in text
        assert step == at
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == [
        f"step-{n:08d}" for n in left
    ]
    for step in left:
        assert checkpoint.load(run_dir / "checkpoints" / f"step-{step:08d}").state["step"] == step
    assert (run_dir / "DONE.json").exists() == (ends == "0")
    if ends != "0":  # with room again the same command ends the run
        assert [text for text, _ in run_ranks(2, train, options, run_dir, [])] == ["0", "0"]
        assert json.loads((run_dir / "DONE.json").read_text())["step"] == 6


def train_to_a_lost_best(world: dist.World, options: list[str], run_dir: Path) -> int:
    """Step 4 is the best by far, and cannot be saved."""
    write, validate = checkpoint._write, Trainer._validate
    nll = {2: 5.0, 4: 1.0, 6: 6.0}

    def refuse(path: Path, data: bytes) -> None:
        if path.parent.name == ".step-00000004.writing":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    def judged(self: Trainer) -> dict[str, float]:
        values = validate(self)
        return {**values, "nll_selected": nll.get(self.state.step, 9.0)}

    checkpoint._write = refuse
    Trainer._validate = judged  # type: ignore[method-assign]
    return train_scene(world, options, run_dir)


def test_a_best_one_that_could_not_be_saved_costs_no_other(scene: Scene, tmp_path: Path) -> None:
    """The best that is on the disk stays the best, and stays."""
    options = scene.overrides(
        "opt",
        "train.max_steps=6",
        "train.eval_every_steps=2",
        "checkpoint.keep_last=1",
        "checkpoint.on_save_error=continue",
    )
    run_dir = tmp_path / "run"
    assert run_ranks(2, train_to_a_lost_best, options, run_dir) == [0, 0]
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000006"]
    assert json.loads((run_dir / "DONE.json").read_text())["best_step"] == 2
    assert checkpoint.find(RunFolder(run_dir).checkpoints, "best").name == "step-00000002"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_for_a_while(scene: Scene, small_disk: Path) -> None:
    """Nothing can be written from step 3 to step 5, neither a checkpoint nor a line of metrics."""
    options = scene.overrides(
        "opt",
        "train.max_steps=6",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=9",
        "checkpoint.on_save_error=continue",
    )
    run_dir = small_disk / "run"
    assert run_ranks(2, train_while_full, options, run_dir) == [0, 0]
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000006"]
    assert json.loads((run_dir / "DONE.json").read_text())["step"] == 6
    steps = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # one may be cut short
            steps.append(json.loads(line)["step"])
    assert {0, 1, 2, 6} <= set(steps) <= set(range(7))


def train_while_full(world: dist.World, options: list[str], run_dir: Path) -> int:
    filler = run_dir / "filler"

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"0" * 512):
                pass

    with scene_trainer(world, options, run_dir) as trainer:
        if world.rank == 0:
            ask_after(trainer, 2, fill)
            ask_after(trainer, 5, filler.unlink)
        return trainer.run()
