"""Start-up proof that a quantised base computes what its stored numbers say, sharded or not.

While one short batch is read, the weight of each layer is computed once more, in plain torch from
the code books, and the layer's output from it. Each layer is compared by itself, on the input that
the base gives it: so rounding does not add up from layer to layer, however deep the base is. The
layer's gathered bytes are compared with those that were packed when it was loaded.
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
)

# Of the norm of a layer's output: in 16 bits one rounding of each number, 2^-9.
OUTPUT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 2e-2}
ROUNDINGS = 2  # units in the last place by which one weight may differ: its product and its cast
NAMED = 3  # layers that the message names


@contextmanager
def layers_checked(lm: nn.Module) -> Iterator[None]:
    """Check each quantised layer of `lm` that is called inside; raise ModelError at the end.

    Under ZeRO-3 every rank must enter it, inside one call of the root module; all passes end before
    anything is raised.
    """
    faults: dict[str, str] = {}
    layers = {
        name: module for name, module in lm.named_modules() if isinstance(module, QuantLinear)
    }

    def checked(name: str, layer: QuantLinear) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            out = QuantLinear.forward(layer, x)
            fault = _fault(layer, x, out)
            if fault:
                faults[name] = fault
            return out

        return forward

    for name, layer in layers.items():
        # Not a forward hook: ZeRO-3's own hook is older, runs first and releases the bytes.
        layer.forward = checked(name, layer)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward
    if faults:
        named = "; ".join(
            f"{name}: {text}" for name, text in itertools.islice(faults.items(), NAMED)
        )
        raise ModelError(
            f"quantised base: {named} ({len(faults)} of {len(layers)} layers). It would train on"
            " wrong numbers; try engine.placement: replicate or model.base_bits: 16"
        )


def _fault(layer: QuantLinear, x: torch.Tensor, out: torch.Tensor) -> str:
    """What is wrong with a layer that made `out` of `x`; nothing where it is right."""
    if fingerprint(layer.stored) != layer.fingerprint:
        return "its bytes are not those that were loaded"
    weight = reference(layer.stored, layer.shape, layer.packing, x.dtype)
    gap = _largest_gap(layer.dequantised(x.dtype), weight)
    # Not `gap > ROUNDINGS`: a NaN must count as a fault.
    if not gap <= ROUNDINGS:
        return f"a dequantised weight is {gap:.3g} units in the last place off"
    precise = torch.promote_types(x.dtype, torch.float32)
    right = x.to(precise) @ weight.to(precise).T
    if layer.bias is not None:
        right = right + layer.bias
    distance, norm = float((out - right).norm()), float(right.norm())
    if not distance <= OUTPUT_TOLERANCE[x.dtype] * norm:
        return f"its output is {distance / norm:.2g} of its norm off"
    return ""


def _largest_gap(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units in the last place of `expected`.

    Weights far below the largest count as it / 2^20, and those of a layer of zeros as the smallest
    normal number.
    """
    info = torch.finfo(expected.dtype)
    small = (expected.abs().max() * 2**-20).clamp_min(info.tiny / info.eps)
    return float(((got - expected).abs() / (info.eps * expected.abs().clamp_min(small))).max())


def reference(
    packed: torch.Tensor, shape: tuple[int, int], packing: Packing, dtype: torch.dtype
) -> torch.Tensor:
    """What `quant.dequantise` must give: code book value times scale, in fp32, then cast."""
    numel = shape[0] * shape[1]
    codes, small, numbers, _ = packed.split(packing.sizes(numel))
    scales = numbers.clone().view(torch.float32)
    if packing.double_quant:
        outer = scales[:-1].repeat_interleave(SCALE_BLOCK)[: len(small)]
        scales = code_book("int8", packed.device)[small.long()] * outer + scales[-1]
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    book = code_book(packing.book, packed.device)
    for part, bytes_, blocks in chunks(numel, packing, packed.device):
        index = codes[bytes_].long()
        if packing.bits == 4:
            # The first weight of a pair is in the high half of its byte.
            index = torch.stack([index >> 4, index & 15], dim=1).view(-1)
        values = book[index[: part.stop - part.start]]
        out[part] = (
            values * scales[blocks].repeat_interleave(packing.block_size)[: len(values)]
        ).to(dtype)
    return out.view(shape)
