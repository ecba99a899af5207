"""Memory of the loss head: ours, chunk by chunk, against all vocabulary logits at once in fp32."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.nn.functional as F

from spt_ds.costs.meters import Clock, peak_bytes, reset_peak, timed
from spt_ds.model.head import FrozenHead

CASES = ("naive", "ours")
VOCABULARY, HIDDEN = 50_272, 768  # OPT's head at 125 M parameters


def measure(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory above the inputs' of loss and gradient for (K + 1) rows per target token."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    rows = (prompts + 1) * args.targets
    weight = torch.nn.Parameter(
        torch.randn(VOCABULARY, HIDDEN, device=device) * 0.02, requires_grad=False
    )
    hidden = torch.randn(rows, HIDDEN, device=device, requires_grad=True)
    targets = torch.randint(VOCABULARY, (rows,), device=device)
    head = FrozenHead(weight, None)

    def step() -> torch.Tensor:
        hidden.grad = None
        if case == "naive":
            loss = F.cross_entropy(hidden @ weight.T, targets, reduction="mean")
        else:
            loss = head(hidden, targets, None, args.head_chunk_mib).mean()
        loss.backward()
        return loss.detach()

    # Warmed up on a few rows first, so that the library's own buffers are not counted.
    F.cross_entropy(hidden[:8] @ weight.T, targets[:8]).backward()
    reset_peak(device)
    before = peak_bytes(device)
    costs, loss = timed(step, device, args.steps)
    assert hidden.grad is not None
    return {
        "case": case,
        "prompts": prompts,
        "loss": float(loss),
        "gradient": hidden.grad.flatten().double().cpu().numpy(),
        "cost": statistics.median(costs),
        "cost_unit": Clock(device).unit,
        "rows": rows,
        "peak_mib": (peak_bytes(device) - before) / 2**20,
    }
