"""The rows that decoding begins with: whole, or behind a context that is read once.

Legend: M rows of each example, B examples, P virtual tokens, D embedding size, H_b context tokens
of example b before its prompt, L tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from spt_ds.batch import Batch
from spt_ds.model.backbone import Backbone
from spt_ds.model.conversation import cache_argument
from spt_ds.model.roomy_cache import RoomyCache


def whole_rows(
    backbone: Backbone, batch: Batch, text: torch.Tensor, prompts: torch.Tensor, *, suffix: bool
) -> dict[str, Any]:
    """Inputs of `generate` for rows that are read from their beginning.

    Args: text [sum C_b, D], the embeddings of the contexts; prompts [M, B, P, D], the virtual
    tokens of each row.
    """
    rows = [
        torch.cat([context[:head], virtual, context[head:]])
        for virtual, context, head in _each(batch, text, prompts, suffix)
    ]
    embeddings, mask = left_pad(rows)
    # The cache of `generate` itself copies all that it holds for each token.
    cache = cache_argument(backbone.lm, RoomyCache())
    return {"inputs_embeds": embeddings, "attention_mask": mask, **cache}


def branches(
    backbone: Backbone, batch: Batch, text: torch.Tensor, prompts: torch.Tensor
) -> dict[str, Any]:
    """The same rows in suffix placement, where the M rows of an example share its context."""
    heads = batch.before_prompt(suffix=True)
    contexts = text.split(batch.context_lens)
    before, seen = left_pad([context[:head] for context, head in zip(contexts, heads, strict=True)])
    cache = RoomyCache()
    backbone.read(before, seen, cache)
    count = len(prompts)
    rows_of = torch.arange(len(batch), device=text.device).repeat(count)
    cache.reorder_cache(cast(torch.LongTensor, rows_of))
    rows = [
        torch.cat([virtual, context[head:]])
        for virtual, context, head in _each(batch, text, prompts, True)
    ]
    behind, mask = left_pad(rows)
    # `generate` asks for whole rows and skips the embeddings whose keys and values the cache holds.
    skipped = before.new_zeros(1).expand(len(rows), *before.shape[1:])
    return {
        "inputs_embeds": torch.cat([skipped, behind], dim=1),
        "attention_mask": torch.cat([seen.repeat(count, 1), mask], dim=1),
        **cache_argument(backbone.lm, cache),
    }


def left_pad(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n_i, D] -> (embeddings [rows, L, D], mask [rows, L]), the real tokens at the right."""
    longest = max(len(row) for row in rows)
    embeddings = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=embeddings.device)
    for number, row in enumerate(rows):
        embeddings[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return embeddings, mask


def _each(
    batch: Batch, text: torch.Tensor, prompts: torch.Tensor, suffix: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Virtual tokens [P, D], context [C_b, D] and H_b of each row, prompt-major."""
    heads = batch.before_prompt(suffix)
    contexts = text.split(batch.context_lens)
    for group in prompts.to(text.dtype):
        yield from zip(group, contexts, heads, strict=True)
