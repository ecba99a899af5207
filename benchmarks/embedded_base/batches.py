"""Micro-batches of packed documents. A micro-batch depends on the seed and its number alone, so a
resumed run reads what it would have read, whoever computes it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.embedded_base.documents import KINDS, Document, Pools, draw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

_MISSES = 4  # documents in a row that fit nowhere: then the rows are full
_SMALLEST = 24  # tokens that a document needs at least


@dataclass(frozen=True)
class Layout:
    """What a micro-batch is made of."""

    rows: int  # rows of `row_tokens`; long micro-batches have as many tokens in fewer rows
    row_tokens: int
    long_every: int  # each so-manieth micro-batch has long rows; 0: none
    long_tokens: int
    shares: tuple[float, ...]  # weights of KINDS
    head_importance: float  # weight of the loss of persona sentences; that of replies is 1
    partner_importance: float  # the same of the partner's turns


class Packer:
    """Draws documents and packs them whole into rows."""

    def __init__(
        self, pools: Pools, tokenizer: PreTrainedTokenizerFast, layout: Layout, seed: int
    ) -> None:
        self._pools = pools
        self._tokenizer = tokenizer
        self._layout = layout
        self._seed = seed
        self._ids: dict[str, list[int]] = {}

    def micro_batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Return rows [B, T + 1] int64, padded with 0, and the importance [B, T] of each target."""
        layout = self._layout
        rng = random.Random(f"{self._seed} {number}")
        count, length = layout.rows, layout.row_tokens
        if layout.long_every and number % layout.long_every == layout.long_every - 1:
            count, length = max(1, count * length // layout.long_tokens), layout.long_tokens
        rows: list[list[int]] = [[] for _ in range(count)]
        weights: list[list[float]] = [[] for _ in range(count)]
        misses = 0
        while misses < _MISSES:
            kind = rng.choices(KINDS, layout.shares)[0]
            emptiest = min(range(count), key=lambda row: len(rows[row]))
            room = length + 1 - len(rows[emptiest])
            made = self._encode(draw(self._pools, kind, rng), room)
            if made is None:
                misses += 1
                continue
            misses = 0
            # The fullest row that takes it: what is left over stays in one piece.
            fitting = [row for row in range(count) if len(rows[row]) + len(made[0]) <= length + 1]
            best = max(fitting, key=lambda row: len(rows[row]))
            rows[best] += made[0]
            weights[best] += made[1]
        ids = torch.zeros(count, length + 1, dtype=torch.int64)
        importance = torch.zeros(count, length)
        for row in range(count):
            ids[row, : len(rows[row])] = torch.tensor(rows[row])
            importance[row, : max(0, len(rows[row]) - 1)] = torch.tensor(weights[row][1:])
        return ids, importance

    def _encode(self, document: Document, room: int) -> tuple[list[int], list[float]] | None:
        """Return ids and importances of what fits in `room` tokens; the oldest turns are left out.

        None where not even persona and reply fit.
        """
        if room < _SMALLEST:
            return None
        head = [1, *self._of(document.head)]
        left = room - len(head) - 1
        kept: list[tuple[list[int], list[float]]] = []
        for turn in reversed(document.turns):
            ids = self._of(turn)
            left -= len(ids)
            if left < 0:
                break
            kept.append((ids, self._turn_importance(turn, len(ids))))
        if not kept:
            return None
        # BOS has no importance: what precedes it is another document.
        all_ids = [*head, *(token for ids, _ in reversed(kept) for token in ids), 2]
        importance = [0.0] + [self._layout.head_importance] * (len(head) - 1)
        importance += [weight for _, weights in reversed(kept) for weight in weights]
        return all_ids, [*importance, 1.0]

    def _turn_importance(self, turn: tuple[str, str], length: int) -> list[float]:
        """Importances of a turn's tokens.

        The marker after a reply is no target: a reply that is generated ends with EOS, and which
        of the replies of a document is the last one nothing tells.
        """
        if turn[0] == " R:":
            return [1.0] * length
        marker = len(self._of(turn[:1]))
        return [0.0] * marker + [self._layout.partner_importance] * (length - marker)

    def _of(self, pieces: Sequence[str]) -> list[int]:
        """Ids of pieces, each tokenised once in the life of this packer."""
        ids: list[int] = []
        for piece in pieces:
            known = self._ids.get(piece)
            if known is None:
                known = self._ids[piece] = self._tokenizer(
                    piece, add_special_tokens=False, split_special_tokens=True, verbose=False
                )["input_ids"]
            ids += known
        return ids
