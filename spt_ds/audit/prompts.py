"""What each prompt of a bank is like: the replies that it fits better than the others do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spt_ds.audit.measured import Measured

SHOWN = 3  # examples of each prompt


@dataclass(frozen=True)
class Typical:
    """One example, and by how much a prompt fits it better than the mean of all, nats a token."""

    gain: float
    persona: str
    partner: str
    """The last turn of the partner."""
    reply: str


@dataclass(frozen=True)
class Prompt:
    """One prompt of the bank."""

    nll: float
    """Of all replies under it, nats a token."""
    typical: list[Typical]
    """Of the examples that selected it, those of the largest gain; of all where none did."""


def describe(measured: Measured) -> list[Prompt]:
    """Describe every prompt of the bank, in its order."""
    rates = measured.losses / measured.tokens[:, None]
    gains = rates.mean(axis=1, keepdims=True) - rates  # [N, K]
    prompts = []
    for k in range(measured.count):
        own = np.flatnonzero(measured.selected == k)
        rows = own if len(own) else np.arange(len(gains))
        order = rows[np.argsort(-gains[rows, k], kind="stable")][:SHOWN]
        typical = [_typical(measured, int(row), float(gains[row, k])) for row in order]
        nll = float(measured.losses[:, k].sum() / measured.tokens.sum())
        prompts.append(Prompt(nll, typical))
    return prompts


def _typical(measured: Measured, row: int, gain: float) -> Typical:
    text = measured.texts[row]
    partner = text.history[-1] if text.history else ""
    return Typical(gain, " ".join(text.persona), partner, text.response)
