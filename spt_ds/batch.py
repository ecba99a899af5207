"""What travels from the data workers to the model: micro-batches and the window of one step.

`Batch` and `Window` hold numpy arrays on the host, `Packed` is a micro-batch on the device.

Legend: B examples in a micro-batch, C_b context tokens and R_b response tokens of example b, P
virtual tokens of a prompt, n = sum R_b targets, t = sum C_b + n text tokens, N1 packed tokens of
one prompt's rows, G examples in a window over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Its spans are known by construction: nothing is searched, nothing padded."""

    context_ids: np.ndarray  # int64 [sum C_b], the template up to and including "R:"
    response_ids: np.ndarray  # int64 [n], the reply and EOS: the targets, nothing else is one
    context_lens: tuple[int, ...]  # [B]
    response_lens: tuple[int, ...]  # [B]
    indices: tuple[int, ...]  # [B] rows of the dataset, for messages and for ordering results
    weights: tuple[float, ...]  # [B] 1.0; 0.0 for a filler row that only keeps ranks in step

    def __len__(self) -> int:
        return len(self.context_lens)

    def contexts(self) -> Batch:
        """Return the same rows without their responses, as they are when the reply is not known."""
        return replace(self, response_ids=self.response_ids[:0], response_lens=(0,) * len(self))


@dataclass(frozen=True)
class Contrast:
    """Pairs (i, j), i < j in window order, of which at least one side is on this rank.

    A slot is the position of an example in this rank's list of window examples (micro-batches in
    order). `owner[g]` is (rank, slot) of the window's g-th example, the same on every rank.
    """

    owner: tuple[tuple[int, int], ...]  # [G]
    pairs: np.ndarray  # int64 [pairs, 2] window positions (i, j)
    targets: np.ndarray  # float32 [pairs], +1 similar contexts, -1 not
    pair_count: int  # pairs of the whole window, G * (G - 1) / 2


@dataclass(frozen=True)
class Window:
    """One rank's micro-batches of one optimizer step, and the counts that normalise its losses."""

    micro: tuple[Batch, ...]
    examples: int  # G, over all ranks, fillers not counted
    target_tokens: int  # over all ranks, fillers not counted
    contrast: Contrast | None = None  # None: weight 0 or G < 2


@dataclass(frozen=True)
class Packed:
    """A micro-batch on the device: its tokens, and how they form the rows of one prompt.

    Rows lie end to end and nothing is padded. The row of example b is `[E ; context ; response]`,
    or `[E ; response]` in suffix placement, where the context is read apart. The last response
    token predicts nothing, so no row holds it.
    """

    batch: Batch  # the same micro-batch on the host
    ids: torch.Tensor  # int64 [t], contexts end to end, then responses end to end
    targets: torch.Tensor  # int64 [n], the responses
    example: torch.Tensor  # int64 [n], the example of each target
    of_context: torch.Tensor  # float32 [sum C_b, B], 1 where the token is of the example's context
    of_response: torch.Tensor  # float32 [n, B], 1 where the target is of the example's response
    context_tokens: torch.Tensor  # int64 [B], C_b
    response_tokens: torch.Tensor  # int64 [B], R_b
    weights: torch.Tensor  # float32 [B]
    context_positions: torch.Tensor  # int64 [sum C_b], position in a context that is read apart
    source: torch.Tensor  # int64 [N1], index of each packed token in [B * P virtual tokens ; text]
    positions: (
        torch.Tensor
    )  # int64 [N1], from the row's beginning, or that of the context before it
    row_start: torch.Tensor  # int64 [N1], where the row of each packed token begins
    row_tokens: torch.Tensor  # int64 [N1], length of the row of each packed token
    reads: torch.Tensor  # int64 [n], packed tokens whose next token is a target
    row_lens: tuple[int, ...]  # [B], on the host

    @classmethod
    def from_batch(
        cls, batch: Batch, virtual_tokens: int, device: torch.device, *, suffix: bool
    ) -> Packed:
        """Work the indices out on the host and send them at once; P is `virtual_tokens`."""
        # On the host, because the lengths are known there: a shape that depends on a number of the
        # device would make the host wait for it.
        size = len(batch)
        contexts, responses = np.array(batch.context_lens), np.array(batch.response_lens)
        read = np.maximum(responses - 1, 0)  # response tokens in a row; a context alone has none
        # Each row is a few spans of the table [virtual tokens ; text]: (first index, length) [B].
        virtual = (np.arange(size) * virtual_tokens, np.full(size, virtual_tokens))
        text = size * virtual_tokens
        if suffix:
            parts = [virtual, (text + _starts(responses), read)]
            before, offset = virtual[1], contexts
        else:
            reply = text + contexts.sum() + _starts(responses)
            parts = [virtual, (text + _starts(contexts), contexts), (reply, read)]
            before, offset = virtual[1] + contexts, np.zeros_like(contexts)
        spans = tuple(zip(*parts, strict=True))  # first indices, lengths: a tuple of [B] each
        rows = sum(spans[1])
        starts = _starts(rows)
        # One array, so that there is one transfer (and one piece of pinned memory) instead of ten.
        arrays = {
            "ids": np.concatenate([batch.context_ids, batch.response_ids]),
            "example": np.repeat(np.arange(size), responses),
            "context_of": np.repeat(np.arange(size), contexts),
            "context_tokens": contexts,
            "response_tokens": responses,
            "context_positions": _spans(np.zeros_like(contexts), contexts),
            "source": _spans(*(np.stack(numbers, axis=1).ravel() for numbers in spans)),
            "positions": _spans(offset, rows),
            "row_start": np.repeat(starts, rows),
            "row_tokens": np.repeat(rows, rows),
            # A target is predicted one token earlier: the first one by the token before the reply.
            "reads": _spans(starts + before - 1, responses),
        }
        lens = [len(array) for array in arrays.values()]
        sent = on_device(np.concatenate(list(arrays.values())), device)
        tensors = dict(zip(arrays, sent.split(lens), strict=True))
        # Membership as 0/1 matrices: sums over examples are then matrix products, which add in the
        # same order in every run. `index_add_` and its like do not on a GPU.
        each = torch.arange(size, device=device)
        return cls(
            batch=batch,
            targets=tensors["ids"][len(batch.context_ids) :],
            of_context=(tensors.pop("context_of")[:, None] == each).float(),
            of_response=(tensors["example"][:, None] == each).float(),
            weights=on_device(batch.weights, device, torch.float32),
            row_lens=tuple(rows.tolist()),
            **tensors,
        )


def on_device(
    values: torch.Tensor | np.ndarray | Sequence[float],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Host values on `device`, without waiting for what the device still computes."""
    # A copy from pageable memory would wait for the device. A tensor that is there is passed on.
    tensor = torch.as_tensor(values, dtype=dtype)
    pinned = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
    return pinned.to(device, non_blocking=True)


def _starts(lens: np.ndarray) -> np.ndarray:
    """First index of each of the spans that lie end to end: [spans] -> [spans]."""
    return np.cumsum(lens) - lens


def _spans(starts: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """The numbers start, start + 1, ... of each span, one span after the other: [sum lens]."""
    return np.repeat(starts - _starts(lens), lens) + np.arange(lens.sum())
