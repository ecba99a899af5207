"""Random numbers keyed by what they are for: a resumed run on other ranks draws the same."""

from __future__ import annotations

import hashlib

import torch


def keyed_seed(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit seed from the run's seed, a purpose and numbers such as step or example index."""
    # Not Python's `hash`, whose value for a text differs from process to process.
    text = ":".join([str(seed), purpose, *map(str, keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def keyed_generator(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """A CPU generator seeded by `keyed_seed`."""
    return torch.Generator().manual_seed(keyed_seed(seed, purpose, *keys))
