"""A real base under ZeRO-3 on two ranks trains on the numbers of one process, at every width."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spt_ds import dist
from spt_ds.data.loader import eval_batches
from spt_ds.data.sampler import MicroSize
from spt_ds.engine.session import open_split
from spt_ds.engine.zero import local_bytes
from tests.distributed.scenes import Scene, Setup, gap, open_engine, windows
from tests.helpers.ranks import run_ranks
from tests.helpers.real_base import real_base

LIMITS = {32: 1e-6, 16: 1e-5, 8: 1e-5, 4: 1e-5}
PLACEMENTS = ("prefix", "suffix")
NAMES = ("loss", "nll", "selection", "fusion", "contrastive")
TIMEOUT_S = 900


def first_step(world: dist.World, setups: list[Setup]) -> list[dict[str, Any]]:
    """Losses, gradients, validation losses of a first step, and this rank's bytes of the base."""
    out = []
    for setup in setups:
        config, session, engine = open_engine(world, setup)
        window = next(windows(config, session, world).windows(0))
        step = engine.train_window(window, 0, 2, (0.0, 0.0)).metrics()
        valid = open_split(session, "valid")
        batches = eval_batches(valid, MicroSize.of(config), world.size, world.rank)
        out.append(
            {
                "losses": {name: step[name] for name in NAMES},
                "gradient": engine.gradients.numpy().copy(),
                "valid": engine.evaluate(list(batches)),
                "bytes": local_bytes(session.backbone),
            }
        )
    return out


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize("bits", LIMITS)
def test_two_ranks_equal_one_process(scene: Scene, bits: int) -> None:
    base = [f"model.base={real_base()}", f"model.base_bits={bits}", "data.max_valid_examples=2"]
    overrides = [
        scene.overrides("llama", *base, f"prompts.placement={name}") for name in PLACEMENTS
    ]
    (alone,) = run_ranks(1, first_step, [Setup(None, o) for o in overrides], timeout_s=TIMEOUT_S)
    sharded = [Setup(scene.ds("zero3"), options) for options in overrides]
    ranks = run_ranks(2, first_step, sharded, timeout_s=TIMEOUT_S)
    for number, expected in enumerate(alone):
        first, second = (results[number] for results in ranks)
        assert first["losses"] == second["losses"]
        assert np.array_equal(first["gradient"], second["gradient"])
        gaps = distances(first, expected)
        print(f"{bits} bits, {PLACEMENTS[number]}: {gaps}")
        assert max(gaps.values()) <= LIMITS[bits], gaps
        assert first["bytes"] + second["bytes"] <= 1.01 * expected["bytes"]


def distances(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Differences relative to nll, from which selection's loss is made, and to the gradient."""
    nll = theirs["losses"]["nll"]
    out = {
        name: abs(ours["losses"][name] - value) / max(abs(value), nll)
        for name, value in theirs["losses"].items()
    }
    out |= {
        f"valid {name}": abs(ours["valid"][name] - value) / max(abs(value), nll)
        for name, value in theirs["valid"].items()
        if name
        != "ppl_selected"  # exp of a loss that is here: it has that difference times the loss
    }
    return {**out, "gradient": gap(ours["gradient"], theirs["gradient"])}
