"""Gates that are fitted after the fact: could any retriever choose better from these contexts?

A gate predicts from a context how much better or worse than their mean each prompt is. It is fitted
on some dialogues and judged on others, so that nothing it tells is learned by heart. Legend: N
examples, K prompts, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from spt_ds.audit.measured import Ints, Measured
from spt_ds.evaluate.text_metrics import Floats

FOLDS = 5
RIDGES = 10.0 ** np.arange(-1, 7)  # strengths of the penalty that are tried
UNITS, STEPS, RATE, DECAY = 64, 150, 1e-2, 3e-2  # of the network

Fit = Callable[[Floats, Floats, Floats], Floats]  # features, targets, new features -> predictions


@dataclass(frozen=True)
class Gate:
    """What a gate would have chosen on dialogues that it was not fitted on."""

    features: str
    kind: str
    r2: float | None
    """Share of the variance of the differences between prompts that it explains; below 0 it
    predicts worse than their mean. None where these differences are the same everywhere."""
    prompts: Ints
    """[N] the prompt that it chooses."""


def post_hoc_gates(measured: Measured) -> list[Gate]:
    """A linear gate and a network on each kind of features; none where dialogues are too few."""
    if measured.count < 2 or measured.units.max() + 1 < FOLDS:
        return []
    return [
        _gate(measured, name, kind, fit)
        for name in measured.features
        for kind, fit in (("linear", ridge), ("network", network))
    ]


def _gate(measured: Measured, name: str, kind: str, fit: Fit) -> Gate:
    # By token: else the few long replies would be all that is fitted.
    rates = measured.losses / measured.tokens[:, None]
    targets = rates - rates.mean(axis=1, keepdims=True)
    features, folds = measured.features[name], measured.folds(FOLDS)
    predicted, mean = np.zeros_like(targets), np.zeros_like(targets)
    for fold in range(FOLDS):
        out = folds == fold
        # Scaled by the other folds alone: the dialogues that judge a gate must not shape it in any
        # way.
        centre, spread = features[~out].mean(axis=0), features[~out].std(axis=0) + 1e-9
        scaled = (features - centre) / spread
        # R2 is over what a gate without features would predict, which knows the other folds only.
        mean[out] = targets[~out].mean(axis=0)
        predicted[out] = fit(scaled[~out], targets[~out], scaled[out])
    varied = np.square(targets - mean).sum()
    r2 = float(1.0 - np.square(targets - predicted).sum() / varied) if varied > 0 else None
    return Gate(name, kind, r2, predicted.argmin(axis=1))


def ridge(features: Floats, targets: Floats, new: Floats) -> Floats:
    """Ridge regression; generalised cross-validation chooses the penalty."""
    mean = targets.mean(axis=0)
    left, values, right = np.linalg.svd(features, full_matrices=False)
    projected, count = left.T @ (targets - mean), len(features)
    best, slopes = np.inf, np.zeros((features.shape[1], targets.shape[1]))
    for penalty in RIDGES:
        kept = values**2 / (values**2 + penalty)
        rest = targets - mean - left @ (kept[:, None] * projected)
        # The 1 is for the mean, which is fitted as well.
        score = np.square(rest).mean() / (1.0 - (1.0 + kept.sum()) / count) ** 2
        if score < best:
            weights = values / (values**2 + penalty)
            best, slopes = score, right.T @ (weights[:, None] * projected)
    return mean + new @ slopes


def network(features: Floats, targets: Floats, new: Floats) -> Floats:
    """A network of one hidden layer; the same numbers give the same network."""
    generator = torch.Generator().manual_seed(0)
    mean, spread = targets.mean(axis=0), targets.std() + 1e-12
    x, y = (torch.from_numpy(part).float() for part in (features, (targets - mean) / spread))
    sizes = [(UNITS, x.shape[1]), (targets.shape[1], UNITS)]
    first, second = (
        nn.Parameter(torch.randn(size, generator=generator) * size[1] ** -0.5) for size in sizes
    )
    bias = nn.Parameter(torch.zeros(UNITS))
    # AdamW multiplies the decay by the rate: a step takes the share DECAY off.
    optimizer = torch.optim.AdamW([first, second, bias], lr=RATE, weight_decay=DECAY / RATE)

    def predict(rows: torch.Tensor) -> torch.Tensor:
        return torch.tanh(rows @ first.T + bias) @ second.T

    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            (predict(x) - y).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        found = predict(torch.from_numpy(new).float())
    return mean + spread * found.double().numpy()
