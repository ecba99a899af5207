"""AdamW over the trainables, and its learning rate at each step."""

from __future__ import annotations

import math

import torch

from spt_ds.config.training import OptimConfig
from spt_ds.model.spt import Trainables


def build_optimizer(optim: OptimConfig, trainables: Trainables) -> torch.optim.AdamW:
    """Return AdamW with two groups: the prompt bank, and everything else that trains."""
    named = list(trainables.named_parameters())
    bank = [parameter for name, parameter in named if name.startswith("bank.")]
    rest = [parameter for name, parameter in named if not name.startswith("bank.")]
    # The rate without schedule is kept in the group, because `set_lr` overwrites `lr` at every
    # step.
    groups = [
        {"params": bank, "base_lr": optim.prompts_lr or optim.lr},
        {"params": rest, "base_lr": optim.lr},
    ]
    # The bank comes first here and in `named_parameters`: checkpoints pair names and parameters by
    # their order.
    return torch.optim.AdamW(
        groups,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        foreach=True,
    )


def set_lr(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, step: int, total_steps: int
) -> float:
    """Set the learning rates of step `step` (from 0); return that of `optim.lr`."""
    factor = lr_factor(optim, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optim.lr * factor


def lr_factor(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Return the share of the learning rate at `step`: a linear warm-up, then cosine or constant.

    The cosine reaches 0 at `total_steps`.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    length = max(1, total_steps - optim.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * (step - optim.warmup_steps) / length))
