"""Slow float64 twins of the method, written from the formulas with loops and independent of spt_ds.

Nothing here imports the package. Every (prompt, example) pair is one unpadded forward of the base
with full logits; the fusion mixes K rows of V logits; attention is the textbook formula. Legend: K
prompts, P virtual tokens, B examples, D embedding size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

TWIN = "twin_attention"
Tensor = torch.Tensor


def twin_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of one row, by heads; `transformers`' eager softmax is fp32 at best."""
    heads, tokens = query.shape[1], query.shape[2]
    assert query.shape[0] == 1
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    out = []
    for h in range(heads):
        g = h // (heads // key.shape[1])
        scores = (query[0, h] @ key[0, g].T * scaling).masked_fill(future, -math.inf)
        out.append(torch.softmax(scores, dim=-1) @ value[0, g])
    return torch.stack(out, dim=1)[None], None  # [1, T, H, E]


AttentionInterface.register(TWIN, twin_attention)
AttentionMaskInterface.register(TWIN, lambda *args, **kwargs: None)


@dataclass
class TwinParts:
    """The trainable tensors in float64, each requiring a gradient. `shared` retrievers pass W_c for
    W_p too; those with keys of their own have no W_p.
    """

    prompts: Tensor  # [K, P, D]
    w_c: Tensor  # [D, D]
    b_c: Tensor  # [D]
    w_p: Tensor | None = None  # [D, D]
    b_p: Tensor | None = None  # [D]
    keys: Tensor | None = None  # [K, D]


@dataclass(frozen=True)
class TwinSettings:
    placement: str
    selection: float
    fusion: float
    contrastive: float
    tau_gold: float
    tau_sim: float
    normalised: bool = False  # fusion by s_k / sum_k s_k
    temperature: float | None = None  # of the mixture, which then is the objective
    balance: float = 0.0  # weight of the mixture's balance loss


def cross_entropy(logits: Tensor, target: int) -> Tensor:
    """-log softmax(logits)[target]: [V] -> []."""
    return torch.log(torch.exp(logits - logits.max()).sum()) + logits.max() - logits[target]


def add(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def mean(values: Sequence[Tensor]) -> Tensor:
    """Arithmetic mean; 0 of nothing (no pairs in a batch of one)."""
    return add(values) / len(values) if values else torch.zeros((), dtype=torch.float64)


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (torch.sqrt((a * a).sum()) * torch.sqrt((b * b).sum()))


def score(parts: TwinParts, k: int, context: Tensor) -> Tensor:
    """s_kb of prompt k for one context's embeddings [C, D]: []."""
    c = parts.w_c @ mean([context[t] for t in range(len(context))]) + parts.b_c
    if parts.keys is not None:
        return softplus(cosine(parts.keys[k], c))
    assert parts.w_p is not None
    assert parts.b_p is not None
    prompt = parts.prompts[k]
    v = parts.w_p @ mean([prompt[p] for p in range(len(prompt))]) + parts.b_p
    return softplus(cosine(v, c))


def target_logits(
    lm: Any, prompt: Tensor, context: Tensor, response: Tensor, placement: str, at: int | None
) -> list[Tensor]:
    """Logits [V] that predict each response token, from one unpadded forward of the base.

    The prompt stands before context token `at`; None: before the first or behind the last.
    """
    table = lm.get_input_embeddings()
    if at is None:
        at = 0 if placement == "prefix" else len(context)
    row = torch.cat([table(context[:at]), prompt, table(context[at:]), table(response)])
    logits = lm(inputs_embeds=row[None], use_cache=False).logits[0]
    first = len(prompt) + len(context) - 1
    return [logits[first + i] for i in range(len(response))]


def selection(
    nll: Sequence[Tensor], scores: Sequence[Tensor], tau_gold: float, tau_sim: float
) -> Tensor:
    """KL(softmax(-nll / tau_gold) || softmax(s / tau_sim)) of one example, gold detached: K numbers
    each -> [].
    """
    gold = [torch.exp(-value.detach() / tau_gold) for value in nll]
    similar = [torch.exp(value / tau_sim) for value in scores]
    p = [value / add(gold) for value in gold]
    q = [value / add(similar) for value in similar]
    return add([a * torch.log(a / b) for a, b in zip(p, q, strict=True)])


def mixture(
    totals: Sequence[Tensor], scores: Sequence[Tensor], tau_sim: float, temperature: float
) -> Tensor:
    """-T log sum_k pi_k exp(-S_k / T) of one example: K losses of its reply, K scores -> []."""
    weights = [torch.exp(value / tau_sim) for value in scores]
    likelihood = add(
        [
            weight / add(weights) * torch.exp(-total / temperature)
            for weight, total in zip(weights, totals, strict=True)
        ]
    )
    return -temperature * torch.log(likelihood)


def balance(columns: Sequence[Sequence[Tensor]], tau_sim: float) -> Tensor:
    """KL of the mean mixture weights over the examples from equal ones: K scores each -> []."""
    count = len(columns[0])
    shares = []
    for column in columns:
        weights = [torch.exp(value / tau_sim) for value in column]
        shares.append([weight / add(weights) for weight in weights])
    means = [mean([share[k] for share in shares]) for k in range(count)]
    return add([value * torch.log(count * value) for value in means])


def contrastive(left: Sequence[Tensor], right: Sequence[Tensor], target: float) -> Tensor:
    """CosineEmbeddingLoss, margin 0, of two examples' K scores."""
    cos = cosine(torch.stack(list(left)), torch.stack(list(right)))
    return 1 - cos if target > 0 else torch.clamp(cos, min=0.0)


def twin_step(
    lm: Any,
    parts: TwinParts,
    examples: Sequence[tuple[Tensor, Tensor]],
    pairs: Sequence[tuple[int, int, float]],
    settings: TwinSettings,
    trained: Sequence[Sequence[int]] | None = None,
    prompt_at: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Every loss of one step over `examples` (context ids, response ids) and BLEU `pairs` (i, j,
    target).

    `trained[b]` lists the prompts of example b whose hidden states, here logits, keep their
    gradient; None: all. `prompt_at[b]` context tokens of example b stand before the prompt.
    """
    count, size = len(parts.prompts), len(examples)
    embed = lm.get_input_embeddings()
    scores = [[score(parts, k, embed(context)) for context, _ in examples] for k in range(count)]
    nll: list[list[Tensor]] = [[] for _ in range(count)]
    totals: list[list[Tensor]] = [[] for _ in range(count)]
    every_token: list[Tensor] = []
    fused: list[Tensor] = []
    for b, (context, response) in enumerate(examples):
        rows = []
        for k in range(count):
            at = prompt_at[b] if prompt_at else None
            logits = target_logits(lm, parts.prompts[k], context, response, settings.placement, at)
            if trained is not None and k not in trained[b]:
                logits = [row.detach() for row in logits]
            rows.append(logits)
            tokens = [
                cross_entropy(row, int(target))
                for row, target in zip(logits, response, strict=True)
            ]
            every_token += tokens
            nll[k].append(mean(tokens))
            totals[k].append(add(tokens))
        scale = add([scores[k][b] for k in range(count)]) if settings.normalised else torch.ones(())
        mixed = [
            add([scores[k][b] / scale * rows[k][i] for k in range(count)])
            for i in range(len(response))
        ]
        fused.append(
            mean(
                [
                    cross_entropy(row, int(target))
                    for row, target in zip(mixed, response, strict=True)
                ]
            )
        )
    columns = [[scores[k][b] for k in range(count)] for b in range(size)]
    both = {
        "nll": torch.stack([torch.stack(row) for row in nll]),
        "scores": torch.stack([torch.stack(row) for row in scores]),
        "nll_loss": mean(every_token),
    }
    if settings.temperature is not None:
        likelihoods = [
            mixture(
                [totals[k][b] for k in range(count)],
                columns[b],
                settings.tau_sim,
                settings.temperature,
            )
            for b in range(size)
        ]
        mixture_loss = add(likelihoods) / sum(len(response) for _, response in examples)
        even = balance(columns, settings.tau_sim)
        total = mixture_loss + settings.balance * even
        return {**both, "mixture": mixture_loss, "balance": even, "total": total}
    replies = [[nll[k][b] for k in range(count)] for b in range(size)]
    out = {
        **both,
        "selection": mean(
            [
                selection(replies[b], columns[b], settings.tau_gold, settings.tau_sim)
                for b in range(size)
            ]
        ),
        "fusion": mean(fused),
        "contrastive": mean(
            [contrastive(columns[i], columns[j], target) for i, j, target in pairs]
        ),
    }
    weights = {
        "selection": settings.selection,
        "fusion": settings.fusion,
        "contrastive": settings.contrastive,
    }
    out["total"] = out["nll_loss"] + add([weight * out[name] for name, weight in weights.items()])
    return out
