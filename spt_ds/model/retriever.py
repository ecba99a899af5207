"""The dense retriever: scores prompts for contexts without a pass through the base.

Part 2 of the method. Legend: K prompts, P virtual tokens, B examples, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from spt_ds.batch import Packed
from spt_ds.model.backbone import Backbone

Activation = Callable[[torch.Tensor], torch.Tensor]
Pool = Callable[[Backbone, Packed, torch.Tensor], torch.Tensor]


def softplus_scores(cos: torch.Tensor) -> torch.Tensor:
    """Monotone and positive: softplus(cos) = log(1 + exp(cos)), [K, B] -> [K, B]."""
    return F.softplus(cos)


class Retriever(nn.Module):
    """Scores s_kb = activation(cos(v_k, c_b)) of each prompt for each context.

    `c_b = W_c pooled_b + b_c`, `v_k = W_p mean_p E_kp + b_p`, or v_k is trained itself: prompts
    that begin as one would have one projection, and no context could tell them apart.
    """

    def __init__(
        self,
        size: int,
        *,
        shared: bool,
        keys: int = 0,
        activation: Activation = softplus_scores,
        generator: torch.Generator | None = None,
    ) -> None:
        """`keys` is K where the v_k are trained themselves, else 0."""
        super().__init__()
        self.context = _linear(size, generator)
        self.prompt: nn.Linear | None = None
        self.keys: nn.Parameter | None = None
        if keys:
            self.keys = nn.Parameter(torch.randn(keys, size, generator=generator) * size**-0.5)
        else:
            # A shared layer is one module under two names. `named_parameters` lists it once, so
            # optimizer and checkpoints hold it once.
            self.prompt = self.context if shared else _linear(size, generator)
        self.activation = activation

    def cosines(self, bank: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """bank E [K, P, D], pooled contexts [B, D] -> cosines [K, B], as precise as the weights."""
        contexts = self.context(pooled.to(self.context.weight.dtype))
        prompts = self.keys if self.prompt is None else self.prompt(bank.mean(dim=1))
        assert prompts is not None
        return F.cosine_similarity(prompts[:, None], contexts[None], dim=-1)

    def forward(self, bank: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """bank E [K, P, D], pooled contexts [B, D] -> scores s [K, B]."""
        scores: torch.Tensor = self.activation(self.cosines(bank, pooled))
        return scores


def _linear(size: int, generator: torch.Generator | None) -> nn.Linear:
    """A Linear in torch's own default range, drawn from `generator`: alike on all ranks."""
    layer = nn.Linear(size, size)
    bound = size**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def mean_of_contexts(backbone: Backbone, packed: Packed, text: torch.Tensor) -> torch.Tensor:
    """Mean embedding [B, D] of each context, in fp32, or fp64 where the embeddings are.

    Args: text [t, D], the embeddings of `packed.ids`, contexts first. The backbone is for a pool
    that looks another token up (see model/reference.py).
    """
    sums = span_sums(text[: len(packed.of_context)], packed.of_context)
    return sums / packed.context_tokens.to(sums.dtype)[:, None]


def span_sums(embeddings: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """Sum the embeddings [n, D] of each span, in fp32 or better: member [n, B] of 0/1 -> [B, D].

    A matrix product adds in the same order in every run.
    """
    # A bf16 sum over some hundred tokens would lose the differences that the retriever reads.
    precise = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    return member.to(precise.dtype).T @ precise
