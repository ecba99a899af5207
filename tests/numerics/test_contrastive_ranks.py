"""The contrastive loss over several ranks: gradients and reported shares add up to those of one
rank.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from spt_ds.batch import Contrast
from spt_ds.model.spt import Spt
from tests.helpers.tiny import all_pairs, random_batch
from tests.numerics.steps import Case, build, grads_of

LENS = ((5, 3), (9, 1), (1, 6), (7, 4), (3, 2))
ONE_RANK = [[0, 1, 2, 3, 4]]
SPLITS = [ONE_RANK, [[0, 2, 4], [1, 3]], [[3], [0, 1], [4, 2]], [[4], [3], [2], [1], [0]]]


def scores_of(spt: Spt, pooled: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = spt.trainables.retriever(spt.trainables.bank.weight, pooled)
    return out


def run(
    spt: Spt, pooled: torch.Tensor, split: list[list[int]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over ranks of the reported share and of the gradient; rank r holds the examples
    `split[r]`, then fillers.
    """
    for parameter in spt.trainables.parameters():
        parameter.grad = None
    slots = max(len(part) for part in split)
    held = [
        torch.stack([pooled[g] for g in part] + [pooled[0]] * (slots - len(part))) for part in split
    ]
    with torch.no_grad():
        everyone = torch.stack([scores_of(spt, part) for part in held])
    owner = {g: (rank, slot) for rank, part in enumerate(split) for slot, g in enumerate(part)}
    whole = all_pairs(len(pooled))
    total = torch.zeros((), dtype=torch.float64)
    for rank, part in enumerate(split):
        here = np.array([i in part or j in part for i, j in whole.pairs.tolist()])
        contrast = Contrast(
            tuple(owner[g] for g in range(len(pooled))),
            whole.pairs[here],
            whole.targets[here],
            whole.pair_count,
        )
        loss, share = spt.contrastive(held[rank], everyone, contrast, rank)
        loss.backward()
        total = total + share
    return total, grads_of(spt)


@pytest.mark.parametrize("split", SPLITS[1:], ids=["2 ranks", "3 ranks", "5 ranks"])
def test_ranks_add_up(split: list[list[int]]) -> None:
    backbone, spt = build(Case("llama"))
    pooled = backbone.embed(torch.from_numpy(random_batch(LENS).context_ids))[: len(LENS)].clone()
    loss, grads = run(spt, pooled, ONE_RANK)
    shared_loss, shared_grads = run(spt, pooled, split)
    torch.testing.assert_close(shared_loss, loss, rtol=1e-13, atol=1e-13)
    for name, grad in grads.items():
        assert float(grad.norm()) > 1e-6
        torch.testing.assert_close(shared_grads[name], grad, rtol=1e-11, atol=1e-13)


def test_pairs_inside_ranks_alone_would_differ() -> None:
    """The reference's way: a pair of two ranks is never compared."""
    backbone, spt = build(Case("llama"))
    pooled = backbone.embed(torch.from_numpy(random_batch(LENS).context_ids))[: len(LENS)].clone()
    loss, _ = run(spt, pooled, ONE_RANK)
    scores = scores_of(spt, pooled).detach()
    whole = all_pairs(len(pooled))
    inside = [n for n, (i, j) in enumerate(whole.pairs.tolist()) if (i % 2) == (j % 2)]
    kept = Contrast(whole.owner, whole.pairs[inside], whole.targets[inside], len(inside))
    local, _ = spt.contrastive(pooled, scores[None], kept, 0)
    assert len(inside) < len(list(itertools.combinations(range(5), 2)))
    assert abs(float(local.detach() - loss)) > 1e-3
