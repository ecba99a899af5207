"""Faults of the public reference that the model layer does not repeat; numbers as in
docs/explanation/method.md.

Fault 8 (noise on a probability instead of on logits) belongs to generation and is tested there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from spt_ds.batch import Batch
from spt_ds.model import losses
from spt_ds.model.backbone import Backbone
from spt_ds.model.reference import functions_of, jumping_softplus, mean_of_nonzero
from spt_ds.model.retriever import softplus_scores
from spt_ds.model.spt import MicroLosses, Spt
from tests.helpers.tiny import (
    EOS,
    examples_of,
    make_batch,
    pick,
    random_batch,
    tiny_backbone,
    tiny_spt,
)
from tests.numerics.steps import Case, build, counts_of

LENS = ((5, 3), (9, 1), (7, 4))


def micro(backbone: Backbone, spt: Spt, batch: Batch) -> MicroLosses:
    out = backbone(spt.micro_losses, batch, *counts_of(batch))
    assert isinstance(out, MicroLosses)
    return out


def with_other_responses(batch: Batch) -> Batch:
    contexts = [context for context, _ in examples_of(batch)]
    return make_batch(
        contexts,
        [response + 1 for _, response in examples_of(random_batch(((1, 6), (1, 2), (1, 2))))],
    )


def test_fault_01_the_response_is_not_pooled() -> None:
    """Scores are those of the context alone, the same number in training and at decoding time."""
    backbone, spt = build(Case("opt"))
    batch = random_batch(LENS)
    trained = micro(backbone, spt, batch)
    assert torch.equal(trained.scores, micro(backbone, spt, with_other_responses(batch)).scores)
    assert torch.equal(
        trained.scores, backbone(spt.score, spt.pack(with_other_responses(batch)))[2]
    )
    context = backbone.embed(examples_of(batch)[1][0])
    torch.testing.assert_close(trained.pooled[1], context.mean(dim=0), rtol=1e-14, atol=1e-14)


def test_fault_01_the_reference_pool_leaks_the_response() -> None:
    backbone = tiny_backbone("opt")
    spt = tiny_spt(backbone, reference={"padded_pool": True, "pool_length_tokens": 20})
    batch = random_batch(LENS)
    leaked = (
        micro(backbone, spt, batch).scores
        - micro(backbone, spt, with_other_responses(batch)).scores
    )
    assert float(leaked.abs().max()) > 1e-3


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_fault_02_companions_and_their_lengths_change_nothing(placement: str) -> None:
    backbone, spt = build(Case("llama", placement=placement))
    short = random_batch(LENS[:1])
    alone = micro(backbone, spt, short)
    for companion in ((1, 1), (30, 1), (3, 12)):
        long = random_batch((companion,), seed=7)
        rows = [*examples_of(long), *examples_of(short)]
        both = micro(backbone, spt, make_batch([c for c, _ in rows], [r for _, r in rows]))
        torch.testing.assert_close(both.nll[:, 1:], alone.nll, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both.scores[:, 1:], alone.scores, rtol=1e-12, atol=1e-12)


def test_fault_03_the_activation_is_monotone() -> None:
    cos = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    ours = softplus_scores(cos)
    assert float(ours.diff().min()) > 0
    assert float(ours.min()) > 0
    theirs = jumping_softplus(cos)
    assert float(theirs.diff().min()) < -0.03
    jump = jumping_softplus(torch.tensor([0.1, 0.1 + 1e-9], dtype=torch.float64))
    torch.testing.assert_close(
        jump, torch.tensor([0.1313, 0.1], dtype=torch.float64), rtol=0, atol=5e-5
    )


@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_fault_04_identical_prompts_give_identical_losses(
    placement: str, checkpointing: str
) -> None:
    """With a base whose configuration asks for dropout, also when a trainer calls `train()` on the
    whole module.
    """
    rates: dict[str, Any] = {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.3}
    backbone = tiny_backbone("opt", checkpointing=checkpointing, **rates)
    spt = tiny_spt(backbone, count=4, prompts={"placement": placement})
    with torch.no_grad():
        spt.trainables.bank.weight.copy_(spt.trainables.bank.weight[:1].expand(4, -1, -1).clone())
    batch = random_batch(LENS)
    plain = tiny_backbone("opt")
    expected = micro(plain, spt, batch).nll.detach()
    for trains in (False, True):
        if trains:
            backbone.train()
        nll = micro(backbone, spt, batch).nll
        torch.testing.assert_close(nll, nll[:1].expand(4, -1), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)


def test_fault_04_dropout_would_be_seen() -> None:
    """The same comparison with the rates put back: half a nat or more between identical prompts."""
    backbone = tiny_backbone("opt")
    for module in backbone.modules():
        if type(module).__name__ == "OPTDecoderLayer":
            module.dropout = 0.3  # type: ignore[assignment]
            module.training = True
    spt = tiny_spt(backbone, count=2)
    with torch.no_grad():
        spt.trainables.bank.weight.copy_(spt.trainables.bank.weight[:1].expand(2, -1, -1).clone())
    nll = micro(backbone, spt, random_batch(LENS)).nll
    assert float((nll[0] - nll[1]).abs().max()) > 0.1


def test_fault_05_a_target_with_loss_zero_counts() -> None:
    values = torch.tensor([[2.0, 0.0, 4.0, 0.0, 0.0]])
    member = torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 3)
    assert torch.equal(losses.mean_per_example(values, member), torch.tensor([[1.0, 4 / 3]]))
    assert torch.equal(mean_of_nonzero(values, member), torch.tensor([[2.0, 4.0]]))


@pytest.mark.parametrize(("nonzero", "counted"), [(False, 3), (True, 1)])
def test_fault_05_through_the_whole_step(nonzero: bool, counted: int) -> None:
    """A head so sure of one token that its loss is exactly 0 in fp32: our mean is over all 3
    targets, not over 1.
    """
    backbone = tiny_backbone("phi", torch.float32)
    sure, other = 20, 21
    head = backbone.lm.get_output_embeddings()
    with torch.no_grad():
        head.bias[sure] = 1e4
    spt = tiny_spt(backbone, count=1, dtype=torch.float32, reference={"nonzero_mask": nonzero})
    batch = make_batch([torch.tensor([5, 6, 7])], [torch.tensor([sure, other, sure])])
    nll = float(micro(backbone, spt, batch).nll)
    assert 9e3 / counted < nll < 1.1e4 / counted


def test_fault_07_eos_is_a_target() -> None:
    """Every reply's EOS reaches the head as a target, under each prompt and in the fusion."""
    backbone, spt = build(Case("llama"))
    batch = random_batch(LENS)
    seen: list[torch.Tensor] = []

    def record(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[1])

    hook = backbone.lm.get_output_embeddings().register_forward_pre_hook(record)
    micro(backbone, spt, batch)
    hook.remove()
    targets = torch.from_numpy(batch.response_ids)
    assert torch.equal(seen[0], targets.repeat(4))
    assert [int(response[-1]) for _, response in examples_of(batch)] == [EOS] * 3


def test_fault_07_a_model_that_never_stops_has_a_higher_loss() -> None:
    """Making EOS unlikely raises exactly the loss of the EOS positions; pad = EOS as with Llama
    changes nothing.
    """
    backbone, spt = build(Case("phi"))
    batch = pick(random_batch(LENS), [1])  # a reply of EOS alone
    before = micro(backbone, spt, batch).nll
    spt = Spt(spt.config, spt.trainables, functions_of(spt.config.reference, pad_id=EOS))
    assert torch.equal(before, micro(backbone, spt, batch).nll)
    with torch.no_grad():
        backbone.lm.get_output_embeddings().bias[EOS] -= 5.0
    assert float((micro(backbone, spt, batch).nll - before).min()) > 1.0


def test_all_weights_zero_give_a_loss_of_zero() -> None:
    """A rank that holds fillers alone adds nothing, not NaN."""
    backbone, spt = build(Case("llama"))
    batch = random_batch(LENS)
    out = backbone(spt.micro_losses, replace(batch, weights=(0.0,) * 3), *counts_of(batch))
    assert float(out.total.detach()) == 0.0
    assert torch.equal(out.parts, torch.zeros(3, dtype=torch.float64))
