"""Bounds how many kernels of 16-bit matrix products PyTorch keeps on a CPU."""

from __future__ import annotations

import os

# A micro-batch uses two dozen kernels, one for each shape of a product.
KEPT_KERNELS = 64
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_kernel_caches() -> None:
    """Keep few kernels; a variable that the user has set stands. Call it before the first product.

    oneDNN compiles a kernel of about 0.6 MiB for each shape, and packed rows have another number of
    tokens in each micro-batch. It and PyTorch's layer above it keep 1,024 of them by default.
    """
    for name in _VARIABLES:
        os.environ.setdefault(name, str(KEPT_KERNELS))
