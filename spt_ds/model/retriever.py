"""The dense retriever: scores every prompt for every context without a pass through the LLM
(method, part 2).

Legend: K prompts, P virtual tokens, B examples, D embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def softplus_scores(cos: torch.Tensor) -> torch.Tensor:
    """Monotone and positive: softplus(cos) = log(1 + exp(cos)), [K, B] -> [K, B]."""
    return F.softplus(cos)


def reference_scores(cos: torch.Tensor) -> torch.Tensor:
    """The reference's softplus(beta 10, threshold 1): jumps down from 0.1313 to 0.1 at cos = 0.1."""
    return F.softplus(cos, beta=10, threshold=1)


ACTIVATIONS = {"softplus": softplus_scores, "reference": reference_scores}


class Retriever(nn.Module):
    """`c_b = W_c pooled_b + b_c`, `v_k = W_p mean_p E_kp + b_p`, score = activation(cos(v_k, c_b))."""

    def __init__(
        self, size: int, *, shared: bool, activation: str, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.context = _linear(size, generator)
        self.prompt = self.context if shared else _linear(size, generator)
        self.activation = ACTIVATIONS[activation]

    def cosines(self, bank: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """bank E [K, P, D], pooled contexts [B, D] -> cosines [K, B], in the precision of the
        projections.
        """
        contexts = self.context(pooled.to(self.context.weight.dtype))
        prompts = self.prompt(bank.mean(dim=1))
        return F.cosine_similarity(prompts[:, None], contexts[None], dim=-1)

    def forward(self, bank: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """bank E [K, P, D], pooled contexts [B, D] -> scores s [K, B]."""
        scores: torch.Tensor = self.activation(self.cosines(bank, pooled))
        return scores


def _linear(size: int, generator: torch.Generator | None) -> nn.Linear:
    """A Linear with torch's own default range, drawn from `generator` so that every rank draws the
    same.
    """
    layer = nn.Linear(size, size)
    bound = size**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def pool(
    embeddings: torch.Tensor,
    member: torch.Tensor,
    tokens: torch.Tensor,
    fill: torch.Tensor | None,
    length: int,
) -> torch.Tensor:
    """Mean embedding of each of B texts.

    Args: embeddings [n, D]; member [n, B], 1 where the token is of the text; tokens [B], how many
    each text has; fill [D] or None. With `fill` each text counts as padded to `length` tokens with
    that row (the reference's pooling, faults 1 and 2). Returns [B, D] in fp32, or fp64 where the
    embeddings are.
    """
    precise = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    # A matrix product: the same order of additions on every device and run.
    sums = member.to(precise.dtype).T @ precise
    counted = tokens.to(precise.dtype)[:, None]
    if fill is None:
        return sums / counted
    missing = length - counted
    return (sums + missing * fill.to(precise.dtype)) / length
