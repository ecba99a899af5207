"""What travels from the data workers to the model: one micro-batch without padding, and one
optimizer step's window.

B examples in a micro-batch, C_b context tokens and R_b response tokens of example b, G examples in
a window over all ranks, b_local of them on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch


def on_device(
    values: torch.Tensor | Sequence[float], device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Host values on `device` without waiting for what it still computes: a GPU takes them from
    pinned memory.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def owners(lens: Sequence[int], device: torch.device) -> torch.Tensor:
    """[sum lens] the number of the span to which each token belongs, of spans that lie end to end."""
    return on_device(
        [span for span, length in enumerate(lens) for _ in range(length)], device, torch.long
    )


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Spans are known by construction: nothing is searched for, nothing is padded."""

    context_ids: torch.Tensor  # int64 [sum C_b], the template up to and including "R:"
    response_ids: (
        torch.Tensor
    )  # int64 [sum R_b], the reply and EOS: the targets, nothing else is one
    context_lens: tuple[int, ...]  # [B]
    response_lens: tuple[int, ...]  # [B]
    indices: tuple[int, ...]  # [B] rows of the dataset, for messages and for ordering results
    weights: tuple[float, ...]  # [B] 1.0; 0.0 for a filler row that only keeps ranks in step

    def __len__(self) -> int:
        return len(self.context_lens)

    def contexts(self) -> Batch:
        """The same rows as they stand when the reply is not known."""
        return replace(self, response_ids=self.response_ids[:0], response_lens=(0,) * len(self))


@dataclass(frozen=True)
class Contrast:
    """Pairs (i, j), i < j in window order, of which at least one side is on this rank (method:
    contrastive loss).

    A slot is a place in this rank's list of window examples (micro-batches in order). `owner[g]` is
    (rank, slot) of the window's g-th example, the same on every rank.
    """

    owner: tuple[tuple[int, int], ...]  # [G]
    pairs: torch.Tensor  # int64 [n, 2] window positions (i, j)
    targets: torch.Tensor  # float32 [n], +1 similar contexts, -1 not
    pair_count: int  # pairs of the whole window, G * (G - 1) / 2


@dataclass(frozen=True)
class Window:
    """All of one rank's micro-batches of one optimizer step, and the global counts that normalise
    its losses.
    """

    micro: tuple[Batch, ...]
    examples: int  # G, over all ranks, fillers not counted
    target_tokens: int  # over all ranks, fillers not counted
    slots: int  # rows of this rank, fillers included; the same number on every rank
    contrast: Contrast | None = field(default=None)  # None: weight 0 or G < 2
