"""A run that goes on from a checkpoint ends as the uninterrupted one, on the same ranks to the last
bit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spt_ds import dist
from spt_ds.run import checkpoint
from spt_ds.run.command import EXIT_DONE, EXIT_STOPPED
from tests.distributed.scenes import Scene, gap, scene_trainer, train_scene
from tests.distributed.test_agree import ask_after
from tests.helpers.ranks import run_ranks

STEPS, SAVED_AT = 6, 3
Place = tuple[int, str | None]  # ranks, DeepSpeed file
ONE: Place = (1, None)
TWO: Place = (2, "zero3")
THREE: Place = (3, "zero3_offload_cpu")


@dataclass(frozen=True)
class Run:
    """A finished run: loss of each step, and what it trained."""

    folder: Path
    losses: dict[int, float]
    trained: dict[str, np.ndarray]


def train(world: dist.World, options: list[str], run_dir: Path, ds: str | None) -> int:
    return train_scene(world, options, run_dir, ds)


def overrides(scene: Scene, steps: int, *more: str) -> list[str]:
    return scene.overrides(
        "llama",
        f"train.max_steps={steps}",
        f"checkpoint.every_steps={SAVED_AT}",
        "checkpoint.keep_last=9",
        "optim.clip_norm=1",
        "optim.warmup_steps=2",
        "optim.prompts_lr=0.02",
        "train.eval_every_steps=2",
        *more,
    )


def finish(
    scene: Scene, place: Place, folder: Path, steps: int = STEPS, more: tuple[str, ...] = ()
) -> Run:
    """Train to the end in `folder`, from wherever the folder stands."""
    world, ds = place
    codes = run_ranks(world, train, overrides(scene, steps, *more), folder, ds and scene.ds(ds))
    assert codes == [EXIT_DONE] * world
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))  # each step once, in order
    found = checkpoint.load(folder / "checkpoints" / f"step-{steps:08d}")
    return Run(
        folder,
        {row["step"]: row["loss"] for row in rows},
        {k: v.numpy() for k, v in found.trainables.items()},
    )


@pytest.fixture(scope="module")
def whole(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> object:
    """The uninterrupted run of a place; it leaves its checkpoint of the third step behind."""
    return cache(lambda place: finish(scene, place, tmp_path_factory.mktemp("whole") / "run"))


def killed_copy(run: Run, folder: Path) -> Path:
    """The run folder as a kill during step 5 would have left it: step 4 is in the metrics, not in a
    checkpoint.
    """
    shutil.copytree(run.folder, folder)
    (folder / "DONE.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if path.name > f"step-{SAVED_AT:08d}":
            shutil.rmtree(path)
    assert (folder / "checkpoints" / f"step-{SAVED_AT:08d}").is_dir()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= SAVED_AT + 1]
    (folder / "metrics.jsonl").write_text(
        "".join(kept) + '{"step": 5, "ki'
    )  # killed while it wrote a line
    return folder


@pytest.mark.parametrize("place", [ONE, TWO, THREE])
def test_same_ranks_go_on_to_the_last_bit(
    scene: Scene, whole: Any, tmp_path: Path, place: Place
) -> None:
    expected: Run = whole(place)
    again = finish(scene, place, killed_copy(expected, tmp_path / "run"))
    assert again.losses == expected.losses
    for name, tensor in expected.trained.items():
        assert np.array_equal(again.trained[name], tensor), name
    done = [json.loads((run.folder / "DONE.json").read_text()) for run in (again, expected)]
    assert done[0] == done[1]


def test_a_damaged_newest_one_is_set_aside(scene: Scene, whole: Any, tmp_path: Path) -> None:
    """It counted as one of the newest, and the good ones were removed."""
    expected: Run = whole(ONE)
    folder = tmp_path / "run"
    shutil.copytree(expected.folder, folder)
    (folder / "DONE.json").unlink()
    saved = folder / "checkpoints" / f"step-{STEPS:08d}" / checkpoint.TRAINABLES
    saved.write_bytes(saved.read_bytes()[:-1] + b"x")
    again = finish(scene, ONE, folder, more=("checkpoint.keep_last=1",))
    assert again.losses == expected.losses
    assert (folder / "checkpoints" / f"damaged-step-{STEPS:08d}").is_dir()


def test_a_done_run_goes_on_to_a_new_length(scene: Scene, whole: Any, tmp_path: Path) -> None:
    expected: Run = whole(ONE)
    folder = tmp_path / "run"
    shutil.copytree(expected.folder, folder)
    again = finish(scene, ONE, folder, steps=STEPS + 1)
    assert json.loads((folder / "DONE.json").read_text())["step"] == STEPS + 1
    assert {
        step: again.losses[step] for step in expected.losses
    } == expected.losses  # none was taken again


def stop_at(world: dist.World, options: list[str], run_dir: Path, step: int) -> int:
    with scene_trainer(world, options, run_dir) as trainer:
        ask_after(trainer, step - 1, (run_dir / "STOP").touch)
        return trainer.run()


def test_a_stop_loses_no_validation(scene: Scene, whole: Any, tmp_path: Path) -> None:
    """Stopped at a step that is to be validated, which is done on resume."""
    expected: Run = whole(ONE)
    folder = tmp_path / "run"
    assert run_ranks(1, stop_at, overrides(scene, STEPS), folder, 4) == [EXIT_STOPPED]
    assert checkpoint.load(folder / "checkpoints" / "step-00000004").state["run"]["owes_validation"]
    finish(scene, ONE, folder)

    def valid(run_dir: Path) -> dict[int, float]:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line["nll_selected"] for line in lines if line["kind"] == "valid"}

    assert valid(folder) == valid(expected.folder)
    assert json.loads((folder / "DONE.json").read_text()) == json.loads(
        (expected.folder / "DONE.json").read_text()
    )


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (ONE, TWO),
        (TWO, ONE),
        (TWO, THREE),
        (THREE, ONE),
        (THREE, (2, "zero2")),
        (ONE, (1, "zero3")),
    ],
    ids=str,
)
def test_other_ranks_and_placements_go_on(
    scene: Scene, whole: Any, tmp_path: Path, start: Place, end: Place
) -> None:
    expected: Run = whole(start)
    again = finish(scene, end, killed_copy(expected, tmp_path / "run"))
    for step, loss in expected.losses.items():
        assert abs(again.losses[step] - loss) <= 1e-6 * abs(loss), f"step {step}"
    gaps = {name: gap(again.trained[name], tensor) for name, tensor in expected.trained.items()}
    assert max(gaps.values()) <= 1e-5, gaps


def test_the_comparison_sees_lost_moments(scene: Scene, whole: Any, tmp_path: Path) -> None:
    """A resume that forgets Adam's moments trains on, and must be seen."""
    expected: Run = whole(ONE)
    folder = killed_copy(expected, tmp_path / "run")
    path = folder / "checkpoints" / f"step-{SAVED_AT:08d}"
    saved = checkpoint.load(path)
    shutil.rmtree(path)
    checkpoint.save(
        folder / "checkpoints", checkpoint.Checkpoint(saved.trainables, {}, saved.state)
    )
    again = finish(scene, ONE, folder)
    assert (
        again.losses[SAVED_AT + 1] == expected.losses[SAVED_AT + 1]
    )  # the next loss still says nothing
    assert abs(again.losses[STEPS] - expected.losses[STEPS]) > 1e-5 * expected.losses[STEPS]
