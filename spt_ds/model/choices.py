"""Chooses among given answers by their likelihood, each example under its own prompt.

The prompt is chosen by the context alone, as where a reply is generated, and the loss of an answer
is that which training computes. Legend: B examples, K prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from spt_ds.batch import Batch
from spt_ds.config.generation import GenerateConfig
from spt_ds.model.attention import Layout
from spt_ds.model.backbone import Backbone
from spt_ds.model.decode import choose_prompts, prompts_to_read, reply_losses
from spt_ds.model.spt import Spt

Answers = Sequence[Sequence[int]]  # ids of each answer to one example, its end included


@dataclass(frozen=True)
class Choice:
    """The answers to one example, and which of them is given."""

    prompt: int
    """The prompt under which they were read."""
    nll: list[float]
    """Negative log-likelihood of each answer in nats, the sum over its tokens and its end."""
    tokens: list[int]
    """Tokens of each answer."""
    best: int
    """The answer to give; the first of equals."""


def choose(
    backbone: Backbone,
    spt: Spt,
    batch: Batch,
    answers: Sequence[Answers],
    options: GenerateConfig,
    passes: int,
) -> tuple[list[Choice], torch.Tensor]:
    """Return the choice of each example of `batch`, and the retriever's scores [K, B].

    Run inside a call of the root module. `passes` is the number of answers of the example with the
    most of them, in the whole data: ranks that share a sharded base then take as many turns.
    """
    contexts = batch.contexts()
    _, _, scores = spt.score(backbone, spt.pack(contexts))
    chosen = choose_prompts(options.mode, scores, batch.indices, spt.config.train.seed)
    prompts = prompts_to_read(spt, chosen)
    sums: list[list[float]] = [[] for _ in answers]
    context: Layout | None = None
    # One answer of each example at a time: that takes the memory of a perplexity. In suffix
    # placement the contexts are read in the first pass alone.
    for turn in range(passes):
        rows = [own[turn] if turn < len(own) else own[0] for own in answers]
        means, context = reply_losses(backbone, spt, with_replies(contexts, rows), prompts, context)
        for own, row, mean, found in zip(answers, rows, means.tolist(), sums, strict=True):
            if turn < len(own):
                found.append(mean * len(row))
    choices = []
    for own, prompt, nll in zip(answers, chosen, sums, strict=True):
        assert prompt is not None  # a mode that reads all prompts is refused
        tokens = [len(answer) for answer in own]
        choices.append(Choice(prompt, nll, tokens, best_of(nll, tokens, options.choices)))
    return choices, scores


def best_of(
    nll: Sequence[float], tokens: Sequence[int], score: Literal["none", "sum", "mean"]
) -> int:
    """The index of the likeliest answer, by its sum or by its mean a token; the first of equals."""
    costs = [
        cost / count if score == "mean" else cost for cost, count in zip(nll, tokens, strict=True)
    ]
    return costs.index(min(costs))


def with_replies(contexts: Batch, replies: Answers) -> Batch:
    """The rows of `contexts`, each with the given reply [B]."""
    return replace(
        contexts,
        response_ids=np.concatenate([np.asarray(reply, dtype=np.int64) for reply in replies]),
        response_lens=tuple(len(reply) for reply in replies),
    )
