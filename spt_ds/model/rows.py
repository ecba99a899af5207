"""Reads the packed rows of the K-way pass: every example under every prompt in one forward.

Legend: M prompts read per example (K, or the m best), B examples, P virtual tokens, n targets, t
text tokens, D embedding size, N1 packed tokens of one prompt's rows (see `Packed`).
"""

from __future__ import annotations

import torch

from spt_ds.batch import Packed
from spt_ds.model.attention import Branches, Layout
from spt_ds.model.backbone import Backbone


@torch.no_grad()
def read_context(backbone: Backbone, packed: Packed, text: torch.Tensor) -> Layout | None:
    """Read what precedes the prompts once, keep its keys and values; None in prefix placement.

    Args: text [t, D], the embeddings of `packed.ids`.
    """
    if not packed.suffix:
        return None
    # Prompts come behind the context, so nothing that trains reaches it: it needs no gradient.
    layout = Layout(packed.apart_lens, packed.apart_positions, backbone.backend, record=True)
    backbone.run(text[packed.apart], layout)
    return layout


def target_states(
    backbone: Backbone,
    packed: Packed,
    text: torch.Tensor,
    prompts: torch.Tensor,
    context: Layout | None,
) -> torch.Tensor:
    """Hidden states that predict the targets: [M, n, head size].

    Args: text [t, D], the embeddings of `packed.ids`; prompts [M, B, P, D], the virtual tokens of
    each row; context, what `read_context` gave: None for whole rows, else the M branches of each
    example are read on its keys and values.
    """
    if context is not None:
        return _branches(backbone, packed, text, prompts, context)
    count = len(prompts)
    rows = _pack(packed, text, prompts)
    positions = packed.positions.repeat(count)
    layout = Layout(packed.row_lens * count, positions, backbone.backend)
    hidden = backbone.run(rows.flatten(0, 1), layout).view(*rows.shape[:2], -1)
    return hidden[:, packed.reads]


def _branches(
    backbone: Backbone, packed: Packed, text: torch.Tensor, prompts: torch.Tensor, context: Layout
) -> torch.Tensor:
    count = len(prompts)
    rows = _pack(packed, text[packed.inside], prompts)
    # The M branches of an example share its context, so they lie side by side. Token i of prompt m,
    # in a row of r tokens that starts at s, moves from m * N1 + i to M * s + m * r + (i - s).
    token = torch.arange(rows.shape[1], device=text.device)
    prompt = torch.arange(count, device=text.device)[:, None]
    moved = packed.row_start * (count - 1) + packed.row_tokens * prompt + token  # [M, N1]
    # `order` undoes `moved`: it lists the tokens of all prompts as they lie example by example.
    order = torch.empty_like(moved).flatten()
    order[moved.flatten()] = torch.arange(len(order), device=text.device)
    positions = packed.positions.repeat(count)[order]
    lens = [count * n for n in packed.row_lens]
    layout = Branches(lens, positions, context.backend, count=count, context=context)
    hidden = backbone.run(rows.flatten(0, 1)[order], layout)
    return hidden[moved[:, packed.reads]]


def _pack(packed: Packed, text: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """prompts [M, B, P, D] and their text -> rows [M, N1, D], in the base's dtype."""
    # One gather lays out virtual tokens and text. Its backward pass gives the prompts their
    # gradient; the text has one only where the embedding table trains.
    virtual = prompts.flatten(1, 2).to(text.dtype)
    return torch.cat([virtual, text.expand(len(prompts), -1, -1)], dim=1)[:, packed.source]
