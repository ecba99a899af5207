"""`kill -9` of a rank at any moment, again and again: the run that goes on ends as the undisturbed
one, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spt_ds import dist
from spt_ds.errors import CheckpointError
from spt_ds.run import checkpoint
from tests.distributed.scenes import Scene, make_scene, train_scene
from tests.helpers.ranks import _context, _rank_main, free_port, run_ranks

STEPS, SAVE_EVERY, RANKS = 6, 2, 2
PATIENCE_S = 60  # in which the survivors of a killed rank must have ended


@dataclass(frozen=True)
class Case:
    scene: Scene
    options: list[str]
    losses: dict[int, float]
    trained: dict[str, np.ndarray]
    seconds: float  # from the start of the ranks to their end


def train(world: dist.World, options: list[str], run_dir: Path, ds: str, die_at: int | None) -> int:
    """One attempt; with `die_at` the first rank kills itself at that operation on the disk, counted
    over its saves.
    """
    if die_at is not None and world.rank == 0:
        kill_in_save(die_at)
    return train_scene(world, options, run_dir, ds)


def kill_in_save(die_at: int) -> None:
    """Make the n-th flush, rename or removal within saves the last thing this process does; a save
    makes some ten.
    """
    calls, saving = 0, False

    def deadly(work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += saving
            if saving and calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*args, **kwargs)

        return wrapped

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal saving
            saving = True
            out = work(*args, **kwargs)
            saving = False
            return out

        return wrapped

    for holder, names in ((os, ["fsync"]), (shutil, ["rmtree"]), (Path, ["rename", "unlink"])):
        for name in names:
            setattr(holder, name, deadly(getattr(holder, name)))
    for name in ("save", "prune"):
        setattr(checkpoint, name, watched(getattr(checkpoint, name)))


def attempt(
    case: Case | tuple[Scene, list[str]], run_dir: Path, kill: Any = None, die_at: int | None = None
) -> bool:
    """Start the ranks; `kill` (processes) may end one. Returns whether the run was done; waits for
    every rank.
    """
    scene, options = (case.scene, case.options) if isinstance(case, Case) else case
    port = free_port()
    with tempfile.TemporaryDirectory() as logs:
        processes = []
        for rank in range(RANKS):
            receive, send = _context.Pipe(duplex=False)
            job = (options, run_dir, scene.ds("zero3"), die_at)
            args = (rank, RANKS, port, Path(logs) / f"{rank}.txt", 120, send, train, job)
            process = _context.Process(target=_rank_main, args=args)
            process.start()
            send.close()
            processes.append((process, receive))
        if kill is not None:
            kill([process for process, _ in processes])
        end = time.monotonic() + PATIENCE_S
        for rank, (process, _) in enumerate(processes):
            process.join(max(0.1, end - time.monotonic()))
            text = (
                (Path(logs) / f"{rank}.txt").read_text()
                if (Path(logs) / f"{rank}.txt").exists()
                else ""
            )
            if process.is_alive():
                process.kill()
                raise AssertionError(
                    f"rank {rank} did not end after another one was killed\n{text}"
                )
    return (run_dir / "DONE.json").exists()


def results(run_dir: Path) -> tuple[dict[int, float], dict[str, np.ndarray]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    found = checkpoint.load(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    return losses, {name: tensor.numpy() for name, tensor in found.trainables.items()}


def nothing(world: dist.World) -> None:
    pass


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("kill")
    scene = make_scene(folder)
    options = scene.overrides(
        "opt",
        f"train.max_steps={STEPS}",
        f"checkpoint.every_steps={SAVE_EVERY}",
        "checkpoint.keep_last=1",
        "train.eval_every_steps=3",
        "engine.collective_timeout_s=60",
        # The threads of trackers rename files, too, and operations are counted here.
        "log.trackers=[]",
    )
    run_ranks(1, nothing)  # starts the server that ranks are forked from
    started = time.monotonic()
    assert attempt((scene, options), folder / "whole")
    seconds = time.monotonic() - started
    return Case(scene, options, *results(folder / "whole"), seconds)


def assert_nothing_half(run_dir: Path) -> int:
    """Every checkpoint that lies there loads whole or is refused; return the step that a new start
    goes on from.
    """
    folder = run_dir / "checkpoints"
    good = []
    for path in sorted(folder.glob("*")):
        whole = (path / checkpoint.MARKER).exists() and path.name.startswith("step-")
        try:
            found = checkpoint.load(path)
        except CheckpointError:
            assert not whole, f"{path} has its marker and is damaged"
            continue
        if whole:
            assert (
                found.state["step"]
                == found.state["run"]["step"]
                == int(path.name.removeprefix("step-"))
            )
            assert {
                float(value) for key, value in found.optimizer.items() if key.endswith(".step")
            } == {float(found.state["step"])}
            good.append(found.state["step"])
    newest = checkpoint.load_newest(folder)
    assert (newest[1].state["step"] if newest else 0) == max(good, default=0)
    return max(good, default=0)


def assert_same_end(case: Case, run_dir: Path) -> None:
    losses, trained = results(run_dir)
    assert losses == case.losses
    assert all(np.array_equal(trained[name], tensor) for name, tensor in case.trained.items())
    assert [
        path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")
    ] == []


def kill_and_finish(case: Case, folder: Path, kills: int, seed: int) -> list[int]:
    """Kill `kills` times at random moments, over as many runs as that takes; return the steps gone
    on from.
    """
    draw = random.Random(seed)
    resumed: list[int] = []
    number = 0
    while len(resumed) < kills:
        run_dir = folder / f"run-{number}"
        number += 1
        step, done = 0, False
        while len(resumed) < kills and not done:
            if (
                draw.random() < 0.5
            ):  # in a save: any operation of the first two or three may be the last
                done = attempt(case, run_dir, die_at=draw.randint(1, 24))
            else:
                moment = draw.uniform(0.3, 1.0) * case.seconds
                victim = draw.randrange(RANKS)

                def kill(
                    processes: list[Any], moment: float = moment, victim: int = victim
                ) -> None:
                    processes[victim].join(moment)
                    processes[victim].kill()

                done = attempt(case, run_dir, kill)
            found = assert_nothing_half(run_dir)
            assert found >= step  # nothing that was saved is lost
            step = found
            if not done:
                resumed.append(step)
        assert done or attempt(case, run_dir)
        assert_same_end(case, run_dir)
    return resumed


def test_killed_at_random_moments(case: Case, tmp_path: Path) -> None:
    kill_and_finish(case, tmp_path, kills=4, seed=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_twenty_times(case: Case, tmp_path: Path) -> None:
    resumed = kill_and_finish(case, tmp_path, kills=20, seed=20)
    assert len(set(resumed)) >= 3  # from the start, and from several checkpoints


@pytest.mark.parametrize("die_at", [3, 9])
def test_killed_in_a_save(case: Case, tmp_path: Path, die_at: int) -> None:
    """Between two files, and after the folder was renamed."""
    run_dir = tmp_path / "run"
    assert not attempt(case, run_dir, die_at=die_at)
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    step = assert_nothing_half(run_dir)
    if die_at == 3:
        assert left == [".step-00000002.writing"]
        assert step == 0
    else:
        assert step == 2
    assert attempt(case, run_dir)
    assert_same_end(case, run_dir)
