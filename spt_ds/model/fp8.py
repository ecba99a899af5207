"""Frozen linear layers that multiply in FP8 (e4m3), which GPUs of compute capability 8.9 or more do
at up to twice the speed of bf16.

A weight is stored as rows of W for the forward product and as rows of its transpose for the
backward one. Together they take as many bytes as in bf16, but for the scales: each row has its own.
Rows of inputs and slopes are scaled as they come. The format is of Micikevicius et al. 2022 (arXiv
2209.05433). Legend: N rows, n numbers of a row, m rows of a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spt_ds.errors import ModelError
from spt_ds.log import say_once

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a row of zeros
MULTIPLE = 16  # of which the kernels want both sizes of a weight
CAPABILITY = (8, 9)

Codes = tuple[torch.Tensor, torch.Tensor]
"""Numbers in e4m3 [N, n], and what each row is to be multiplied by, fp32 [N, 1]."""


def scaled(rows: torch.Tensor) -> Codes:
    """Scale rows [N, n] so that the largest number of each is the largest that e4m3 has."""
    precise = rows.float()
    scales = (precise.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    return (precise / scales).to(E4M3), scales


def product(rows: torch.Tensor, weight: Codes) -> torch.Tensor:
    """rows [N, n] times the rows of a weight [m, n] -> [N, m], in the dtype of `rows`."""
    codes, scales = scaled(rows)
    out: torch.Tensor = torch._scaled_mm(
        codes,
        weight[0].T,
        scale_a=scales,
        scale_b=weight[1].T,
        out_dtype=rows.dtype,
    )
    return out


class Fp8Linear(nn.Module):
    """Takes the place of a frozen `nn.Linear`: x [..., in] -> [..., out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        names = ("codes", "scales", "codes_back", "scales_back")
        sides = (*scaled(linear.weight), *scaled(linear.weight.T))
        for name, tensor in zip(names, sides, strict=True):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        out: torch.Tensor = _Product.apply(
            rows, (self.codes, self.scales), (self.codes_back, self.scales_back)
        )
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """Keeps nothing of the input: the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: Codes, back: Codes) -> torch.Tensor:
        ctx.back = back
        return product(rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return product(grads[0], ctx.back), None, None


def multiply_in_fp8(lm: nn.Module, device: torch.device) -> None:
    """Replace the linear layers of a base that is on `device`, where their sizes fit the kernels.

    Embeddings and the head stay as they are: `Backbone` has put a module of its own for the head.
    Raises ModelError for a GPU without such products, or a base without a layer that fits.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ModelError(
            f"model.base_matmul: fp8 needs a GPU of compute capability 8.9 or more, got {found};"
            " leave it out"
        )
    if device.type == "cpu":
        say_once("model.base_matmul: fp8 saves no time on a CPU, which computes it in other widths")
    count = 0
    for module in list(lm.modules()):
        for name, child in list(module.named_children()):
            # One by one: base and copy never exist as a whole together.
            if type(child) is nn.Linear and not any(n % MULTIPLE for n in child.weight.shape):
                setattr(module, name, Fp8Linear(child))
                count += 1
    if not count:
        raise ModelError(
            "model.base_matmul: fp8: the base has no linear layer whose sizes are multiples of"
            f" {MULTIPLE}; leave it out"
        )
