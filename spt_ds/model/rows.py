"""Builds the packed rows of the K-way pass: every example under every prompt in one forward,
nothing padded.

Legend: M prompts read per example (K, or the m best), B examples, P virtual tokens, C_b and R_b
context and response tokens, n = sum R_b targets, D embedding size, N1 packed tokens of one prompt's
rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spt_ds.batch import Batch, on_device
from spt_ds.model.attention import Branches, Layout
from spt_ds.model.backbone import Backbone


@dataclass(frozen=True)
class Embedded:
    """The micro-batch's frozen token embeddings, looked up once."""

    context: torch.Tensor  # [sum C_b, D]
    response: torch.Tensor  # [sum R_b, D]


def embed(backbone: Backbone, batch: Batch) -> Embedded:
    """Look up context and response embeddings in one visit to the table."""
    device = backbone.lm.get_input_embeddings().weight.device
    ids = torch.cat([on_device(part, device) for part in (batch.context_ids, batch.response_ids)])
    context, response = backbone.embed(ids).split([len(batch.context_ids), len(batch.response_ids)])
    return Embedded(context, response)


def target_states(
    backbone: Backbone,
    batch: Batch,
    embedded: Embedded,
    prompts: torch.Tensor,
    context: Layout | None,
) -> torch.Tensor:
    """Hidden states that predict the response tokens: [M, n, head size].

    Args: prompts [M, B, P, D], the virtual tokens of each row; context, what `read_context` gave:
    None for the rows `[E ; context ; response]`, else the M branches `[E ; response]` are read on
    its keys and values.
    """
    if context is None:
        return _prefix(backbone, batch, embedded, prompts)
    return _suffix(backbone, batch, embedded, prompts, context)


@torch.no_grad()
def read_context(
    backbone: Backbone, batch: Batch, embedded: Embedded, placement: str
) -> Layout | None:
    """Read each context once, without gradient, and keep its keys and values; None in `prefix`
    placement.
    """
    if placement != "suffix":
        return None
    positions = torch.cat([torch.arange(c) for c in batch.context_lens])
    context = Layout(
        batch.context_lens, positions, backbone.backend, embedded.context.device, record=True
    )
    backbone.run(embedded.context, context)
    return context


def _prefix(
    backbone: Backbone, batch: Batch, embedded: Embedded, prompts: torch.Tensor
) -> torch.Tensor:
    count, size, width = prompts.shape[0], len(batch), prompts.shape[2]
    pieces = [
        (width, c, r - 1) for c, r in zip(batch.context_lens, batch.response_lens, strict=True)
    ]  # the last target is never read
    source = _interleave(size * width, batch, with_context=True, width=width)
    lens = [sum(piece) for piece in pieces]
    positions = torch.cat([torch.arange(n) for n in lens]).repeat(count)
    device = prompts.device
    layout = Layout(lens * count, positions, backbone.backend, device)
    text = torch.cat([embedded.context, embedded.response])
    packed = _pack(prompts, text, on_device(source, device))
    hidden = backbone.run(packed.flatten(0, 1), layout).view(count, sum(lens), -1)
    firsts = [width + c - 1 for c in batch.context_lens]
    return hidden[:, on_device(_target_index(lens, firsts, batch.response_lens), device)]


def _suffix(
    backbone: Backbone, batch: Batch, embedded: Embedded, prompts: torch.Tensor, context: Layout
) -> torch.Tensor:
    count, size, width = prompts.shape[0], len(batch), prompts.shape[2]
    device = prompts.device
    lens = [width + r - 1 for r in batch.response_lens]
    positions = torch.cat(
        [(c + torch.arange(n)).repeat(count) for c, n in zip(batch.context_lens, lens, strict=True)]
    )
    layout = Branches(lens, count, context, positions, device)
    source = _interleave(size * width, batch, with_context=False, width=width)
    packed = _pack(
        prompts, embedded.response, on_device(source, device)
    )  # [M, N1, D], prompt-major
    order = on_device(torch.cat([part.T.flatten() for part in _by_example(count, lens)]), device)
    hidden = backbone.run(packed.flatten(0, 1)[order], layout)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=device)
    hidden = hidden[back].view(count, sum(lens), -1)
    firsts = [width - 1] * size
    return hidden[:, on_device(_target_index(lens, firsts, batch.response_lens), device)]


def _pack(prompts: torch.Tensor, text: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """prompts [M, B, P, D] and text [t, D] -> [M, N1, D] in the order of `source`, in the base's
    dtype.
    """
    virtual = prompts.flatten(1, 2).to(text.dtype)
    return torch.cat([virtual, text.expand(len(prompts), -1, -1)], dim=1)[:, source]


def _interleave(virtual: int, batch: Batch, *, with_context: bool, width: int) -> torch.Tensor:
    """Index of one prompt's packed rows into [B * P virtual tokens ; (contexts ;) responses]: [N1]."""
    parts: list[torch.Tensor] = []
    context = virtual
    response = virtual + (len(batch.context_ids) if with_context else 0)
    for b, (c, r) in enumerate(zip(batch.context_lens, batch.response_lens, strict=True)):
        parts.append(torch.arange(b * width, (b + 1) * width))
        if with_context:
            parts.append(torch.arange(context, context + c))
        parts.append(torch.arange(response, response + r - 1))
        context, response = context + c, response + r
    return torch.cat(parts)


def _by_example(count: int, lens: list[int]) -> list[torch.Tensor]:
    """Prompt-major positions of each example as [tokens, M]: `.T.flatten()` lists them branch by
    branch.
    """
    total, start, blocks = sum(lens), 0, []
    for n in lens:
        blocks.append(torch.arange(count)[None] * total + torch.arange(start, start + n)[:, None])
        start += n
    return blocks


def _target_index(
    lens: list[int], firsts: list[int], response_lens: tuple[int, ...]
) -> torch.Tensor:
    """Positions in one prompt's rows whose next token is a target: [n]."""
    parts, start = [], 0
    for n, first, r in zip(lens, firsts, response_lens, strict=True):
        parts.append(torch.arange(start + first, start + first + r))
        start += n
    return torch.cat(parts)
