"""What an optimizer step counts over all ranks: a tensor whose parts have names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from spt_ds.config.method import LossConfig
from spt_ds.model import losses
from spt_ds.model.spt import MicroLosses

MOST_LOSSES = 4  # of an objective, see losses.factors
SIGNALS = ("stop", "save")


class StepSums:
    """Named views into one tensor, which is added to on the device and read on the host.

    Legend: K prompts.
    """

    def __init__(self, values: torch.Tensor) -> None:
        """`values` has as many numbers as `length` tells."""
        self.values = values
        prompts = len(values) - self.length(0)
        parts = values.split([MOST_LOSSES, len(SIGNALS), 1, prompts])
        self.losses = parts[0]  # [4] divided by the step's counts, unweighted; unused ones are 0
        self.signals = parts[1]  # [2] ranks that ask to stop, to save
        self.bad = parts[2]  # [1] target tokens whose loss is not finite
        self.usage = parts[3]  # [K] examples that chose each prompt

    @staticmethod
    def length(prompts: int) -> int:
        """Numbers in the sums of a step with so many prompts."""
        return MOST_LOSSES + len(SIGNALS) + 1 + prompts

    def add(self, out: MicroLosses) -> None:
        """Add one micro-batch; the last loss of an objective is that of a whole window."""
        self.losses[: len(out.parts)] += out.parts
        self.bad += out.bad.sum()
        # A filler row has weight 0 and so chooses no prompt. A GPU adds in any order, but sums of 0
        # and 1 are exact.
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
    """[K] examples that chose each prompt; empty while all prompts are one."""
    stop: bool
    """Whether any rank asks to stop."""
    save: bool
    """Whether any rank asks for a checkpoint."""

    @classmethod
    def of(
        cls, sums: StepSums, weights: LossConfig, grad_norm: float, lr: float, shared: bool
    ) -> StepResult:
        """Read the sums, which are on the host; `shared` says that all prompts are one still."""
        factors = {"nll": 1.0} if shared else losses.factors(weights)
        values = dict(zip(factors, sums.losses.tolist(), strict=False))
        total = sum(factors[name] * value for name, value in values.items())
        stop, save = (count > 0 for count in sums.signals.tolist())
        usage = [] if shared else [int(count) for count in sums.usage.tolist()]
        return cls({**values, "loss": total}, grad_norm, lr, usage, stop, save)

    def metrics(self) -> dict[str, Any]:
        """The values of one line of metrics.jsonl."""
        values = {**self.losses, "grad_norm": self.grad_norm, "lr": self.lr}
        return {**values, "prompt_usage": self.prompt_usage} if self.prompt_usage else values
