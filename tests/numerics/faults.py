"""Deliberate faults: each replaces one function of the package by a broken variant.

A tolerance is worth what it can see: `test_sees_faults.py` applies each of these and demands that
the comparison with the twin fails, in every dtype that is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spt_ds.batch import Packed
from spt_ds.model import attention, losses, reference, rows, spt, varlen
from spt_ds.model.attention import Branches, Layout
from spt_ds.model.backbone import Backbone
from spt_ds.model.head import FrozenHead
from spt_ds.model.retriever import Retriever, mean_of_contexts
from spt_ds.model.spt import Spt

Tensor = torch.Tensor
ALL = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Fault:
    """`break_it` patches the package; `where` are the fields of the Case in which the fault can
    show.
    """

    name: str
    break_it: Callable[[pytest.MonkeyPatch], None]
    where: dict[str, Any]
    dtypes: Sequence[torch.dtype] = ALL


def in_packed(patch: pytest.MonkeyPatch, change: Callable[[Packed], Packed]) -> None:
    """Change each micro-batch when it has been packed."""
    right = Spt.pack
    patch.setattr(Spt, "pack", lambda self, batch: change(right(self, batch)))


def off_by_one_target(patch: pytest.MonkeyPatch) -> None:
    in_packed(patch, lambda packed: replace(packed, reads=packed.reads - 1))


def last_target_dropped(patch: pytest.MonkeyPatch) -> None:
    """EOS counted with loss 0."""
    right = FrozenHead.forward

    def broken(self: Any, hidden: Tensor, targets: Tensor | None = None, *args: Any) -> Tensor:
        out = right(self, hidden, targets, *args)
        return out if targets is None else out * (targets != 2)

    patch.setattr(FrozenHead, "forward", broken)


def fusion_without_bias_scale(patch: pytest.MonkeyPatch) -> None:
    right = FrozenHead.forward

    def broken(
        self: Any, hidden: Tensor, targets: Any = None, bias_scale: Any = None, chunk_mib: int = 128
    ) -> Tensor:
        return right(self, hidden, targets, None, chunk_mib)

    patch.setattr(FrozenHead, "forward", broken)


def positions_that_skip_the_prompt(patch: pytest.MonkeyPatch) -> None:
    """The text starts at position 0, as if no prompt stood before it."""
    right = Layout.__init__

    def broken(self: Any, lens: Any, positions: Tensor, *args: Any, **kwargs: Any) -> None:
        right(self, lens, (positions - 2).clamp_min(0), *args, **kwargs)

    patch.setattr(Layout, "__init__", broken)


def branches_at_position_zero(patch: pytest.MonkeyPatch) -> None:
    """Suffix branches that count from 0 instead of from the end of their context."""
    right = Branches.__init__

    def broken(self: Any, lens: Any, positions: Tensor, *args: Any, **kwargs: Any) -> None:
        contexts = torch.tensor(kwargs["context"].lens)
        starts = torch.repeat_interleave(contexts, torch.tensor(lens))
        right(self, lens, positions - starts, *args, **kwargs)

    patch.setattr(Branches, "__init__", broken)


def packed_without_a_mask(patch: pytest.MonkeyPatch) -> None:
    """One long causal row: what `transformers` silently does with packed OPT rows."""
    right = Layout.__init__

    def broken(self: Any, lens: Any, *args: Any, **kwargs: Any) -> None:
        right(self, [sum(lens)], *args, **kwargs)

    patch.setattr(Layout, "__init__", broken)


def no_causal_mask(patch: pytest.MonkeyPatch) -> None:
    right = F.scaled_dot_product_attention
    patch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: right(*a, **{**k, "is_causal": False})
    )


def a_context_token_is_hidden(patch: pytest.MonkeyPatch) -> None:
    """Branches that do not see the first token of their context."""
    right = attention._softmax

    def broken(scores: Tensor, scale: float) -> Tensor:
        hidden = scores.clone()
        hidden[..., 0] = float("-inf")
        return right(hidden, scale)

    patch.setattr(attention, "_softmax", broken)


def branches_read_their_neighbour(patch: pytest.MonkeyPatch) -> None:
    """The keys and values of one branch are read by the next."""
    right = Branches.attend_row

    def broken(
        self: Any, row: int, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        k, v = (
            tensor.unflatten(2, (self.count, -1)).roll(1, dims=2).flatten(2, 3) for tensor in (k, v)
        )
        return right(self, row, layer, q, k, v, scale)

    patch.setattr(Branches, "attend_row", broken)


def branches_without_a_causal_mask(patch: pytest.MonkeyPatch) -> None:
    right = Branches.__init__

    def broken(self: Any, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        self.future = torch.zeros_like(self.future)

    patch.setattr(Branches, "__init__", broken)


def key_heads_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    right = attention._eager

    def broken(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        return right(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1), scale)

    patch.setattr(attention, "_eager", broken)


def branch_heads_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    right = Branches.attend_row

    def broken(
        self: Any, row: int, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        groups = k.shape[1]
        mixed = q.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
        out = right(self, row, layer, mixed, k, v, scale)
        return out.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

    patch.setattr(Branches, "attend_row", broken)


def segments_of_equal_share(patch: pytest.MonkeyPatch) -> None:
    """Context and branch are averaged, whatever their scores add up to."""
    right = varlen._merge
    patch.setattr(
        varlen,
        "_merge",
        lambda out, lse, more, more_lse: ((out + more) / 2, right(out, lse, more, more_lse)[1]),
    )


def segment_gradients_of_themselves(patch: pytest.MonkeyPatch) -> None:
    """The backward pass takes each segment's weights as if the other one were not there."""
    right = varlen._backward

    def broken(
        grad: Tensor, q: Tensor, segment: Any, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return right(grad, q, segment, *varlen._forward(q, segment, scale), scale)

    patch.setattr(varlen, "_backward", broken)


def the_context_has_no_gradient_to_queries(patch: pytest.MonkeyPatch) -> None:
    right = varlen._backward

    def broken(grad: Tensor, q: Tensor, segment: Any, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad_q, grad_k, grad_v = right(grad, q, segment, *more)
        return grad_q * segment.causal, grad_k, grad_v

    patch.setattr(varlen, "_backward", broken)


def swapped_kl(patch: pytest.MonkeyPatch) -> None:
    def broken(nll: Tensor, scores: Tensor, tau_gold: float, tau_sim: float) -> Tensor:
        gold = (-nll.detach() / tau_gold).log_softmax(dim=0)
        similar = (scores / tau_sim).log_softmax(dim=0)
        return (similar.exp() * (similar - gold)).sum(dim=0)

    patch.setattr(losses, "selection", broken)


def gold_not_detached(patch: pytest.MonkeyPatch) -> None:
    def broken(nll: Tensor, scores: Tensor, tau_gold: float, tau_sim: float) -> Tensor:
        gold = (-nll / tau_gold).log_softmax(dim=0)
        return (gold.exp() * (gold - (scores / tau_sim).log_softmax(dim=0))).sum(dim=0)

    patch.setattr(losses, "selection", broken)


def swapped_temperatures(patch: pytest.MonkeyPatch) -> None:
    right = losses.selection
    patch.setattr(losses, "selection", lambda nll, scores, gold, sim: right(nll, scores, sim, gold))


def softmax_over_examples(patch: pytest.MonkeyPatch) -> None:
    right = losses.selection
    patch.setattr(
        losses, "selection", lambda nll, scores, *taus: right(nll.T, scores.T, *taus)[:1].expand(4)
    )


def mixture_over_mean_losses(patch: pytest.MonkeyPatch) -> None:
    """The posterior of a mean over tokens, as if every reply had one token."""
    right = losses.mixture
    patch.setattr(
        losses, "mixture", lambda totals, scores, *taus: 3 * right(totals / 3, scores, *taus)
    )


def mixture_without_gate(patch: pytest.MonkeyPatch) -> None:
    right = losses.mixture
    patch.setattr(
        losses, "mixture", lambda totals, scores, *taus: right(totals, scores.detach(), *taus)
    )


def mixture_prior_over_examples(patch: pytest.MonkeyPatch) -> None:
    """The weights of a prompt sum to 1 over the examples, not those of an example over prompts."""

    def broken(totals: Tensor, scores: Tensor, tau_sim: float, temperature: float) -> Tensor:
        prior = (scores / tau_sim).log_softmax(dim=1)
        return -temperature * (prior - totals / temperature).logsumexp(dim=0)

    patch.setattr(losses, "mixture", broken)


def mixture_temperature_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The factor T before the logarithm is left out: the gradient of every prompt is too small."""
    right = losses.mixture
    patch.setattr(
        losses, "mixture", lambda totals, scores, tau, t: right(totals, scores, tau, t) / t
    )


def mixture_of_expected_losses(patch: pytest.MonkeyPatch) -> None:
    """Prompts weighed by the prior, as in an expected loss: none of them specialises."""
    patch.setattr(
        losses,
        "mixture",
        lambda totals, scores, tau, t: ((scores / tau).softmax(dim=0) * totals).sum(dim=0),
    )


def balance_the_other_way_round(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(losses, "balance", lambda mean: -(mean * len(mean)).log().mean())


def balance_over_logits(patch: pytest.MonkeyPatch) -> None:
    """The mean is taken before the softmax: every context may prefer the same prompt unseen."""

    def broken(self: Spt, pooled: Tensor, weights: Tensor, examples: int) -> Tensor:
        scores = self.trainables.retriever(self.trainables.bank.weight, pooled)
        mean = scores @ weights.to(scores.dtype) / examples
        return (mean / self.config.losses.tau_sim).softmax(dim=0)

    patch.setattr(Spt, "mean_weights", broken)


def keys_of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    right = Retriever.cosines
    patch.setattr(Retriever, "cosines", lambda *args: right(*args).roll(1, dims=0))


def pad_token_in_pool(patch: pytest.MonkeyPatch) -> None:
    def broken(backbone: Backbone, packed: Packed, text: Tensor) -> Tensor:
        tokens = packed.context_tokens
        sums = mean_of_contexts(backbone, packed, text) * tokens[:, None]
        pads = (tokens.max() - tokens)[:, None] * text[0]
        return (sums + pads) / tokens.max()

    patch.setattr(reference, "mean_of_contexts", broken)


def mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """Every example weighs the same in L_nll, however many targets it has."""

    def broken(packed: Packed) -> Packed:
        member = packed.of_response.double()
        scaled = member / member.sum(dim=0) * member.sum() / len(packed.batch)
        return replace(packed, of_response=scaled)

    in_packed(patch, broken)


def fusion_by_softmax(patch: pytest.MonkeyPatch) -> None:
    right = losses.fuse
    patch.setattr(losses, "fuse", lambda hidden, weights: right(hidden, weights.softmax(dim=0)))


def fusion_not_normalised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(losses, "fusion_weights", lambda scores, kind: scores)


def fusion_normalised_over_examples(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        losses, "fusion_weights", lambda scores, kind: scores / scores.sum(dim=1, keepdim=True)
    )


def fusion_without_gradient_to_scores(patch: pytest.MonkeyPatch) -> None:
    right = losses.fuse
    patch.setattr(losses, "fuse", lambda hidden, weights: right(hidden, weights.detach()))


def contrastive_sign(patch: pytest.MonkeyPatch) -> None:
    right = losses.contrastive
    patch.setattr(losses, "contrastive", lambda left, other, targets: right(left, other, -targets))


def projections_swapped(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, bank: Tensor, pooled: Tensor) -> Tensor:
        return F.cosine_similarity(
            self.context(bank.mean(1))[:, None], self.prompt(pooled.to(bank.dtype))[None], -1
        )

    patch.setattr(Retriever, "cosines", broken)


def bank_detached_in_retriever(patch: pytest.MonkeyPatch) -> None:
    right = Retriever.cosines
    patch.setattr(
        Retriever, "cosines", lambda self, bank, pooled: right(self, bank.detach(), pooled)
    )


def losses_under_another_prompt(patch: pytest.MonkeyPatch) -> None:
    """The loss of each prompt is reported under its neighbour."""
    right = rows.target_states
    patch.setattr(spt, "target_states", lambda *args: right(*args).roll(1, dims=0))


def prompts_rounded_to_bf16(patch: pytest.MonkeyPatch) -> None:
    right = rows._pack
    patch.setattr(
        rows, "_pack", lambda packed, text, prompts: right(packed, text, prompts.bfloat16())
    )


def logits_one_precision_lower(patch: pytest.MonkeyPatch) -> None:
    """fp32 logits under an fp64 base, bf16 logits under an fp32 base."""
    right = FrozenHead.forward
    lower = {torch.float64: torch.float32, torch.float32: torch.bfloat16}

    def broken(self: Any, hidden: Tensor, targets: Any = None, *args: Any) -> Tensor:
        if targets is None:
            return right(self, hidden)
        small = lower[hidden.dtype]
        rounded = FrozenHead(self.weight.to(small), None)
        return right(rounded, hidden.to(small), targets, *args).to(hidden.dtype)

    patch.setattr(FrozenHead, "forward", broken)


SUFFIX = {"placement": "suffix"}
VARLEN: dict[str, Any] = {**SUFFIX, "backend": "varlen"}
MIXTURE = {"objective": "mixture"}
FAULTS = [
    Fault("off_by_one_target", off_by_one_target, {}),
    Fault("off_by_one_target_suffix", off_by_one_target, SUFFIX),
    Fault("last_target_dropped", last_target_dropped, {}),
    Fault("fusion_without_bias_scale", fusion_without_bias_scale, {"arch": "phi"}),
    Fault("positions_that_skip_the_prompt", positions_that_skip_the_prompt, {}),
    Fault("positions_that_skip_the_prompt_opt", positions_that_skip_the_prompt, {"arch": "opt"}),
    Fault("branches_at_position_zero", branches_at_position_zero, SUFFIX),
    Fault("branches_at_position_zero_opt", branches_at_position_zero, {**SUFFIX, "arch": "opt"}),
    Fault("packed_without_a_mask", packed_without_a_mask, {}),
    Fault("packed_without_a_mask_opt", packed_without_a_mask, {"arch": "opt"}),
    Fault("no_causal_mask", no_causal_mask, {}),
    Fault("a_context_token_is_hidden", a_context_token_is_hidden, SUFFIX),
    Fault("branches_read_their_neighbour", branches_read_their_neighbour, SUFFIX),
    Fault("branches_without_a_causal_mask", branches_without_a_causal_mask, SUFFIX),
    Fault("branch_heads_in_the_wrong_order", branch_heads_in_the_wrong_order, SUFFIX),
    Fault("key_heads_in_the_wrong_order", key_heads_in_the_wrong_order, {"backend": "eager"}),
    Fault("segments_of_equal_share", segments_of_equal_share, VARLEN),
    Fault("segment_gradients_of_themselves", segment_gradients_of_themselves, VARLEN),
    Fault("the_context_has_no_gradient_to_queries", the_context_has_no_gradient_to_queries, VARLEN),
    Fault("swapped_kl", swapped_kl, {}),
    Fault("gold_not_detached", gold_not_detached, {}),
    Fault("swapped_temperatures", swapped_temperatures, {}),
    Fault("softmax_over_examples", softmax_over_examples, {}),
    Fault("mixture_over_mean_losses", mixture_over_mean_losses, MIXTURE),
    Fault("mixture_without_gate", mixture_without_gate, MIXTURE),
    Fault("mixture_prior_over_examples", mixture_prior_over_examples, MIXTURE),
    Fault("mixture_temperature_forgotten", mixture_temperature_forgotten, MIXTURE),
    Fault("mixture_of_expected_losses", mixture_of_expected_losses, MIXTURE),
    Fault("balance_the_other_way_round", balance_the_other_way_round, MIXTURE),
    Fault("balance_over_logits", balance_over_logits, MIXTURE, ALL[:2]),
    Fault("keys_of_the_neighbour", keys_of_the_neighbour, {**MIXTURE, "keys": "learned"}),
    Fault("pad_token_in_pool", pad_token_in_pool, {}),
    Fault("mean_of_means", mean_of_means, {}),
    Fault("fusion_by_softmax", fusion_by_softmax, {}),
    Fault("fusion_not_normalised", fusion_not_normalised, {"fusion_weights": "normalised"}),
    Fault(
        "fusion_normalised_over_examples",
        fusion_normalised_over_examples,
        {"fusion_weights": "normalised"},
    ),
    Fault("fusion_without_gradient_to_scores", fusion_without_gradient_to_scores, {}),
    Fault("contrastive_sign", contrastive_sign, {}),
    Fault("projections_swapped", projections_swapped, {}),
    Fault("bank_detached_in_retriever", bank_detached_in_retriever, {}),
    Fault("losses_under_another_prompt", losses_under_another_prompt, {}),
    Fault("prompts_rounded_to_bf16", prompts_rounded_to_bf16, {}, ALL[:2]),
    Fault("logits_one_precision_lower", logits_one_precision_lower, {}, ALL[:2]),
]
