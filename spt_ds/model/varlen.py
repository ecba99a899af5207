"""Attention over rows of any length in a fixed number of kernel launches, however many rows.

A row's queries may attend to several segments of keys, such as a shared context and the row's own
tokens. Each segment is one call of a variable-length flash kernel, which gives an output and the
log-sum-exp of its scores. The outputs are merged by them, which is exact (Milakov and Gimelshein
2018, arXiv 1805.02867). The kernels are PyTorch's own: those of its flash attention on a GPU, and
on a CPU those of its fused attention over padded rows, with the same signature.

Legend: R rows, N packed queries, M packed keys, H heads (G key/value heads), E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from spt_ds.batch import on_device

aten = torch.ops.aten
Output = tuple[torch.Tensor, torch.Tensor]
"""What was attended to [N, H, E], and the log-sum-exp of the scores [H, N] in fp32 or better."""


@dataclass(eq=False)
class Rows:
    """Where rows lie that are packed end to end."""

    lens: Sequence[int]
    """[R], on the host."""
    device: torch.device

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lens)

    @cached_property
    def edges(self) -> torch.Tensor:
        """int32 [R + 1], where rows begin and end."""
        return on_device([0, *accumulate(self.lens)], self.device, torch.int32)


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys and values [M, G, E] that the queries of row r of `queries` see: row r of `keys`."""

    k: torch.Tensor
    v: torch.Tensor
    queries: Rows
    keys: Rows
    causal: bool
    """Whether a query sees the keys up to its own place alone; the two rows are one then."""


class AttendTo(torch.autograd.Function):
    """Attention of q [N, H, E] to the keys of all segments together -> [N, H, E].

    The last segment is the rows' own: its keys get a gradient. Those before it are constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Sequence[Segment],
        scale: float,
    ) -> torch.Tensor:
        out, lse = _forward(q, segments[0], scale)
        for segment in segments[1:]:
            out, lse = _merge(out, lse, *_forward(q, segment, scale))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.constants, ctx.own, ctx.scale = segments[:-1], segments[-1], scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        # The kernel makes the weights again as exp(score - lse) and needs `out` for the softmax's
        # own gradient. With the merged two, a segment's weights are its share of the whole.
        own = Segment(k, v, ctx.own.queries, ctx.own.keys, ctx.own.causal)
        grad_q, grad_k, grad_v = _backward(grad, q, own, out, lse, ctx.scale)
        for segment in ctx.constants:
            grad_q = grad_q + _backward(grad, q, segment, out, lse, ctx.scale)[0]
        return grad_q, grad_k, grad_v, None, None


def _merge(
    out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor
) -> Output:
    """Two partial results as one: each output counts by its share of the sum of exponentials."""
    both = torch.logaddexp(lse, more_lse)
    shares = [(part - both).exp().T[..., None] for part in (lse, more_lse)]  # [N, H, 1]
    # The shares are fp32, so the sum is too, and is rounded once.
    return (out * shares[0] + more * shares[1]).to(out.dtype), both


def _forward(q: torch.Tensor, segment: Segment, scale: float) -> Output:
    """q [N, H, E] on one segment, by the kernel of its device."""
    if q.device.type == "cpu":
        return _forward_cpu(q, segment, scale)
    queries, keys = segment.queries, segment.keys
    out, lse, *_ = aten._flash_attention_forward(
        q,
        segment.k,
        segment.v,
        queries.edges,
        keys.edges,
        queries.longest,
        keys.longest,
        0.0,  # dropout
        segment.causal,
        False,  # the scores themselves, for debugging
        scale=scale,
    )
    return out, lse


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    segment: Segment,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v of one segment, where `out` and `lse` are those of all of them."""
    if q.device.type == "cpu":
        return _backward_cpu(grad, q, segment, out, lse, scale)
    queries, keys = segment.queries, segment.keys
    # Dropout's state, which the kernel takes also where there is no dropout.
    state, unused = q.new_empty(2, dtype=torch.uint64), q.new_empty(0)
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = aten._flash_attention_backward(
        grad,
        q,
        segment.k,
        segment.v,
        out,
        lse,
        queries.edges,
        keys.edges,
        queries.longest,
        keys.longest,
        0.0,
        segment.causal,
        state,
        unused,
        scale=scale,
    )
    return gradients


class _Padded:
    """A segment as padded batches, for the fused attention of a CPU: [N, H, E] <-> [R, H, n, E]."""

    def __init__(self, segment: Segment, groups: int) -> None:
        """`groups` is H / G: that kernel wants as many key heads as query heads."""
        self.groups = groups
        self.queries, self.real = _grid(segment.queries.lens)
        self.keys, self.real_keys = _grid(segment.keys.lens)
        k, v = (tensor[self.keys].transpose(1, 2) for tensor in (segment.k, segment.v))
        self.k, self.v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        self.mask: torch.Tensor | None = None
        if not segment.causal:  # causal rows end before their padding begins
            hidden = torch.zeros(self.keys.shape, dtype=k.dtype)
            self.mask = hidden.masked_fill(~self.real_keys, float("-inf"))[:, None, None]

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """Of the queries: [N, H, E] -> [R, H, n, E], where padding repeats the first token."""
        return packed[self.queries].transpose(1, 2)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        return padded.transpose(1, 2)[self.real]

    def unpad_keys(self, padded: torch.Tensor) -> torch.Tensor:
        """Gradients of keys or values [R, H, m, E] -> [M, G, E], summed over a group's heads."""
        summed = padded.unflatten(1, (-1, self.groups)).sum(dim=2)
        return summed.transpose(1, 2)[self.real_keys]


def _grid(lens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of each token of padded rows, 0 for padding, and which are no padding: [R, n] each."""
    column = torch.arange(max(lens))
    real = column < torch.tensor(lens)[:, None]
    starts = torch.tensor([0, *accumulate(lens)][:-1])[:, None]
    return (starts + column).where(real, 0), real


def _forward_cpu(q: torch.Tensor, segment: Segment, scale: float) -> Output:
    padded = _Padded(segment, q.shape[1] // segment.k.shape[1])
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        padded.pad(q),
        padded.k,
        padded.v,
        0.0,
        segment.causal,
        attn_mask=padded.mask,
        scale=scale,
    )
    return padded.unpad(out), padded.unpad(lse[..., None])[..., 0].T


def _backward_cpu(
    grad: torch.Tensor,
    q: torch.Tensor,
    segment: Segment,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    padded = _Padded(segment, q.shape[1] // segment.k.shape[1])
    # Padding repeats a real token and must not add to the gradient of its keys.
    grads = padded.pad(grad) * padded.real[:, None, :, None]
    grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grads,
        padded.pad(q),
        padded.k,
        padded.v,
        padded.pad(out),
        padded.pad(lse.T[..., None])[..., 0].contiguous(),
        0.0,
        segment.causal,
        attn_mask=padded.mask,
        scale=scale,
    )
    return padded.unpad(grad_q), padded.unpad_keys(grad_k), padded.unpad_keys(grad_v)
