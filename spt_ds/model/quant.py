"""Frozen linear layers of 4 or 8 bits. The only file that knows bitsandbytes, which does the
arithmetic.

A layer's codes and their scales lie in one flat uint8 Parameter, so ZeRO-3 shards, gathers and
offloads them together and as bytes. The weight is dequantised in the forward pass and again in the
backward pass; nothing gathered or dequantised is kept alive between the two.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from spt_ds.config.model import ModelConfig

# At import bitsandbytes misses a decoding kernel that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
from bitsandbytes.functional import create_dynamic_map, get_4bit_type  # noqa: E402

# Weights quantised at a time; a multiple of every block size, so blocks never straddle two chunks.
# On the host pieces are small: layers come to lie between freed pieces, and the C library cannot
# give those holes back. Pieces of 2^20 left 700 MiB of holes in a base of 160 MiB.
CHUNK = {"cpu": 2**16, "cuda": 2**20}
# Scales that share one scale under double quantisation, as in bitsandbytes.
SCALE_BLOCK = 256
# ZeRO-3 views partitions as 16-bit and 32-bit numbers in places.
ALIGN_BYTES = 4

# The kernels and not bitsandbytes' layers, which keep scales outside the weight: ZeRO-3 would leave
# those whole on every rank.
_ops: Any = torch.ops.bitsandbytes


@dataclass(frozen=True)
class Packing:
    """How weights become bytes: `book` is nf4, fp4 or int8 (blockwise dynamic), one fp32 scale per
    block.

    Layout of n weights in b blocks: codes, with `double_quant` b 8-bit scales, fp32 numbers (b
    scales; or the scales of the scales and their offset), zeros up to a multiple of `ALIGN_BYTES`.
    """

    book: str
    block_size: int
    double_quant: bool

    @classmethod
    def of(cls, config: ModelConfig) -> Packing:
        """The packing that `model.base_bits` and `model.quant` ask for; scales of int8 are never
        quantised.
        """
        four = config.base_bits == 4
        return cls(
            config.quant.type if four else "int8",
            config.quant.block_size,
            four and config.quant.double_quant,
        )

    @property
    def bits(self) -> int:
        return 8 if self.book == "int8" else 4

    def sizes(self, numel: int) -> list[int]:
        """Bytes of codes, of 8-bit scales, of fp32 numbers and of padding for `numel` weights."""
        codes = -(-numel * self.bits // 8)
        blocks = -(-numel // self.block_size)
        small = blocks if self.double_quant else 0
        numbers = 4 * (-(-blocks // SCALE_BLOCK) + 1 if self.double_quant else blocks)
        return [codes, small, numbers, -(codes + small + numbers) % ALIGN_BYTES]


@lru_cache
def code_book(book: str, device: torch.device) -> torch.Tensor:
    """The values that codes stand for, fp32: [16] for nf4 and fp4, [256] for int8."""
    if book == "int8":
        return create_dynamic_map().to(device)
    values: torch.Tensor = get_4bit_type(book, device=str(device)).float()
    return values


def chunks(
    numel: int, packing: Packing, device: torch.device
) -> Iterator[tuple[slice, slice, slice]]:
    """Ranges of weights, of code bytes and of scales that belong together."""
    step = CHUNK[device.type]
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        codes = slice(start * packing.bits // 8, -(-stop * packing.bits // 8))
        yield (
            slice(start, stop),
            codes,
            slice(start // packing.block_size, -(-stop // packing.block_size)),
        )


def quantise(
    weight: torch.Tensor, packing: Packing, device: torch.device
) -> tuple[torch.Tensor, float]:
    """weight, any shape, floating -> (flat bytes on `device`, relative error of the weights in the
    2-norm).

    Works chunk by chunk: beside the result it needs 20 MiB at most, whatever the layer's size. The
    same weights give the same bytes on every rank of one kind of device.
    """
    flat = weight.detach().reshape(-1)
    packed = torch.zeros(sum(packing.sizes(flat.numel())), dtype=torch.uint8, device=device)
    codes, small, numbers, _ = packed.split(packing.sizes(flat.numel()))
    scales = torch.empty(-(-flat.numel() // packing.block_size), dtype=torch.float32, device=device)
    for part, bytes_, blocks in chunks(flat.numel(), packing, device):
        values = flat[part].to(device, torch.float32)
        if packing.bits == 8:
            quantised, absmax = _ops.quantize_blockwise(
                values, code_book("int8", device), packing.block_size
            )
        else:
            # Two 4-bit codes share a byte, so an odd number of weights gets a zero behind it.
            values = nn.functional.pad(values, (0, values.numel() % 2))
            quantised, absmax = _ops.quantize_4bit(
                values, packing.block_size, packing.book, torch.uint8
            )
        codes[bytes_], scales[blocks] = quantised.view(-1), absmax
    if packing.double_quant:
        # Scales are all positive, and the code book has values of both signs: without their mean
        # half of it would not be used.
        offset = scales.mean()
        quantised, absmax = _ops.quantize_blockwise(
            scales - offset, code_book("int8", device), SCALE_BLOCK
        )
        small.copy_(quantised)
        scales = torch.cat([absmax, offset[None]])
    numbers.copy_(scales.view(torch.uint8))
    return packed, _error(flat, packed, packing)


def _error(flat: torch.Tensor, packed: torch.Tensor, packing: Packing) -> float:
    codes, scales = _codes_and_scales(packed, flat.numel(), packing)
    wrong = total = 0.0
    for part, bytes_, blocks in chunks(flat.numel(), packing, packed.device):
        values = flat[part].to(packed.device, torch.float32)
        got = _dequantise(
            codes[bytes_], scales[blocks], (1, values.numel()), packing, torch.float32
        )
        wrong += float((got[0] - values).square_().sum())
        # Not in place: `values` may be the weight itself.
        total += float(values.square().sum())
    return (wrong / total) ** 0.5 if total else 0.0


def _codes_and_scales(
    packed: torch.Tensor, numel: int, packing: Packing
) -> tuple[torch.Tensor, torch.Tensor]:
    codes, small, numbers, _ = packed.split(packing.sizes(numel))
    # A gathered Parameter may start anywhere in a buffer of bytes; a copy starts where fp32 numbers
    # may.
    scales = numbers.clone().view(torch.float32)
    if packing.double_quant:
        book = code_book("int8", packed.device)
        scales = (
            _ops.dequantize_blockwise(small, scales[:-1], book, SCALE_BLOCK, torch.float32)
            + scales[-1]
        )
    return codes, scales


def _dequantise(
    codes: torch.Tensor,
    scales: torch.Tensor,
    shape: tuple[int, int],
    packing: Packing,
    dtype: torch.dtype,
) -> torch.Tensor:
    numel, block = shape[0] * shape[1], packing.block_size
    if packing.bits == 8:
        return _ops.dequantize_blockwise(
            codes, scales, code_book("int8", codes.device), block, dtype
        ).view(shape)
    # bitsandbytes' CPU kernel gives wrong weights, silently, where a row is not a whole number of
    # blocks: such a layer goes through it as one row (of whole bytes).
    rows = shape if shape[1] % block == 0 else (1, numel + numel % 2)
    out: torch.Tensor = _ops.dequantize_4bit(codes, scales, block, packing.book, rows, dtype)
    return out.view(-1)[:numel].view(shape)


def dequantise(
    packed: torch.Tensor, shape: tuple[int, int], packing: Packing, dtype: torch.dtype
) -> torch.Tensor:
    """Flat bytes -> weight `shape` in `dtype`. The kernels know 16-bit and 32-bit floats; float64
    goes by fp32.
    """
    codes, scales = _codes_and_scales(packed, shape[0] * shape[1], packing)
    kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
    return _dequantise(codes, scales, shape, packing, kernel_dtype).to(dtype)


class QuantLinear(nn.Module):
    """Takes the place of a frozen `nn.Linear`: x [..., in] -> [..., out], computed in the dtype of
    x.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        packing: Packing,
        packed: torch.Tensor,
        bias: nn.Parameter | None,
    ):
        super().__init__()
        self.out_features, self.in_features = self.shape = shape
        self.packing = packing
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = bias
        self.fingerprint = fingerprint(packed)  # of the whole layer, before it is sharded

    @property
    def stored(self) -> torch.Tensor:
        """The layer's bytes, uint8, while gathered; NVMe offload keeps them under another dtype's
        name.
        """
        return self.packed.view(torch.uint8)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in]; under ZeRO-3 only while the module's parameters are gathered."""
        return dequantise(self.stored, self.shape, self.packing, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _FrozenLinear.apply(x, self)
        return out

    def extra_repr(self) -> str:
        return (
            f"in={self.in_features}, out={self.out_features}, {self.packing},"
            f" bias={self.bias is not None}"
        )


class _FrozenLinear(torch.autograd.Function):
    """Saves no tensor: ZeRO-3's hooks gather the module's bytes before its backward pass, which
    reads them again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: QuantLinear) -> torch.Tensor:
        ctx.module = module
        return linear(x, module.dequantised(x.dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        return grad @ ctx.module.dequantised(grad.dtype), None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b with one rounding; not `functional.linear`, which DeepSpeed replaces by one that
    rounds twice.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
    return out.view(*x.shape[:-1], weight.shape[0])


def fingerprint(packed: torch.Tensor) -> int:
    """A checksum of the bytes: equal for equal bytes, whatever the device."""
    return zlib.crc32(packed.detach().cpu().numpy().data)
