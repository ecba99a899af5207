"""LoRA and full fine-tuning over ranks: two ranks are one, a resumed run is the whole one, what is
frozen stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from spt_ds import dist
from spt_ds.data.loader import eval_batches
from spt_ds.data.sampler import MicroSize
from spt_ds.engine.session import open_split
from spt_ds.errors import SptError
from tests.distributed.scenes import Scene, Setup, gap, open_engine, windows
from tests.distributed.test_resume import ONE, finish, killed_copy
from tests.helpers.ranks import run_ranks

NO_PROMPTS = (
    "prompts.count=1",
    "prompts.tokens=0",
    "losses.selection=0",
    "losses.fusion=0",
    "losses.contrastive=0",
)
LORA = ("method.type=lora", "method.lora.rank=3", *NO_PROMPTS)
FULL = ("method.type=full", *NO_PROMPTS)
Found = tuple[list[float], dict[str, np.ndarray], dict[str, bool], list[str]]


def train_steps(world: dist.World, setups: Sequence[Setup]) -> list[Found]:
    """For each setup: losses, trained tensors, whether frozen ones kept their bits, trained ones
    that never moved.
    """
    out = []
    for setup in setups:
        config, session, engine = open_engine(world, setup)
        frozen = {
            name: p.detach().clone()
            for name, p in session.backbone.named_parameters()
            if not p.requires_grad
        }
        before = {
            name: p.detach().numpy().copy() for name, p in engine.trainables.named_parameters()
        }
        stream = windows(config, session, world).windows(0)
        losses = [
            engine.train_window(next(stream), step, setup.steps, (0.0, 0.0)).metrics()["loss"]
            for step in range(setup.steps)
        ]
        trained = {
            name: p.detach().numpy().copy() for name, p in engine.trainables.named_parameters()
        }
        after = dict(session.backbone.named_parameters())
        kept = {name: torch.equal(p, after[name]) for name, p in frozen.items()}
        out.append(
            (
                losses,
                trained,
                kept,
                [name for name, p in trained.items() if np.array_equal(p, before[name])],
            )
        )
    return out


def test_two_ranks_are_one(scene: Scene) -> None:
    cases: list[tuple[str, tuple[str, ...]]] = [
        (arch, more) for arch in ("opt", "llama") for more in (LORA, FULL)
    ]
    cases.append(
        ("llama", (*LORA, "model.base_bits=16", "model.activation_checkpointing=non_reentrant"))
    )
    cases.append(("llama", (*FULL, "model.activation_checkpointing=non_reentrant")))
    ds = [None, "zero2", None, None, None, None]
    setups = [
        Setup(d and scene.ds(d), scene.overrides(arch, *more), 3)
        for d, (arch, more) in zip(ds, cases, strict=True)
    ]
    (one,) = run_ranks(
        1, train_steps, [Setup(None, s.overrides, s.steps) for s in setups], timeout_s=200
    )
    first, second = run_ranks(2, train_steps, setups, timeout_s=250)
    for case, alone, ours, other in zip(cases, one, first, second, strict=True):
        limit = 1e-5 if "model.base_bits=16" in case[1] else 1e-6
        assert np.allclose(ours[0], alone[0], rtol=limit, atol=0), case
        assert ours[0] == other[0]
        assert alone[3] == []
        for name, tensor in alone[1].items():
            # Adam divides by the gradient's own size, which a key's bias does not have: only
            # rounding moves it.
            if not name.endswith("k_proj.bias"):
                assert gap(ours[1][name], tensor) <= 30 * limit, (case, name)
            assert np.array_equal(ours[1][name], other[1][name]), name
        assert all(ours[2].values())
        assert bool(ours[2]) == (
            case[1][0] != FULL[0]
        )  # LoRA leaves the base frozen, full fine-tuning nothing


@pytest.mark.parametrize("more", [LORA, FULL], ids=["lora", "full"])
def test_resumed_runs_go_on_to_the_last_bit(
    scene: Scene, tmp_path: Path, more: tuple[str, ...]
) -> None:
    whole = finish(scene, ONE, tmp_path / "whole", more=more)
    again = finish(scene, ONE, killed_copy(whole, tmp_path / "again"), more=more)
    assert again.losses == whole.losses
    assert again.trained.keys() == whole.trained.keys()
    assert all(
        np.array_equal(again.trained[name], tensor) for name, tensor in whole.trained.items()
    )


def refused(world: dist.World, setup: Setup) -> str:
    try:
        open_engine(world, setup)
    except SptError as error:
        return str(error)
    return ""


def test_a_sharded_base_is_refused(scene: Scene) -> None:
    for text in run_ranks(2, refused, Setup(scene.ds("zero3"), scene.overrides("llama", *FULL))):
        assert "zero_optimization.stage: 3 shards the base, but method.type: full" in text
        assert "use stage 0, 1 or 2, or no file" in text


NONE = ("method.type=none", *NO_PROMPTS)


def validate(world: dist.World, setups: Sequence[Setup]) -> list[dict[str, float]]:
    out = []
    for setup in setups:
        config, session, engine = open_engine(world, setup)
        batches = eval_batches(
            open_split(session, "valid"), MicroSize.of(config), world.size, world.rank
        )
        out.append(engine.evaluate(batches))
    return out


def test_a_base_as_it_is_may_be_sharded(scene: Scene) -> None:
    def setups(ds: str | None) -> list[Setup]:
        return [
            Setup(ds, scene.overrides(arch, *NONE, "data.max_tokens=150", "data.few_shot=1"))
            for arch in ("opt", "llama")
        ]

    (one,) = run_ranks(1, validate, setups(None))
    two = run_ranks(2, validate, setups(scene.ds("zero3")))
    assert two[0] == two[1]
    for alone, ours in zip(one, two[0], strict=True):
        assert alone["nll"] == alone["loss"] == pytest.approx(alone["nll_selected"], rel=1e-6)
        assert {name: pytest.approx(value, rel=1e-6) for name, value in alone.items()} == ours
