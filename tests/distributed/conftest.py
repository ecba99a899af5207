"""One folder of tiny bases and dialogues for all tests of ranks, and what one process gets from
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.distributed.scenes import Outcome, Scene, Setup, make_scene, measure
from tests.helpers.ranks import run_ranks

Reference = Callable[[Sequence[Setup]], list[Outcome]]


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="session")
def one_process() -> Reference:
    """Gives the outcomes of setups on one rank without DeepSpeed; each is run once in a session."""
    known: dict[tuple[str, ...], Outcome] = {}

    def outcomes(setups: Sequence[Setup]) -> list[Outcome]:
        keys = [(*setup.overrides, str(setup.steps)) for setup in setups]
        new = {
            key: Setup(None, setup.overrides, setup.steps)
            for key, setup in zip(keys, setups, strict=True)
        }
        new = {key: setup for key, setup in new.items() if key not in known}
        if new:
            (found,) = run_ranks(1, measure, list(new.values()), timeout_s=200)
            known.update(zip(new, found, strict=True))
        return [known[key] for key in keys]

    return outcomes
