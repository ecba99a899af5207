"""Two ranks, one of them killed, and a second start: one run in each tracker, as metrics.jsonl.

TensorBoard is the real one, read by its own reader; the others are stood in for.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spt_ds import dist
from spt_ds.engine.metrics import Metrics
from spt_ds.errors import ConfigError
from spt_ds.run.folder import RunFolder
from spt_ds.run.metrics_file import Line
from tests.distributed.scenes import Scene, make_scene, train_scene
from tests.helpers.fake_trackers import NAMES, Server, install
from tests.helpers.ranks import run_ranks

KEY = "planted-key-0123456789"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("trackers"))


def options(scene: Scene) -> list[str]:
    return scene.overrides(
        "opt",
        "train.max_steps=6",
        "train.eval_every_steps=2",
        "checkpoint.every_steps=2",
        "log.every_steps=1",
        "log.trackers=[auto, wandb, mlflow, trackio]",
    )


def train(
    world: dist.World,
    chosen: list[str],
    run_dir: Path,
    server: Path,
    die_at: tuple[int, str] | None,
) -> int:
    """One start; rank 0 kills itself after the line `die_at` (step, kind) is in metrics.jsonl."""
    os.environ["WANDB_API_KEY"] = KEY
    install(Server(server, fails_at=None))
    record = Metrics.record

    def deadly(self: Metrics, step: int, kind: str, values: dict[str, object]) -> None:
        record(self, step, kind, values)
        if world.rank == 0 and (step, kind) == die_at:
            _wait_for_trackers()
            os.kill(os.getpid(), signal.SIGKILL)

    Metrics.record = deadly  # type: ignore[method-assign]
    return train_scene(world, chosen, run_dir)


def _wait_for_trackers() -> None:
    """A kill between a service's answer and our note of it would send one line twice."""
    time.sleep(0.5)


@pytest.mark.parametrize("die_at", [(5, "train"), (4, "valid")])
def test_each_step_is_there_once_after_a_kill(
    scene: Scene, tmp_path: Path, die_at: tuple[int, str]
) -> None:
    """After the checkpoint of step 4, and before it, with its validation logged."""
    run, server = RunFolder(tmp_path / "run"), Server(tmp_path / "server.jsonl")
    with pytest.raises(AssertionError, match="failed on 2 ranks"):
        run_ranks(2, train, options(scene), run.path, server.path, die_at, timeout_s=60)
    assert not run.done.exists()
    assert run_ranks(2, train, options(scene), run.path, server.path, None) == [0, 0]
    lines = [Line.parse(text) for text in run.metrics.read_bytes().splitlines()]
    expected = [(line.step, line.numbers()) for line in lines if line]
    assert [step for step, _ in expected] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    for name in NAMES:
        assert server.steps_of(name) == expected, name
        assert len({line["run"] for line in server.told(name, "log")}) == 1
        # One process of each start, so one of the two ranks.
        assert len({line["pid"] for line in server.told(name, "log")}) == 2
    assert shown_by_tensorboard(run.tensorboard) == sorted(
        (name, step, pytest.approx(value, rel=1e-6))
        for step, values in expected
        for name, value in values.items()
    )
    texts = [path for path in run.path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in texts)
    assert KEY not in server.path.read_text(encoding="utf-8")


def shown_by_tensorboard(folder: Path) -> list[tuple[str, int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return sorted(
        (name, event.step, event.value)
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    )


def without_wandb(world: dist.World, chosen: list[str], run_dir: Path) -> str:
    if world.rank == 0:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    else:
        install(Server(run_dir.with_name("server.jsonl")))
    with pytest.raises(ConfigError) as caught:
        train_scene(world, chosen, run_dir)
    return str(caught.value)


def test_a_missing_package_ends_all_ranks_before_the_base_is_read(
    scene: Scene, tmp_path: Path
) -> None:
    missing = [*options(scene), "model.base=/nowhere"]
    messages = run_ranks(2, without_wandb, missing, tmp_path / "run")
    assert all("install the extra `wandb`" in message for message in messages)
    assert not (tmp_path / "run").exists()
