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

    context_ids: np.ndarray  # int64 [sum C_b], the template up to where the reply begins
    response_ids: np.ndarray  # int64 [n], the reply and its end: the targets, nothing else is one
    context_lens: tuple[int, ...]  # [B]
    response_lens: tuple[int, ...]  # [B]
    indices: tuple[int, ...]  # [B] rows of the dataset, for messages and for ordering results
    weights: tuple[float, ...]  # [B] 1.0; 0.0 for a filler row that only keeps ranks in step
    # [B] context tokens before the soft prompt; empty: all of them where contexts are read apart,
    # else none
    prompt_at: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.context_lens)

    def before_prompt(self, suffix: bool) -> tuple[int, ...]:
        """[B] context tokens before the soft prompt; with `suffix` contexts are read apart."""
        return self.prompt_at or (self.context_lens if suffix else (0,) * len(self))

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

    Rows lie end to end and nothing is padded. A context is `head` and `tail`, before and behind the
    soft prompt E, and either may be empty. The row of example b is `[head ; E ; tail ; response]`.
    In suffix placement the head is read apart and the row is `[E ; tail ; response]`. The last
    response token predicts nothing, so no row holds it.
    """

    batch: Batch  # the same micro-batch on the host
    suffix: bool  # in suffix placement
    ids: torch.Tensor  # int64 [t], contexts end to end, then responses end to end
    targets: torch.Tensor  # int64 [n], the responses
    example: torch.Tensor  # int64 [n], the example of each target
    of_context: torch.Tensor  # float32 [sum C_b, B], 1 where the token is of the example's context
    of_response: torch.Tensor  # float32 [n, B], 1 where the target is of the example's response
    context_tokens: torch.Tensor  # int64 [B], C_b
    response_tokens: torch.Tensor  # int64 [B], R_b
    weights: torch.Tensor  # float32 [B]
    apart: torch.Tensor  # int64 [sum of heads], index in `ids` of what is read apart
    apart_positions: torch.Tensor  # int64 [sum of heads], from the beginning of each context
    inside: torch.Tensor  # int64, index in `ids` of the rows' text; empty: all of it, in order
    source: torch.Tensor  # int64 [N1], index of each packed token in [B * P virtual ; rows' text]
    # int64 [N1], from the row's beginning, or that of the context before it
    positions: torch.Tensor
    row_start: torch.Tensor  # int64 [N1], where the row of each packed token begins
    row_tokens: torch.Tensor  # int64 [N1], length of the row of each packed token
    reads: torch.Tensor  # int64 [n], packed tokens whose next token is a target
    row_lens: tuple[int, ...]  # [B], on the host
    apart_lens: tuple[int, ...]  # [B], on the host

    @classmethod
    def from_batch(
        cls, batch: Batch, virtual_tokens: int, device: torch.device, *, suffix: bool
    ) -> Packed:
        """Work the indices out on the host and send them at once; P is `virtual_tokens`."""
        # On the host, because the lengths are known there: a shape that depends on a number of the
        # device would make the host wait for it.
        size = len(batch)
        contexts, responses = np.array(batch.context_lens), np.array(batch.response_lens)
        spans, apart, inside, before = _row_spans(batch, virtual_tokens, suffix)
        rows = np.sum(spans[1], axis=0)
        starts = _starts(rows)
        # One array, so that there is one transfer (and one piece of pinned memory) instead of ten.
        arrays = {
            "ids": np.concatenate([batch.context_ids, batch.response_ids]),
            "example": np.repeat(np.arange(size), responses),
            "context_of": np.repeat(np.arange(size), contexts),
            "context_tokens": contexts,
            "response_tokens": responses,
            "apart": _spans(_starts(contexts), apart),
            "apart_positions": _spans(np.zeros_like(apart), apart),
            "inside": inside,
            "source": _spans(*(np.stack(numbers, axis=1).ravel() for numbers in spans)),
            "positions": _spans(apart, rows),
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
            suffix=suffix,
            targets=tensors["ids"][len(batch.context_ids) :],
            of_context=(tensors.pop("context_of")[:, None] == each).float(),
            of_response=(tensors["example"][:, None] == each).float(),
            weights=on_device(batch.weights, device, torch.float32),
            row_lens=tuple(rows.tolist()),
            apart_lens=tuple(apart.tolist()),
            **tensors,
        )


def _row_spans(
    batch: Batch, virtual_tokens: int, suffix: bool
) -> tuple[tuple[tuple[np.ndarray, ...], ...], np.ndarray, np.ndarray, np.ndarray]:
    """How rows are cut from the table [virtual tokens ; text].

    Returns: first indices and lengths of the spans of each row, a tuple of [B] each; tokens of each
    context that are read apart [B]; `Packed.inside`; tokens of each row before the reply [B].
    """
    size = len(batch)
    contexts, responses = np.array(batch.context_lens), np.array(batch.response_lens)
    heads = np.array(batch.before_prompt(suffix))
    tails = contexts - heads
    read = np.maximum(responses - 1, 0)  # response tokens in a row; a context alone has none
    virtual = (np.arange(size) * virtual_tokens, np.full(size, virtual_tokens))
    start, text = _starts(contexts), size * virtual_tokens
    reply = contexts.sum() + np.arange(responses.sum())
    if suffix:
        # The text is that of the rows alone: tails end to end, then responses end to end.
        replies = text + tails.sum() + _starts(responses)
        parts = [virtual, (text + _starts(tails), tails), (replies, read)]
        inside = np.concatenate([_spans(start + heads, tails), reply])
        apart, before = heads, virtual[1] + tails
    else:
        replies = text + contexts.sum() + _starts(responses)
        parts = [(text + start, heads), virtual, (text + start + heads, tails), (replies, read)]
        inside = reply[:0]
        apart, before = np.zeros_like(heads), virtual[1] + contexts
    firsts, lens = zip(*parts, strict=True)
    return (firsts, lens), apart, inside, before


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
