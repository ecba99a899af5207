"""What one rank sees, all ranks act on together: other files, a NaN, a wish to stop."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_ds import dist, errors
from spt_ds.engine.trainer import Trainer
from spt_ds.model.spt import MicroLosses
from spt_ds.run import checkpoint
from spt_ds.run.command import EXIT_STOPPED
from tests.distributed.scenes import (
    Scene,
    Setup,
    open_engine,
    scene_trainer,
    windows,
    write_dialogues,
)
from tests.helpers.ranks import run_ranks


def test_ranks_that_see_other_files_all_refuse(scene: Scene, tmp_path: Path) -> None:
    for rank in range(2):
        write_dialogues(tmp_path / f"train-{rank}.jsonl", 5, seed=rank)
    found = run_ranks(2, open_own_file, Setup(None, scene.overrides("opt")), tmp_path)
    for kind, text in found:
        assert kind == "EngineError"
        assert "differs between ranks" in text
        assert "ranks [0]" in text
        assert "ranks [1]" in text


def open_own_file(world: dist.World, setup: Setup, folder: Path) -> tuple[str, str]:
    """Train on a file that only this rank has, as with a stale copy on one host."""
    overrides = [line for line in setup.overrides if not line.startswith("data.train=")]
    mine = Setup(setup.ds, [*overrides, f"data.train={folder / f'train-{world.rank}.jsonl'}"])
    config, session, _ = open_engine(world, mine)
    return caught(lambda: windows(config, session, world))


def test_a_missing_file_on_one_rank_is_everyones_error(scene: Scene, tmp_path: Path) -> None:
    write_dialogues(tmp_path / "train-0.jsonl", 5, seed=0)
    found = run_ranks(2, open_own_file, Setup(None, scene.overrides("opt")), tmp_path)
    assert [kind for kind, _ in found] == ["DataError", "DataError"]
    assert all("train-1.jsonl: no such file" in text for _, text in found)


@pytest.mark.parametrize("ds", [None, "zero3"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nan_on_one_rank_stops_all_before_the_optimizer_moves(
    scene: Scene, ds: str | None, where: str
) -> None:
    setup = Setup(ds and scene.ds(ds), scene.overrides("llama", "losses.contrastive=0"), steps=3)
    found = run_ranks(2, train_with_nan, setup, where)
    assert found[0]["text"] == found[1]["text"]
    for rank in found:
        assert rank["kind"] == "NonFiniteError"
        assert "step 2:" in rank["text"]  # the second step, as people count
        assert rank["moved"] == [True, False]  # by the good step, not by the bad one
        assert rank["state"] == 1.0  # Adam has counted one step
    if where == "loss":
        assert f"rank 1: examples [{found[1]['victim']}]" in found[0]["text"]
        assert "rank 0" not in found[0]["text"]
    else:
        assert "in the gradient only" in found[0]["text"]


def train_with_nan(world: dist.World, setup: Setup, where: str) -> dict[str, Any]:
    """Poison the second step on rank 1: the embeddings of one example, or a gradient alone."""
    config, session, engine = open_engine(world, setup)
    stream = windows(config, session, world).windows(0)
    before = weights(engine)
    engine.train_window(next(stream), 0, setup.steps, (0.0, 0.0))
    after = weights(engine)
    window = next(stream)
    victim = window.micro[1].indices[0]
    if world.rank == 1:
        forward = engine.spt.micro_losses

        def poisoned(backbone: Any, batch: Any, *counts: Any) -> MicroLosses:
            if where == "gradient":
                out = forward(backbone, batch, *counts)
                out.total.register_hook(lambda grad: grad * torch.nan)
                return out
            if victim not in batch.indices:
                return forward(backbone, batch, *counts)
            embed = backbone.embed
            backbone.embed = lambda ids: embed(ids) * torch.nan
            out = forward(backbone, batch, *counts)
            backbone.embed = embed
            return out

        engine.spt.micro_losses = poisoned  # type: ignore[method-assign, assignment]
    kind, text = caught(lambda: engine.train_window(window, 1, setup.steps, (0.0, 0.0)))
    moved = [not torch.equal(before, after), not torch.equal(after, weights(engine))]
    counted = {float(state["step"]) for state in engine.optimizer.state.values()}
    return {"kind": kind, "text": text, "victim": victim, "moved": moved, "state": counted.pop()}


def weights(engine: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in engine.trainables.parameters()])


def caught(work: Any) -> tuple[str, str]:
    try:
        work()
    except errors.SptError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("how", ["signal", "file", "budget", "second budget"])
def test_a_wish_to_stop_on_one_rank_stops_all_at_one_step(
    scene: Scene, tmp_path: Path, how: str
) -> None:
    overrides = scene.overrides("opt", "train.max_steps=6", "checkpoint.keep_last=5")
    found = run_ranks(2, train_and_ask, overrides, tmp_path / "run", how)
    steps = [step for _, step in found]
    assert [code for code, _ in found] == [EXIT_STOPPED, EXIT_STOPPED]
    assert steps[0] == steps[1]
    if how != "budget":  # which is spent before the first step
        assert steps[0] == 3
    newest = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest[1].state["step"] == steps[0]
    assert not (tmp_path / "run" / "STOP").exists()


def train_and_ask(
    world: dist.World, overrides: list[str], run_dir: Path, how: str
) -> tuple[int, int]:
    """Train; one rank asks to stop after its second step."""
    asker = 0 if how == "file" else 1
    more = ["train.max_hours=0.000001"] if how == "budget" and world.rank == asker else []
    with scene_trainer(world, [*overrides, *more], run_dir) as trainer:
        ask_after(trainer, 2, lambda: None if world.rank != asker else request(trainer, how))
        return trainer.run(), trainer.state.step


def ask_after(trainer: Trainer, step: int, ask: Any) -> None:
    """Call `ask` between step `step` and the next one."""
    windows = trainer.loader.windows

    def stream(first: int) -> Any:
        for window in windows(first):
            if trainer.state.step == step:
                ask()
            yield window

    trainer.loader.windows = stream  # type: ignore[method-assign, assignment]


def request(trainer: Trainer, how: str) -> None:
    if how == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
    elif how == "file":
        trainer.folder.stop.touch()
    elif how == "second budget":
        trainer.stop.deadline_s = 0.0


def test_a_save_file_saves_once_and_training_goes_on(scene: Scene, tmp_path: Path) -> None:
    overrides = scene.overrides("opt", "train.max_steps=4", "checkpoint.keep_last=5")
    found = run_ranks(2, train_and_save, overrides, tmp_path / "run")
    assert found == [0, 0]
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step-00000003", "step-00000004"]  # on request, and at the end
    assert json.loads((tmp_path / "run" / "DONE.json").read_text())["step"] == 4


def train_and_save(world: dist.World, overrides: list[str], run_dir: Path) -> int:
    with scene_trainer(world, overrides, run_dir) as trainer:
        ask_after(trainer, 2, lambda: (run_dir / "SAVE").touch() if world.rank == 0 else None)
        return trainer.run()
