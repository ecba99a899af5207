"""Whether a CPU multiplies in bf16: one that does not is faster with a base of 32 bits."""

from __future__ import annotations

import platform

import torch


def bf16_units() -> bool | None:
    """Whether this CPU has units for products in bf16; None where that is not known."""
    # Other processors (Arm, Apple) have other units, of which PyTorch tells nothing.
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    supported = (torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported())
    return any(supported)


def bf16_advice(bits: int) -> str | None:
    """What to tell about a base of so many bits on this CPU, if anything."""
    if bits == 32 or bf16_units() is not False:
        return None
    return (
        f"model.base_bits: {bits} computes in bf16, which this CPU emulates (it has neither"
        " AVX512-BF16 nor AMX): at 16 bits a step takes two to three times as long as with"
        " model.base_bits: 32"
    )
