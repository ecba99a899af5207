"""What an optimizer step counts over all ranks: a tensor whose parts have names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spt_ds.config.method import LossConfig
from spt_ds.model.spt import MicroLosses

LOSSES = ("nll", "selection", "fusion", "contrastive")
SIGNALS = ("stop", "save")


class StepSums:
    """Named views into one tensor, which is added to on the device and read on the host.

    Legend: K prompts.
    """

    def __init__(self, values: torch.Tensor) -> None:
        """`values` has as many numbers as `length` tells."""
        self.values = values
        prompts = len(values) - self.length(0)
        parts = values.split([len(LOSSES), len(SIGNALS), 1, prompts])
        self.losses = parts[0]  # [4] divided by the step's counts, unweighted
        self.signals = parts[1]  # [2] ranks that ask to stop, to save
        self.bad = parts[2]  # [1] target tokens whose loss is not finite
        self.usage = parts[3]  # [K] examples that chose each prompt

    @staticmethod
    def length(prompts: int) -> int:
        """Numbers in the sums of a step with so many prompts."""
        return len(LOSSES) + len(SIGNALS) + 1 + prompts

    def add(self, out: MicroLosses) -> None:
        """Add one micro-batch; the contrastive loss is that of a whole window."""
        self.losses[:3] += out.parts
        self.bad += out.bad.sum()
        # A filler row has weight 0 and so chooses no prompt.
        self.usage.index_add_(0, out.scores.argmax(dim=0), out.packed.weights)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step as all ranks see it."""

    losses: dict[str, float]
    """By name and unweighted; `loss` is their weighted sum."""
    grad_norm: float
    """Of the whole gradient, before clipping."""
    lr: float
    prompt_usage: list[int]
    """[K] examples that chose each prompt."""
    stop: bool
    """Whether any rank asks to stop."""
    save: bool
    """Whether any rank asks for a checkpoint."""

    @classmethod
    def of(cls, sums: StepSums, weights: LossConfig, grad_norm: float, lr: float) -> StepResult:
        """Read the sums, which are on the host."""
        losses = dict(zip(LOSSES, sums.losses.tolist(), strict=True))
        factors = (1.0, weights.selection, weights.fusion, weights.contrastive)
        total = sum(w * v for w, v in zip(factors, losses.values(), strict=True))
        stop, save = (count > 0 for count in sums.signals.tolist())
        usage = [int(count) for count in sums.usage.tolist()]
        return cls({**losses, "loss": total}, grad_norm, lr, usage, stop, save)

    def metrics(self) -> dict[str, Any]:
        """The values of one line of metrics.jsonl."""
        return {
            **self.losses,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "prompt_usage": self.prompt_usage,
        }
