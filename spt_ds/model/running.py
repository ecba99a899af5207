"""Continuous batching: rows of many callers share each token step, and come and go between steps.

Rows are left-padded, so that the last token of each stands in the last column: every row writes its
keys and values into the same new column, whatever its length. A row that leaves takes the columns
with it that no other row reaches. Legend: R rows, L columns (the tokens of the longest row), D
embedding size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers.generation.logits_process import LogitsProcessor

from spt_ds.model.backbone import Backbone
from spt_ds.model.conversation import Endings
from spt_ds.model.decode_rows import left_pad
from spt_ds.model.roomy_cache import RoomyCache

READ_TOGETHER = 16  # rows whose beginnings are read in one pass


@dataclass(eq=False)
class Row:
    """One reply that grows."""

    beginning: torch.Tensor  # [n, D] embeddings of context and prompt, in the base's dtype
    endings: Endings
    max_new_tokens: int
    min_new_tokens: int = 0
    processors: Sequence[LogitsProcessor] = ()  # of this row alone: they may hold a state
    tokens: list[int] = field(default_factory=list)  # as generated, end of sequence included
    ended: bool = False  # by a token or a text that ends a reply; not by its length

    @property
    def done(self) -> bool:
        """Whether the reply gets no further token."""
        return self.ended or len(self.tokens) >= self.max_new_tokens

    def take(self, token: int) -> None:
        """Add the next token."""
        self.tokens.append(token)
        self.ended = self.endings.reached(self.tokens)


class RunningRows:
    """The rows that are decoded together; its methods run inside a call of the root module."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._cache: RoomyCache | None = None  # of no rows
        self._mask = torch.zeros(0, 0, dtype=torch.long)  # [R, L]

    def join(self, backbone: Backbone, rows: Sequence[Row]) -> None:
        """Read the beginnings of new rows, which gives each of them its first token."""
        # Those of like length together: what pads the others is computed too.
        ordered = sorted(rows, key=lambda row: len(row.beginning))
        for start in range(0, len(ordered), READ_TOGETHER):
            self._join(backbone, ordered[start : start + READ_TOGETHER])

    def _join(self, backbone: Backbone, rows: Sequence[Row]) -> None:
        embeddings, mask = left_pad([row.beginning for row in rows])
        read = RoomyCache()
        _choose(rows, backbone.next_logits(mask, read, inputs_embeds=embeddings))
        if self._cache is None:
            self._cache = read
        else:
            self._cache.add_rows(read)
            longest = max(mask.shape[1], self._mask.shape[1])
            masks = (F.pad(m, (longest - m.shape[1], 0)) for m in (self._mask, mask))
            mask = torch.cat(list(masks))
        self.rows, self._mask = [*self.rows, *rows], mask

    def step(self, backbone: Backbone) -> None:
        """Give each row its next token."""
        assert self._cache is not None
        last = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self._mask.device)
        self._mask = F.pad(self._mask, (0, 1), value=1)
        _choose(self.rows, backbone.next_logits(self._mask, self._cache, input_ids=last))

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Let go of the other rows, and of the columns that only they reached."""
        kept = [number for number, row in enumerate(self.rows) if wanted(row)]
        if len(kept) == len(self.rows):
            return
        order = _refilled(kept)
        self.rows = [self.rows[number] for number in order]
        if self._cache is None or not kept:
            self._cache, self._mask = None, self._mask[:0, :0].clone()
            return
        mask = self._mask[torch.tensor(order, device=self._mask.device)]
        unused = int((~mask.any(dim=0)).sum())  # at the left: rows end in the same column
        self._mask = mask[:, unused:].clone()
        self._cache.keep(order, unused)


def _refilled(kept: Sequence[int]) -> list[int]:
    """Which row takes each of the first places, ascending `kept`: most rows stay where they are."""
    inside = {number for number in kept if number < len(kept)}
    from_behind = iter(number for number in kept if number >= len(kept))
    return [place if place in inside else next(from_behind) for place in range(len(kept))]


def _choose(rows: Sequence[Row], logits: torch.Tensor) -> None:
    """logits [R, V]: each row takes the likeliest token after its own processors."""
    # `generate` too hands them on in fp32.
    logits = logits.float()
    # All rows at once: `generate`'s own processor for this costs as much as a layer for 64 rows.
    too_early = [
        (number, token)
        for number, row in enumerate(rows)
        if len(row.tokens) < row.min_new_tokens
        for token in row.endings.ids
    ]
    if too_early:
        logits[tuple(torch.tensor(too_early, device=logits.device).T)] = -torch.inf
    for number, row in enumerate(rows):
        if row.processors:
            before = torch.tensor([row.tokens], dtype=torch.long, device=logits.device)
            own = logits[number : number + 1]
            for processor in row.processors:
                own = processor(before, own)
            logits[number] = own[0]
    for row, token in zip(rows, logits.argmax(dim=1).tolist(), strict=True):
        row.take(token)
