"""A ReLU that works in place and keeps one byte per element for the backward pass.

A ReLU keeps its output, which in OPT is the largest tensor of a layer: 4 of the 10 hidden sizes
that a layer keeps per token. Where the output is positive is all that its gradient needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MaskedRelu(nn.Module):
    """Takes the place of a `nn.ReLU` whose input nobody else reads: training overwrites it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A compiler makes the same of a plain one.
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
            return torch.relu(x)
        out: torch.Tensor = _Relu.apply(x)
        return out


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        # Autograd must know that the input is gone, so that whoever kept it gets an error.
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.relu_() > 0)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (positive,) = ctx.saved_tensors
        return torch.where(positive, grads[0], 0.0)


def slim_activations(lm: nn.Module) -> None:
    """Replace the ReLUs of OPT's layers, which alone read the linear layer before them."""
    # By class name: another architecture may read the input of its ReLU a second time.
    for module in lm.modules():
        if type(module).__name__ == "OPTDecoderLayer" and type(module.activation_fn) is nn.ReLU:
            module.activation_fn = MaskedRelu()
