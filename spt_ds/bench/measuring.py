"""Cost and peak memory of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def timed(step: Callable[[], Any], device: torch.device, steps: int) -> tuple[list[float], Any]:
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


def reset_peak(device: torch.device) -> None:
    """Forget the largest memory so far (Linux: 5 written to clear_refs resets the high-water mark)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """Largest memory since `reset_peak`: of the allocator on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
