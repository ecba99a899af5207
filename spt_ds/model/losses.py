"""The four losses of SPT as pure tensor functions.

Huang et al. 2024, section 3.3, arXiv 2406.18187. Each returns one number per example, token or
pair, so that the caller can normalise by counts of the whole optimizer step. Everything is computed
in fp32 or better. Legend: K prompts, B examples, n target tokens of the micro-batch, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    gold = (-nll.detach() / tau_gold).log_softmax(dim=0)
    similar = (scores / tau_sim).log_softmax(dim=0)
    return (gold.exp() * (gold - similar)).sum(dim=0)


def fusion_weights(scores: torch.Tensor, kind: str) -> torch.Tensor:
    """Weights of the K prompts' logits in the fusion: [K, B] -> [K, B]; `normalised` sums to 1."""
    return scores / scores.sum(dim=0) if kind == "normalised" else scores


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
