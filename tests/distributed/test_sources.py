"""Several weighted sources and hidden personas: the same training on any ranks and after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spt_ds import dist
from spt_ds.engine.session import open_split
from spt_ds.engine.trainer import train_loader
from spt_ds.errors import SptError
from spt_ds.run.command import EXIT_DONE
from tests.distributed.scenes import (
    Scene,
    Setup,
    gap,
    open_engine,
    scene_trainer,
    train_scene,
    write_dialogues,
)
from tests.distributed.test_resume import SAVED_AT, Run, finish, killed_copy
from tests.helpers.ranks import run_ranks

SIZES, WEIGHTS = (9, 3, 5), (3, 2, 1)
HIDDEN = ("data.persona_dropout.whole=0.3", "data.persona_dropout.sentences=0.3")
LIMIT = 1e-6  # fp32, as in test_equal


@pytest.fixture(scope="module")
def mixed(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of three sources, whose personas have up to three sentences."""
    folder = tmp_path_factory.mktemp("sources")
    tree = []
    for number, (size, weight) in enumerate(zip(SIZES, WEIGHTS, strict=True)):
        path = folder / f"{number}.jsonl"
        write_dialogues(path, size, seed=number)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["persona"] = [*row["persona"], "tea", "no music"][: 1 + number]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree.append({"path": str(path), "weight": weight})
    return (f"data.train={json.dumps(tree)}", *HIDDEN, "losses.contrastive=1")


def read_windows(
    world: dist.World, options: list[str], steps: int
) -> list[tuple[int, list[tuple[int, list[int]]]]]:
    """Target tokens of each window, and row and ids of the examples that this rank reads."""
    config, session, _ = open_engine(world, Setup(None, options))
    loader = train_loader(session, open_split(session, "train"))
    found = []
    for window, _ in zip(loader.windows(0), range(steps), strict=False):
        rows = []
        for batch in window.micro:
            contexts = np.split(batch.context_ids, np.cumsum(batch.context_lens)[:-1])
            rows += [
                (row, ids.tolist())
                for row, ids, weight in zip(batch.indices, contexts, batch.weights, strict=True)
                if weight
            ]
        found.append((window.target_tokens, rows))
    assert config.data.persona_dropout.active
    return found


def test_one_two_and_three_ranks_read_the_same(scene: Scene, mixed: tuple[str, ...]) -> None:
    options = scene.overrides("llama", *mixed)
    whole = None
    for ranks in (1, 2, 3):
        found = run_ranks(ranks, read_windows, options, 12)
        tokens = [[count for count, _ in each] for each in found]
        assert all(each == tokens[0] for each in tokens)
        steps = [sorted(row for each in found for row in each[step][1]) for step in range(12)]
        whole = whole or (tokens[0], steps)
        assert (tokens[0], steps) == whole
    assert whole is not None
    ids: dict[int, set[tuple[int, ...]]] = {}
    for step in whole[1]:
        for row, context in step:
            ids.setdefault(row, set()).add(tuple(context))
    assert any(len(seen) > 2 for seen in ids.values())  # another part is hidden each time


def test_a_killed_run_ends_with_the_same_bits_on_one_and_two_ranks(
    scene: Scene, mixed: tuple[str, ...], tmp_path: Path
) -> None:
    expected = finish(scene, (1, None), tmp_path / "whole", more=mixed)
    again = finish(scene, (1, None), killed_copy(expected, tmp_path / "again"), more=mixed)
    assert again.losses == expected.losses
    for name, tensor in expected.trained.items():
        assert np.array_equal(again.trained[name], tensor), name
    other = finish(scene, (2, None), killed_copy(expected, tmp_path / "other"), more=mixed)
    for step in range(SAVED_AT + 1, len(expected.losses) + 1):
        assert gap(other.losses[step], expected.losses[step]) < LIMIT
    three = finish(scene, (3, None), tmp_path / "three", more=mixed)
    assert gap(three.losses[1], expected.losses[1]) < LIMIT


# A start from another run -------------------------------------------------------------------------


def first_values(world: dist.World, options: list[str], run_dir: Path) -> dict[str, Any]:
    """The trained tensors before the first step."""
    with scene_trainer(world, options, run_dir) as trainer:
        trained = trainer.engine.trainables.named_parameters()
        return {name: tensor.detach().numpy().copy() for name, tensor in trained}


def refused(world: dist.World, options: list[str], run_dir: Path) -> str:
    try:
        train_scene(world, options, run_dir)
    except SptError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def trained(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finish(scene, (1, None), tmp_path_factory.mktemp("first") / "run", steps=4)


def test_a_run_begins_with_the_values_of_another(
    scene: Scene, trained: Run, tmp_path: Path
) -> None:
    more = (f"init=run:{trained.folder}", "train.seed=9", "train.max_steps=2")
    options = scene.overrides("llama", *more)
    best = json.loads((trained.folder / "DONE.json").read_text())["best_step"]
    assert best == 4  # the last one, which `trained` holds
    for values in run_ranks(2, first_values, options, tmp_path / "look"):
        for name, tensor in trained.trained.items():
            assert np.array_equal(values[name], tensor), name
    # What resumes reads its own checkpoint, and not that of the other run again.
    assert run_ranks(1, train_scene, options, tmp_path / "run") == [EXIT_DONE]
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "run", moved)
    longer = scene.overrides("llama", *more[:2], "train.max_steps=3")
    hidden = trained.folder.rename(trained.folder.with_name("away"))
    try:
        assert run_ranks(1, train_scene, longer, moved) == [EXIT_DONE]
    finally:
        hidden.rename(trained.folder)


def test_a_run_of_other_sizes_is_refused_with_its_options(
    scene: Scene, trained: Run, tmp_path: Path
) -> None:
    source = f"init=run:{trained.folder}"
    for more, words in (
        ([source, "prompts.count=2"], "prompts.count is 3 there, 2 here; set the same here"),
        ([source, "prompts.tokens=1"], "prompts.tokens is 2 there, 1 here"),
        ([source, "retriever.keys=learned"], "retriever.keys is prompts there, learned here"),
        ([f"init=run:{tmp_path / 'none'}"], "no run folder (config.yaml is missing)"),
    ):
        found = run_ranks(2, refused, scene.overrides("llama", *more), tmp_path / "run")
        assert all(words in text for text in found), found
