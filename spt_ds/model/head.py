"""The vocabulary head and its cross entropy in chunks; one visit to the frozen weight per step.

A frozen head needs no weight gradient, so the gradient of every token's loss to its hidden row is
known the moment its logits are: it is computed chunk by chunk in the forward pass and only [n, D]
is kept. The vocabulary logits exist for one chunk at a time, and the backward pass neither
recomputes them nor needs the weight. (The idea of a fused linear cross entropy, without its weight
gradient.) Only where all of the base trains (`method.type: full`) does the head have a gradient of
its own.

Logits are fp32 also where the weights have 16 bits: rounded to bf16, a logit of 20 is known to
0.06, more than the losses of one reply under two prompts differ by.

Legend: n rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

MIB = 2**20
# logits, their log-softmax and its gradient, alive together where the head itself trains
TRAINED_COPIES = 3
WIDENED = 2**19  # numbers of a 16-bit weight that are widened at a time on a CPU: 2 MiB of fp32


class FrozenHead(nn.Module):
    """Takes the place of a causal LM's `lm_head`, sharing its Parameters (tied heads stay tied).

    `forward(hidden)` gives logits, in fp32 or better; with `targets` it gives one loss per row.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        bias_scale: torch.Tensor | None = None,
        chunk_mib: int = 128,
    ) -> torch.Tensor:
        """hidden [..., D] -> logits [..., V]; with targets [n], hidden [n, D] -> losses [n].

        `bias_scale` [n] multiplies the bias row by row: a fused row sums its K biases too.
        `chunk_mib` bounds the memory of the logits that exist at one time.
        """
        precise = torch.promote_types(self.weight.dtype, torch.float32)
        if targets is None:
            return self._logits(hidden, precise)
        rows = max(
            1, chunk_mib * MIB // (self.copies(precise) * self.weight.shape[0] * precise.itemsize)
        )
        if self.weight.requires_grad:
            return self._trained(hidden, targets, bias_scale, rows, precise)
        losses: torch.Tensor = _HeadLoss.apply(
            hidden, targets, self.weight, self.bias, bias_scale, rows, precise
        )
        return losses

    def _logits(self, hidden: torch.Tensor, precise: torch.dtype) -> torch.Tensor:
        """hidden [..., D] -> logits [..., V] in `precise`; a 16-bit head makes no graph."""
        if self.weight.dtype == precise:
            return F.linear(hidden, self.weight, self.bias)
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = rows.new_empty(len(rows), len(self.weight), dtype=precise)
        product(rows, self.weight, logits)
        if self.bias is not None:
            logits += self.bias
        return logits.view(*hidden.shape[:-1], -1)

    def copies(self, precise: torch.dtype) -> int:
        """How many times the logits of a chunk exist together, in units of the dtype `precise`.

        A frozen head works in place: beside the logits there are their slopes in the weight's
        dtype, where that is another, and the scaled biases.
        """
        if self.weight.requires_grad:
            return TRAINED_COPIES
        return 1 + int(self.weight.dtype != precise) + int(self.bias is not None)

    def _trained(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        bias_scale: torch.Tensor | None,
        rows: int,
        precise: torch.dtype,
    ) -> torch.Tensor:
        """Losses [n] of a head that trains itself: the backward pass computes each chunk's logits
        again.

        The weight's gradient sums over rows, each times the gradient of its loss, which is not
        known before.
        """

        def chunk(
            hidden: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | None
        ) -> torch.Tensor:
            logits = (hidden.to(self.weight.dtype) @ self.weight.T).to(precise)
            if self.bias is not None:
                logits = logits + (self.bias if scale is None else scale[:, None] * self.bias)
            return F.cross_entropy(logits, targets, reduction="none")

        losses = [
            checkpoint(
                chunk,
                hidden[part],
                targets[part],
                None if bias_scale is None else bias_scale[part],
                use_reentrant=False,
            )
            for part in (slice(start, start + rows) for start in range(0, len(hidden), rows))
        ]
        return torch.cat(losses)


def product(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """rows [n, D] and weight [V, D] -> `out` [n, V], in the precision of `out`.

    A plain product of 16-bit matrices is added up in fp32 and then rounded to 16 bits.
    """
    if rows.dtype == weight.dtype == out.dtype:
        return torch.mm(rows, weight.T, out=out)
    if rows.dtype == weight.dtype and rows.is_cuda:
        return torch.mm(rows, weight.T, out_dtype=out.dtype, out=out)
    # No kernel of a CPU multiplies 16-bit matrices into fp32. Pieces of the weight that fit its
    # cache are widened: no slower for few rows, and twice the time for hundreds.
    wide, step = rows.to(out.dtype), max(1, WIDENED // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        torch.mm(wide, weight[part].to(out.dtype).T, out=out[:, part])
    return out


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        bias_scale: torch.Tensor | None,
        chunk_rows: int,
        precise: torch.dtype,
    ) -> torch.Tensor:
        losses = torch.empty(len(hidden), dtype=precise, device=hidden.device)
        wants_hidden = ctx.needs_input_grad[0]
        wants_scale = bias is not None and bias_scale is not None and ctx.needs_input_grad[4]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_scale = torch.empty_like(losses) if wants_scale else None
        # All chunks use the same memory: a fresh piece of this size costs a tenth of the product on
        # a CPU.
        room = weight.new_empty(min(chunk_rows, len(hidden)), len(weight), dtype=precise)
        slopes = room if weight.dtype == precise else torch.empty_like(room, dtype=weight.dtype)
        for start in range(0, len(hidden), chunk_rows):
            part = slice(start, start + chunk_rows)
            chunk = hidden[part].to(weight.dtype)
            logits = product(chunk, weight, room[: len(chunk)])
            if bias is not None:
                logits += bias if bias_scale is None else bias_scale[part, None] * bias
            # Read first: the next lines turn `logits` into exponentials in place.
            picked = logits.gather(1, targets[part, None])[:, 0]
            top = logits.amax(dim=1, keepdim=True)
            weights = logits.sub_(top).exp_()
            total = weights.sum(dim=1, keepdim=True)
            losses[part] = (total.log() + top)[:, 0] - picked
            if wants_hidden or wants_scale:
                slope = weights.div_(total)  # softmax minus one-hot: d loss / d logits
                # One target per row: no two additions meet, so their order on a GPU cannot matter.
                slope.scatter_add_(1, targets[part, None], slope.new_full((len(slope), 1), -1.0))
                if grad_hidden is not None:
                    rounded = slope if slopes is room else slopes[: len(chunk)].copy_(slope)
                    grad_hidden[part] = (rounded @ weight).to(hidden.dtype)
                if grad_scale is not None and bias is not None:
                    grad_scale[part] = slope @ bias.to(precise)
        ctx.save_for_backward(grad_hidden, grad_scale)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        grad_hidden, grad_scale = ctx.saved_tensors
        to_hidden = (
            None if grad_hidden is None else (grad[:, None] * grad_hidden).to(grad_hidden.dtype)
        )
        to_scale = None if grad_scale is None else grad * grad_scale
        return to_hidden, None, None, None, to_scale, None, None
