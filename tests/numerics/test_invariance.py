"""A result depends on its own example alone: not on companions, order, the split into micro-batches
or fillers.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from spt_ds.batch import Batch
from spt_ds.model.backbone import Backbone
from spt_ds.model.head import FrozenHead
from spt_ds.model.spt import MicroLosses, Spt
from tests.helpers.tiny import all_pairs, pick, random_batch
from tests.helpers.tolerances import Step, assert_steps_close
from tests.numerics.steps import Case, build, counts_of, our_step

LENS = ((5, 3), (12, 1), (1, 6), (7, 4), (3, 2))
CASES = [
    Case(arch, backend=backend, placement=placement)
    for arch, placement, backend in itertools.product(
        ["opt", "llama"], ["prefix", "suffix"], ["sdpa", "eager"]
    )
]
each_case = pytest.mark.parametrize(
    "case", CASES, ids=[f"{c.arch}-{c.placement}-{c.backend}" for c in CASES]
)


def micro(backbone: Backbone, spt: Spt, batch: Batch) -> MicroLosses:
    out = backbone(spt.micro_losses, batch, *counts_of(batch))
    assert isinstance(out, MicroLosses)
    return out


def assert_same(ours: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)


@each_case
def test_alone_and_in_a_batch(case: Case) -> None:
    backbone, spt = build(case)
    batch = random_batch(LENS)
    together = micro(backbone, spt, batch)
    for b in range(len(batch)):
        alone = micro(backbone, spt, pick(batch, [b]))
        assert_same(alone.nll[:, 0], together.nll[:, b])
        assert_same(alone.scores[:, 0], together.scores[:, b])
        assert_same(alone.pooled[0], together.pooled[b])


@each_case
def test_order_of_the_batch(case: Case) -> None:
    backbone, spt = build(case)
    batch, order = random_batch(LENS), [3, 0, 4, 2, 1]
    straight, shuffled = (
        our_step(backbone, spt, [batch]),
        our_step(backbone, spt, [pick(batch, order)]),
    )
    permuted = {name: straight.values[name][:, order] for name in ("nll", "scores")}
    assert_steps_close(shuffled, Step({**straight.values, **permuted}, straight.grads), case.dtype)


@each_case
@pytest.mark.parametrize(
    "split",
    [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3, 4]], [[0], [1], [2], [3], [4]], [[0, 1, 2, 3], [4]]],
)
def test_split_into_micro_batches(case: Case, split: list[list[int]]) -> None:
    """Sums of totals over a split are the unsplit total, contrastive pairs across micro-batches
    included.
    """
    backbone, spt = build(case)
    batch, contrast = random_batch(LENS), all_pairs(len(LENS))
    whole = our_step(backbone, spt, [batch], contrast)
    assert_steps_close(
        our_step(backbone, spt, [pick(batch, part) for part in split], contrast), whole, case.dtype
    )


def test_a_mean_of_micro_batch_means_would_differ() -> None:
    """The fault that the split test is for: each micro-batch normalised by its own counts."""
    case = CASES[0]
    backbone, spt = build(case)
    batch = random_batch(LENS)
    whole = our_step(backbone, spt, [batch])
    parts = [pick(batch, [0, 1]), pick(batch, [2, 3, 4])]
    means = [micro(backbone, spt, part).total.detach() for part in parts]
    assert abs(float(sum(means) / 2 - whole.values["total"])) > 1e-3


@each_case
def test_filler_rows_change_nothing(case: Case) -> None:
    backbone, spt = build(case)
    batch = random_batch(LENS)
    counts = counts_of(batch)
    filled = pick(batch, [0, 1, 2, 3, 4, 1, 2])
    filled = replace(filled, weights=(1.0,) * 5 + (0.0,) * 2)
    plain, padded = (
        our_step(backbone, spt, [batch]),
        our_step(backbone, spt, [filled], counts=counts),
    )
    kept = {name: padded.values[name][:, :5] for name in ("nll", "scores")}
    assert_steps_close(Step({**padded.values, **kept}, padded.grads), plain, case.dtype)
    assert counts_of(filled) == counts


def test_a_filler_that_counts_is_seen() -> None:
    backbone, spt = build(CASES[0])
    batch = random_batch(LENS)
    filled = pick(batch, [0, 1, 2, 3, 4, 1])  # weight 1.0
    one, other = (
        our_step(backbone, spt, [batch]),
        our_step(backbone, spt, [filled], counts=counts_of(batch)),
    )
    assert abs(float(one.values["total"] - other.values["total"])) > 1e-3


def poisoned(text: torch.Tensor, batch: Batch, victim: int, poison: float) -> torch.Tensor:
    """The embeddings [t, D] of contexts and responses with every token of one example replaced."""
    contexts, responses = text.clone().split([len(batch.context_ids), len(batch.response_ids)])
    contexts.split(batch.context_lens)[victim].fill_(poison)
    responses.split(batch.response_lens)[victim].fill_(poison)
    return torch.cat([contexts, responses])


@each_case
@pytest.mark.parametrize("poison", [float("nan"), 1e4, float("inf")])
@pytest.mark.parametrize("victim", [0, 1, 4])
def test_no_token_attends_across_examples(
    case: Case, victim: int, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states and token losses of the other examples keep every bit."""
    backbone, spt = build(case)
    batch = random_batch(LENS)
    clean = backbone.embed(spt.pack(batch).ids)
    scores = torch.ones(case.count, len(batch), dtype=case.dtype)
    right = FrozenHead.forward
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(self: FrozenHead, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        out = right(self, hidden, *args)
        seen.append((hidden, out))
        return out

    monkeypatch.setattr(FrozenHead, "forward", record)

    def per_example(text: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Rows of the head and their losses: those of the K prompts and of the fusion."""
        # Pooling is a matrix product over all tokens, so the scores are given, not computed.
        monkeypatch.setattr(Spt, "score", lambda *args: (text, text[:0], scores))
        micro(backbone, spt, batch)
        hidden, losses = (part.unflatten(0, (case.count + 1, -1)) for part in seen.pop())
        lens = list(batch.response_lens)
        return list(zip(hidden.split(lens, dim=1), losses.split(lens, dim=1), strict=True))

    before, after = per_example(clean), per_example(poisoned(clean, batch, victim, poison))
    for b, ((hidden, loss), (dirty_hidden, dirty_loss)) in enumerate(
        zip(before, after, strict=True)
    ):
        assert torch.equal(hidden, dirty_hidden) == (b != victim)
        assert torch.equal(loss, dirty_loss) == (b != victim)


@each_case
def test_nll_of_companions_survives_a_huge_example(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through the whole micro-step, for a poison that stays finite."""
    backbone, spt = build(case)
    batch, victim = random_batch(LENS), 2
    clean = micro(backbone, spt, batch)
    right = backbone.embed
    monkeypatch.setattr(backbone, "embed", lambda ids: poisoned(right(ids), batch, victim, 1e4))
    dirty = micro(backbone, spt, batch)
    others = [b for b in range(len(batch)) if b != victim]
    assert torch.equal(clean.nll[:, others], dirty.nll[:, others])
    assert torch.equal(clean.scores[:, others], dirty.scores[:, others])
    assert not torch.equal(clean.nll[:, victim], dirty.nll[:, victim])


def test_counts_are_those_of_the_window_not_of_the_micro_batch() -> None:
    backbone, spt = build(CASES[0])
    batch = random_batch(LENS)
    small, large = (
        backbone(spt.micro_losses, batch, 5, 16),
        backbone(spt.micro_losses, batch, 10, 64),
    )
    assert_same(large.parts, small.parts / torch.tensor([4.0, 2.0, 2.0], dtype=torch.float64))
