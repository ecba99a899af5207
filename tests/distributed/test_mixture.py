"""The mixture objective and the warm start: the same numbers on any number of ranks, in any split
into micro-batches, and after a stop.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.conftest import Reference
from tests.distributed.scenes import Outcome, Scene, Setup, measure
from tests.distributed.test_equal import assert_same
from tests.distributed.test_resume import ONE, SAVED_AT, STEPS, TWO, Place, finish, killed_copy
from tests.helpers.ranks import run_ranks

ALONE = ("losses.selection=0", "losses.fusion=0", "losses.contrastive=0")
MIXTURE = (
    "losses.objective=mixture",
    "losses.temperature=2",
    "losses.balance=0.3",
    *ALONE,
    "retriever.keys=learned",
    "prompts.position=before_reply",
)
WARM = 2
# The shares of the prompts are exponentials of losses in nats a reply: 100 here, known to 1e-5.
LIMIT = 1e-5


def outcome(scene: Scene, one_process: Reference, steps: int, *more: str) -> Outcome:
    return one_process([Setup(None, scene.overrides("llama", *more), steps)])[0]


@pytest.mark.parametrize("split", ["train.micro_batch=1", "train.micro_batch=2"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_and_micro_batches_equal_one_process(
    scene: Scene, one_process: Reference, world: int, split: str
) -> None:
    options = (*MIXTURE, "prompts.warm_start_steps=1")
    expected = outcome(scene, one_process, 3, *options, "train.micro_batch=4")
    setup = Setup(scene.ds("zero2"), scene.overrides("llama", *options, split), 3)
    ranks = [found[0] for found in run_ranks(world, measure, [setup], timeout_s=200)]
    assert_same(ranks[0], expected, LIMIT)
    assert set(expected.losses[0]) == {"loss", "nll"}  # one prompt still
    assert set(expected.losses[1]) == {"loss", "nll", "mixture", "balance"}
    for other in ranks[1:]:
        for name, tensor in ranks[0].trained.items():
            assert np.array_equal(other.trained[name], tensor), name


@pytest.mark.parametrize("objective", ["paper", "mixture"])
def test_a_warm_start_is_prompt_tuning_to_the_last_bit(
    scene: Scene, one_process: Reference, objective: str
) -> None:
    clip = ("optim.clip_norm=0.01", "optim.weight_decay=0.1")
    one = outcome(scene, one_process, WARM, *clip, *ALONE, "prompts.count=1")
    own = ALONE if objective == "mixture" else ()
    many = outcome(
        scene,
        one_process,
        WARM,
        *clip,
        *own,
        f"losses.objective={objective}",
        "prompts.warm_start_steps=9",
    )
    for prompt in many.trained["bank.weight"]:
        assert np.array_equal(prompt, one.trained["bank.weight"][0])
    assert [step["nll"] for step in many.losses] == [step["nll"] for step in one.losses]
    assert many.valid["nll_selected"] == pytest.approx(one.valid["nll"], rel=1e-6)


def test_prompts_part_after_the_warm_start(scene: Scene, one_process: Reference) -> None:
    options = (*MIXTURE, f"prompts.warm_start_steps={WARM}")
    bank = outcome(scene, one_process, WARM + 1, *options).trained["bank.weight"]
    assert all(not np.array_equal(bank[0], prompt) for prompt in bank[1:])


@pytest.mark.parametrize("place", [ONE, TWO])
@pytest.mark.parametrize("warm", [SAVED_AT - 1, SAVED_AT, SAVED_AT + 1])
def test_a_killed_run_ends_with_the_same_bits(
    scene: Scene, tmp_path: Path, place: Place, warm: int
) -> None:
    """The last checkpoint is one step before, at, or after the step at which the prompts part."""
    more = (*MIXTURE, f"prompts.warm_start_steps={warm}")
    expected = finish(scene, place, tmp_path / "whole", STEPS, more)
    again = finish(scene, place, killed_copy(expected, tmp_path / "run"), STEPS, more)
    assert again.losses == expected.losses
    for name, tensor in expected.trained.items():
        assert np.array_equal(again.trained[name], tensor), name
