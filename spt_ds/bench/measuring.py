"""Cost and peak memory of a piece of work."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch


def timed(step: Callable[[], Any], device: Any, steps: int) -> tuple[list[float], Any]:
    """Costs of `steps` calls after one warm-up: CPU seconds, or seconds between synchronisations on a GPU."""
    gpu = device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    out, costs = step(), []
    for _ in range(steps):
        if gpu:
            torch.cuda.synchronize()
        start = clock()
        out = step()
        if gpu:
            torch.cuda.synchronize()
        costs.append(clock() - start)
    return costs, out


def peak_bytes(device: Any) -> int:
    """Largest memory so far: of the allocator on a GPU, resident on a CPU (Linux reports KiB)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
