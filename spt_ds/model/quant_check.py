"""Start-up proof that a quantised base computes what its stored numbers say, sharded or not.

Two passes over one short batch: one as training runs, one in which every layer's weight is computed
apart, in plain torch from the code books, and multiplied. On the way each layer's gathered bytes
are compared with those that were packed when it was loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from spt_ds.errors import ModelError
from spt_ds.model.quant import (
    SCALE_BLOCK,
    Packing,
    QuantLinear,
    chunks,
    code_book,
    fingerprint,
    linear,
)

LOGIT_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 6e-2,
}  # of the largest logit
ROUNDINGS = 2  # units in the last place by which one weight may differ: its product and its cast


def self_check(lm: nn.Module, logits: Callable[[], torch.Tensor]) -> None:
    """Raise ModelError naming the layer when `logits()`, a pass through `lm`, is not what the
    stored bytes say.

    Under ZeRO-3 every rank must call it, inside one call of the root module; all passes end before
    anything is raised.
    """
    faults: dict[str, str] = {}
    usual = logits()
    with _witnessed(lm, faults):
        apart = logits()
    gap = float((usual - apart).abs().max() / apart.abs().max())
    if not faults and gap <= LOGIT_TOLERANCE[apart.dtype]:
        return
    where = "; ".join(f"{name}: {fault}" for name, fault in itertools.islice(faults.items(), 3))
    raise ModelError(
        f"quantised base: {where or 'no single layer is at fault'} ({len(faults)} layers; logits"
        f" are {gap:.2g} of the largest apart, allowed {LOGIT_TOLERANCE[apart.dtype]:.0e}). It"
        " would train on wrong numbers; try engine.placement: replicate or model.base_bits: 16"
    )


@contextmanager
def _witnessed(lm: nn.Module, faults: dict[str, str]) -> Iterator[None]:
    """Inside, quantised layers compute with `reference` weights and add what they find wrong to
    `faults`.
    """
    layers = {
        name: module for name, module in lm.named_modules() if isinstance(module, QuantLinear)
    }

    def witness(name: str, layer: QuantLinear) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            weight = reference(layer.stored, layer.shape, layer.packing, x.dtype)
            if fingerprint(layer.stored) != layer.fingerprint:
                faults[name] = "its bytes are not those that were loaded"
            else:
                gap = _largest_gap(layer.dequantised(x.dtype), weight)
                if not gap <= ROUNDINGS:
                    faults[name] = f"a dequantised weight is {gap:.3g} units in the last place off"
            return linear(x, weight, layer.bias)

        return forward

    for name, layer in layers.items():
        layer.forward = witness(name, layer)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _largest_gap(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units in the last place of `expected`; weights far below the largest
    count as it / 2^20.
    """
    unit = torch.finfo(expected.dtype).eps * expected.abs().clamp_min(expected.abs().max() * 2**-20)
    return float(((got - expected).abs() / unit).max())


def reference(
    packed: torch.Tensor, shape: tuple[int, int], packing: Packing, dtype: torch.dtype
) -> torch.Tensor:
    """What `quant.dequantise` must give, in plain torch: code book value times scale, in fp32, then
    cast.
    """
    numel = shape[0] * shape[1]
    codes, small, numbers, _ = packed.split(packing.sizes(numel))
    scales = numbers.clone().view(torch.float32)
    if packing.double_quant:
        outer = scales[:-1].repeat_interleave(SCALE_BLOCK)[: len(small)]
        scales = code_book("int8", packed.device)[small.long()] * outer + scales[-1]
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    book = code_book(packing.book, packed.device)
    for part, bytes_, blocks in chunks(numel, packing):
        index = codes[bytes_].long()
        if packing.bits == 4:
            index = torch.stack([index >> 4, index & 15], dim=1).view(-1)
        values = book[index[: part.stop - part.start]]
        out[part] = (
            values * scales[blocks].repeat_interleave(packing.block_size)[: len(values)]
        ).to(dtype)
    return out.view(shape)
