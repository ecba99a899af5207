"""`spt-ds audit` on a run: the losses of the training code, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spt_ds import dist
from spt_ds.audit.command import main
from spt_ds.audit.measure import measure
from spt_ds.engine.session import open_split, open_trained
from spt_ds.run.folder import RunFolder
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import make_run

EXAMPLES, PROMPTS = 9, 3


@pytest.fixture(scope="module", params=["before_text", "before_reply"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    made = make_run(folder, arch="llama", prompts=PROMPTS, examples=EXAMPLES)
    text = made.config.read_text(encoding="utf-8")
    made.config.write_text(text.replace("position: before_text", f"position: {request.param}"))
    return made.path


def audit(world: dist.World, arguments: list[str]) -> int:
    return main(arguments)


def measured(world: dist.World, run: Path) -> list[Any]:
    """What the audit measures, and the same from the code of training: losses, tokens, scores."""
    folder = RunFolder(run)
    session, _ = open_trained(folder.load_config(), folder, "best", None, world)
    store = open_split(session, "test")
    found = measure(session, store)
    from spt_ds.data.loader import make_batch

    with torch.no_grad():
        batch = make_batch(store, list(range(len(store))))
        out = session.backbone(session.spt.micro_losses, batch, 1, 1)
    return [
        *(array.tolist() for array in (found.losses, found.scores, found.tokens, found.ensemble)),
        out.nll.T.tolist(),
        out.scores.T.tolist(),
        list(batch.response_lens),
        [text.response for text in found.texts],
    ]


def test_it_measures_what_training_measures(run: Path) -> None:
    (one,) = run_ranks(1, measured, run)
    losses, scores, tokens, ensemble, nll, trained_scores, lens, replies = map(np.asarray, one)
    np.testing.assert_allclose(losses, nll * lens[:, None], rtol=1e-5)
    np.testing.assert_allclose(scores, trained_scores, rtol=1e-5)
    assert tokens.tolist() == lens.tolist()
    assert replies.tolist() == [f"yes {n}" for n in range(EXAMPLES)]
    # A mean of probabilities is at least their geometric mean, and at most the best of each token.
    assert (ensemble <= losses.mean(axis=1) + 1e-6).all()
    assert (ensemble >= losses.min(axis=1) - np.log(PROMPTS) * tokens).all()


def test_two_ranks_measure_the_same(run: Path) -> None:
    (one,) = run_ranks(1, measured, run)
    for rank in run_ranks(2, measured, run):
        for ours, theirs in zip(rank[:4], one[:4], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        assert rank[7] == one[7]


def test_the_command_writes_a_verdict(run: Path, tmp_path: Path) -> None:
    kinds = tmp_path / "kinds"
    kinds.write_text("".join(f"{'ab'[n % 2]}\n" for n in range(EXAMPLES)))
    out = tmp_path / "audit.json"
    given = [str(run), "--against", str(run), "--kinds", str(kinds), "--out", str(out)]
    assert run_ranks(1, audit, given) == [0]
    found = json.loads(out.read_text())
    assert found["examples"] == EXAMPLES
    assert sum(found["usage"]) == EXAMPLES
    assert found["checkpoint"] == "step-00000007"
    assert found["verdict"]["word"] != "earns its keep"  # no run is better than itself
    assert found["against"]["run"]["difference"] == 0.0
    assert set(found["kinds"]) == {"a", "b"}
    assert len(found["bank"]) == PROMPTS


def test_kinds_must_be_those_of_all_examples(run: Path, tmp_path: Path) -> None:
    (tmp_path / "kinds").write_text("a\nb\n")
    given = [str(run), "--kinds", str(tmp_path / "kinds"), "--out", str(tmp_path / "audit.json")]
    assert run_ranks(1, audit, given) == [2]
    assert not (tmp_path / "audit.json").exists()
