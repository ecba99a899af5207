"""The identities that make the method cheap (docs/numerics.md), each proven by counting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from spt_ds.batch import Batch
from spt_ds.model.backbone import Backbone
from spt_ds.model.rows import read_context, target_states
from spt_ds.model.spt import MicroLosses, Spt
from tests.helpers.tiny import pick, random_batch
from tests.numerics.steps import Case, build, contrast_of, counts_of, our_step, twin_of

LENS = ((9, 3), (14, 1), (6, 5))
CONTEXT, TARGETS, EXAMPLES = 29, 9, 3
COUNT, TOKENS = 4, 2


@dataclass
class Meter:
    """What passed through the base: calls of the whole base, and per call of the last layer and of
    the head, rows.
    """

    base_calls: int = 0
    layer_tokens: list[int] = field(default_factory=list)
    layer_grads: list[bool] = field(default_factory=list)
    head_rows: list[int] = field(default_factory=list)


@contextmanager
def metered(backbone: Backbone) -> Iterator[Meter]:
    meter = Meter()
    lm = backbone.lm
    layers = next(m for m in lm.modules() if isinstance(m, torch.nn.ModuleList))

    def base(module: Any, args: Any, kwargs: Any) -> None:
        meter.base_calls += 1

    def layer(module: Any, args: Any, kwargs: Any) -> None:
        meter.layer_tokens.append(args[0].shape[0] * args[0].shape[1])
        meter.layer_grads.append(torch.is_grad_enabled())

    def head(module: Any, args: Any, kwargs: Any) -> None:
        meter.head_rows.append(args[0].numel() // args[0].shape[-1])

    targets = [(lm.base_model, base), (layers[-1], layer), (lm.get_output_embeddings(), head)]
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in targets]
    try:
        yield meter
    finally:
        for hook in hooks:
            hook.remove()


def step(placement: str = "prefix", arch: str = "llama") -> tuple[Backbone, Spt, Batch, Case]:
    case = Case(arch, placement=placement, count=COUNT, tokens=TOKENS)
    return (*build(case), random_batch(LENS), case)


def forward(backbone: Backbone, spt: Spt, batch: Batch) -> MicroLosses:
    out = backbone(spt.micro_losses, batch, *counts_of(batch))
    assert isinstance(out, MicroLosses)
    return out


@pytest.mark.parametrize("arch", ["opt", "llama"])
def test_identity_1_one_forward_for_all_prompts(arch: str) -> None:
    backbone, spt, batch, _ = step(arch=arch)
    with metered(backbone) as meter:
        forward(backbone, spt, batch).total.backward()
    assert meter.base_calls == 1
    # The last target is never read: P + C + R - 1 tokens in each row, and no padding.
    assert meter.layer_tokens == [COUNT * (EXAMPLES * TOKENS + CONTEXT + TARGETS - EXAMPLES)]


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_identity_2_only_response_positions_reach_the_head(placement: str) -> None:
    backbone, spt, batch, _ = step(placement)
    with metered(backbone) as meter:
        forward(backbone, spt, batch)
    assert meter.head_rows == [COUNT * TARGETS + TARGETS]
    assert meter.head_rows[0] < COUNT * (CONTEXT + TARGETS)


@pytest.mark.parametrize("arch", ["llama", "phi"])
def test_identity_3_fusion_is_one_head_row(arch: str) -> None:
    """(K + 1) * n rows in all, and the loss is that of K x V mixed logits, for a head with bias
    too.
    """
    backbone, spt, batch, case = step(arch=arch)
    assert (backbone.lm.get_output_embeddings().bias is not None) == (arch == "phi")
    with metered(backbone) as meter:
        out = forward(backbone, spt, batch)
    assert meter.head_rows == [(COUNT + 1) * TARGETS]
    expected = twin_of(case, spt, batch, None).values["fusion"]
    torch.testing.assert_close(out.parts[2], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_identity_4_no_weight_gradients(placement: str, checkpointing: str) -> None:
    backbone, spt = build(Case("llama", placement=placement, checkpointing=checkpointing))
    batch = random_batch(LENS)
    before = {name: weight.clone() for name, weight in backbone.lm.state_dict().items()}
    found = our_step(backbone, spt, [batch], contrast_of(batch, torch.float64))
    for name, parameter in backbone.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
    assert all(
        torch.equal(before[name], weight) for name, weight in backbone.lm.state_dict().items()
    )
    assert all(float(grad.abs().max()) > 0 for grad in found.grads.values())
    assert not backbone(spt.score, spt.pack(batch))[0].requires_grad


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_identity_5_each_example_is_read_once_with_its_own_prompt(placement: str) -> None:
    """One batch in which every row has another prompt equals the rows of the full K-way pass."""
    backbone, spt, batch, _ = step(placement)
    bank, chosen = spt.trainables.bank.weight.detach(), torch.tensor([2, 0, 3])
    every = bank[:, None].expand(-1, EXAMPLES, -1, -1)
    packed = spt.pack(batch)
    with torch.no_grad():
        text = backbone.embed(packed.ids)
        read = read_context(backbone, packed, text)
        full = backbone(target_states, packed, text, every, read)
        with metered(backbone) as meter:
            read = read_context(backbone, packed, text)
            own = backbone(target_states, packed, text, bank[chosen][None], read)
    rows = torch.repeat_interleave(chosen, torch.tensor(batch.response_lens))
    torch.testing.assert_close(own[0], full[rows, torch.arange(TARGETS)], rtol=1e-12, atol=1e-12)
    assert sum(meter.layer_tokens) == EXAMPLES * TOKENS + CONTEXT + TARGETS - EXAMPLES


def test_identity_6_suffix_reads_each_context_once() -> None:
    backbone, spt, batch, _ = step("suffix")
    with metered(backbone) as meter:
        forward(backbone, spt, batch).total.backward()
    assert meter.layer_tokens == [CONTEXT, COUNT * (EXAMPLES * TOKENS + TARGETS - EXAMPLES)]
    assert meter.layer_grads == [False, True]
    assert meter.base_calls == 2


def test_identity_6_selective_backward_reads_each_context_once_too() -> None:
    backbone, spt = build(
        Case("llama", placement="suffix", count=COUNT, tokens=TOKENS), train_top_m=1
    )
    with metered(backbone) as meter:
        forward(backbone, spt, random_batch(LENS)).total.backward()
    branch = EXAMPLES * TOKENS + TARGETS - EXAMPLES
    assert meter.layer_tokens == [CONTEXT, COUNT * branch, branch]
    assert meter.layer_grads == [False, False, True]


def test_identity_6_suffix_context_tokens_do_not_grow_with_prompts() -> None:
    seen = []
    for count in (1, 2, 5):
        backbone, spt = build(Case("llama", placement="suffix", count=count, tokens=TOKENS))
        with metered(backbone) as meter:
            forward(backbone, spt, random_batch(LENS))
        seen.append(meter.layer_tokens)
    branch = EXAMPLES * TOKENS + TARGETS - EXAMPLES
    assert seen == [[CONTEXT, branch], [CONTEXT, 2 * branch], [CONTEXT, 5 * branch]]


def test_a_base_of_one_example_counts_the_same() -> None:
    """The smallest case: one example, one prompt, a reply of EOS alone reads prompt and context and
    nothing else.
    """
    backbone, spt = build(Case("llama", count=1, tokens=TOKENS))
    with metered(backbone) as meter:
        forward(backbone, spt, pick(random_batch(LENS), [1]))
    assert (meter.layer_tokens, meter.head_rows) == ([TOKENS + 14], [2])
