"""The four losses of SPT, and the mixture likelihood, as pure tensor functions.

Huang et al. 2024, section 3.3, arXiv 2406.18187. Each returns one number per example, token or
pair, so that the caller can normalise by counts of the whole optimizer step. Everything is computed
in fp32 or better. Legend: K prompts, B examples, n target tokens of the micro-batch, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from spt_ds.config.method import LossConfig

PER_TOKEN = ("nll", "mixture")  # losses that are means over target tokens; others are over examples


def factors(settings: LossConfig) -> dict[str, float]:
    """The losses of the objective in their order, each with its factor in the total.

    The last one is of all contexts of a window, the others are sums over micro-batches.
    """
    if settings.objective == "mixture":
        return {"nll": 0.0, "mixture": 1.0, "balance": settings.balance}
    return {
        "nll": 1.0,
        "selection": settings.selection,
        "fusion": settings.fusion,
        "contrastive": settings.contrastive,
    }


def weighted(settings: LossConfig, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the losses in the order of `factors`, each times its factor.

    A factor of 0 leaves a loss out, so that what it would multiply by 0 is not differentiated.
    """
    # `parts` lacks the last one, which is of a whole window.
    pairs = zip(factors(settings).values(), parts, strict=False)
    return functools.reduce(torch.add, [factor * part for factor, part in pairs if factor])


def mean_per_example(values: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """Token losses [..., n] -> means [..., B]; member [n, B] is 1 for the tokens of an example.

    Matrix products, because they add in the same order in every run.
    """
    return (values @ member) / (torch.ones_like(values) @ member)


def selection(
    nll: torch.Tensor, scores: torch.Tensor, tau_gold: float, tau_sim: float
) -> torch.Tensor:
    """KL(softmax_k(-nll / tau_gold) || softmax_k(s / tau_sim)): [K, B], [K, B] -> [B].

    The gold side is detached: the retriever learns from the losses, not the other way round.
    """
    # Both sides stay logarithms: a prompt whose share underflows to 0 would give 0 * log 0, a NaN.
    gold = (-nll.detach() / tau_gold).log_softmax(dim=0)
    similar = (scores / tau_sim).log_softmax(dim=0)
    return (gold.exp() * (gold - similar)).sum(dim=0)


def mixture(
    totals: torch.Tensor, scores: torch.Tensor, tau_sim: float, temperature: float
) -> torch.Tensor:
    """-T log sum_k pi_k exp(-S_k / T), pi = softmax_k(s / tau_sim): [K, B], [K, B] -> [B].

    `totals` S are the losses of whole replies in nats, the sum over tokens. At T = 1 this is the
    negative log-likelihood of a reply by one prompt drawn from pi; a larger T lets more prompts
    learn from each reply. The gradient weighs each prompt by its posterior share.
    """
    # S is a sum over a whole reply. exp(-S) of a hundred nats is 0 in fp32, so the sum over prompts
    # is taken of logarithms.
    prior = (scores / tau_sim).log_softmax(dim=0)
    return -temperature * (prior - totals / temperature).logsumexp(dim=0)


def mixture_weights(scores: torch.Tensor, tau_sim: float) -> torch.Tensor:
    """pi = softmax_k(s / tau_sim): [K, B] -> [K, B]."""
    return (scores / tau_sim).softmax(dim=0)


def balance(mean_weights: torch.Tensor) -> torch.Tensor:
    """KL(mean of pi over the contexts || equal use): [K] -> []; 0 where all are used equally."""
    return (mean_weights * (mean_weights * len(mean_weights)).log()).sum()


def fusion_weights(scores: torch.Tensor, settings: LossConfig) -> torch.Tensor:
    """Weights of the K prompts' logits where they are mixed: [K, B] -> [K, B].

    They sum to 1 but for `fusion_weights: scores`. Those of a mixture are its pi.
    """
    if settings.objective == "mixture":
        return mixture_weights(scores, settings.tau_sim)
    return scores / scores.sum(dim=0) if settings.fusion_weights == "normalised" else scores


def fuse(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_k weights_kn hidden_kn: [K, n, D], [K, n] -> [n, D].

    The head is linear, so the head of this sum is the sum of the K heads' logits: one row instead
    of K.
    """
    return torch.einsum("knd,kn->nd", hidden.to(weights.dtype), weights)


def contrastive(left: torch.Tensor, right: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """CosineEmbeddingLoss with margin 0 of score columns.

    left [K, n], right [K, n], targets +1 / -1 [n] -> [n].
    """
    return F.cosine_embedding_loss(left.T, right.T, targets, reduction="none")
