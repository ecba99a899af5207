"""Random numbers keyed by what they are for: a resumed run on other ranks draws the same."""

from __future__ import annotations

import hashlib

import torch

# SplitMix64 (Steele, Lea and Flood 2014): the step of its counter, and (shift, factor) of each
# round that mixes the bits. int64 products wrap around as those of uint64 do.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
_BITS = 52  # of a draw: half a unit more is still exact in float64, so no draw is 0 or 1


def keyed_seed(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit seed from the run's seed, a purpose and numbers such as step or example index."""
    # Not Python's `hash`, whose value for a text differs from process to process.
    text = ":".join([str(seed), purpose, *map(str, keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def keyed_generator(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """A CPU generator seeded by `keyed_seed`."""
    return torch.Generator().manual_seed(keyed_seed(seed, purpose, *keys))


def counted_uniform(seeds: torch.Tensor, position: int, size: int) -> torch.Tensor:
    """Uniform draws within (0, 1) -> float64 [R, size], of int64 seeds [R], on their device.

    A draw depends on its seed, the position and its own number alone, not on what was drawn before.
    It is the same on every device. The position is below 2^31 and the size below 2^32.
    """
    numbers = torch.arange(1, size + 1, device=seeds.device) + (position << 32)
    bits = seeds[:, None] + numbers * _STEP
    # In place: each further tensor of R * size draws costs more than what is computed in it.
    shifted = torch.empty_like(bits)
    for shift, factor in _ROUNDS:
        bits.bitwise_xor_(_shift(bits, shift, shifted)).mul_(factor)
    return _shift(bits, 64 - _BITS, shifted).double().add_(0.5).mul_(2.0**-_BITS)


def gumbel_noise(seeds: torch.Tensor, position: int, size: int) -> torch.Tensor:
    """Standard Gumbel noise, as `counted_uniform` draws."""
    return counted_uniform(seeds, position, size).log_().neg_().log_().neg_()


def _shift(bits: torch.Tensor, by: int, out: torch.Tensor) -> torch.Tensor:
    """Bits shifted to the right; PyTorch's own shift copies the sign into what becomes free."""
    return torch.bitwise_right_shift(bits, by, out=out).bitwise_and_((1 << (64 - by)) - 1)
