"""Ranks compile the layers of the base together, or none does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spt_ds import dist, log
from spt_ds.errors import ModelError
from spt_ds.model import compiled
from tests.distributed.scenes import Scene, scene_trainer
from tests.helpers.ranks import run_ranks

OPTIONS = ("train.max_steps=2", "model.compile=on")


def train(
    world: dist.World, options: list[str], run_dir: Path, broken: int | None
) -> tuple[bool, float, list[str]]:
    """Train where the compiler of the rank `broken` fails.

    Returns whether layers are compiled at the end, the last validation loss, and what was said.
    """

    def fails(*graph: Any) -> Any:
        raise OSError("no such compiler")

    compiled.BACKEND = fails if world.rank == broken else "aot_eager"  # type: ignore[assignment]
    try:
        with scene_trainer(world, options, run_dir) as trainer:
            trainer.run()
            valid = trainer.state.valid_before or {}
            layers = compiled.decoder_layers(trainer.engine.backbone)
            made = [layer._compiled_call_impl is not None for layer in layers]
            assert len(set(made)) == 1
            said = [line for line in log._said if "model.compile" in line]
            return made[0], float(valid["loss"]), said
    except ModelError as error:
        return False, 0.0, [str(error)]


@pytest.mark.parametrize("broken", [None, 1])
def test_a_compiler_that_fails_on_one_rank_is_no_ones(
    scene: Scene, broken: int | None, tmp_path: Path
) -> None:
    options = scene.overrides("llama", *OPTIONS)
    both = run_ranks(2, train, options, tmp_path / "run", broken, timeout_s=240)
    (alone,) = run_ranks(1, train, scene.overrides("llama", *OPTIONS[:1]), tmp_path / "alone", None)
    for made, loss, said in both:
        assert made == (broken is None)
        assert loss == pytest.approx(alone[1], rel=1e-5)
        if broken is not None:
            assert "asked for model.compile: on, using off" in said[0]
            assert "no such compiler" in said[0]


def test_under_strict_all_ranks_raise(scene: Scene, tmp_path: Path) -> None:
    options = scene.overrides("llama", *OPTIONS, "engine.strict=true")
    for _, _, said in run_ranks(2, train, options, tmp_path / "run", 0, timeout_s=240):
        assert "strict: true forbids the fallback" in said[0]
        assert "no such compiler" in said[0]
