"""Cost and peak memory of a piece of work, and what matrix products reach in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Clock:
    """CPU seconds of the process, or seconds between synchronisations on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.unit = "s" if self.gpu else "CPU s"

    def now(self) -> float:
        if not self.gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class ForwardMeter:
    """Cost of the base's forward passes; what a backward pass computes again is left out."""

    def __init__(self, base: torch.nn.Module, clock: Clock) -> None:
        self.clock, self.start, self.total = clock, 0.0, 0.0
        # OPT's causal LM calls the decoder in its base model directly.
        module = getattr(base, "decoder", base)
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave)

    def _enter(self, *call: Any) -> None:
        self.start = self.clock.now()

    def _leave(self, *call: Any) -> None:
        self.total += self.clock.now() - self.start

    def take(self) -> float:
        """Cost since the last call of this method."""
        total, self.total = self.total, 0.0
        return total


def timed(step: Callable[[], Any], device: torch.device, steps: int) -> tuple[list[float], Any]:
    """Costs of `steps` calls after one warm-up, and what the last one returned."""
    clock = Clock(device)
    out, costs = step(), []
    for _ in range(steps):
        start = clock.now()
        out = step()
        costs.append(clock.now() - start)
    return costs, out


def matmul_ceiling(
    device: torch.device, dtype: torch.dtype, rows: int, hidden: int, ffn: int
) -> float:
    """TFLOP per cost of the best of five products [rows, hidden] x [hidden, ffn].

    It is the largest product of a layer.
    """
    left = torch.randn(rows, hidden, device=device).to(dtype)
    right = torch.randn(hidden, ffn, device=device).to(dtype)
    repeats = 20 if device.type == "cuda" else 1  # a single product is too short for a GPU's clock

    def products() -> None:
        for _ in range(repeats):
            left @ right

    costs, _ = timed(products, device, 5)
    return 2 * rows * hidden * ffn * repeats / min(costs) / 1e12


def reset_peak(device: torch.device) -> None:
    """Forget the largest memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # On Linux a 5 resets the high-water mark of the resident memory.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """Largest memory since `reset_peak`: of the allocator on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
