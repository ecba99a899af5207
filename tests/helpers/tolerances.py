"""One row of tolerances per dtype, and the comparison that uses them.

`loss` bounds a difference relative to the larger of 1 and the twin's value, `grad` the norm of a
gradient's difference relative to the norm of the twin's gradient. docs/numerics.md says what was
measured and which deliberate faults each row sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    loss: float
    grad: float


# Two to twelve times the largest differences measured (docs/numerics.md). fp64 losses would allow
# 1e-14, but torch's cosine embedding loss adds 1e-12 to squared norms, which shows as 9e-13.
TOLERANCES = {
    torch.float64: Tolerance(loss=1e-11, grad=1e-10),
    torch.float32: Tolerance(loss=2e-6, grad=1e-5),
    torch.bfloat16: Tolerance(loss=1.5e-2, grad=1e-1),
}
# The head alone, against float64 of the same rounded operands: logits are fp32 also at 16 bits, and
# only the gradient is rounded on its way out.
HEAD = {
    torch.float64: Tolerance(loss=1e-13, grad=1e-13),
    torch.float32: Tolerance(loss=2e-6, grad=2e-6),
    torch.bfloat16: Tolerance(loss=2e-6, grad=4e-3),
}


@dataclass(frozen=True)
class Step:
    """Result of one optimizer step's losses: every value detached, every gradient of the total."""

    values: Mapping[str, torch.Tensor]  # total, parts, nll, scores ...
    grads: Mapping[str, torch.Tensor]  # by parameter name


def value_gap(ours: torch.Tensor, twin: torch.Tensor) -> float:
    """Largest difference relative to max(1, |twin|); infinite where the shapes differ."""
    if ours.shape != twin.shape:
        return float("inf")
    a, b = ours.double().cpu(), twin.double()
    return float(((a - b).abs() / b.abs().clamp_min(1.0)).max())


def grad_gap(ours: torch.Tensor, twin: torch.Tensor) -> float:
    """Norm of the difference relative to the norm of the twin; a twin of zeros leaves the absolute
    norm.
    """
    if ours.shape != twin.shape:
        return float("inf")
    a, b = ours.double().cpu(), twin.double()
    scale = float(b.norm())
    return float((a - b).norm()) / (scale if scale > 0 else 1.0)


def gaps(ours: Step, twin: Step) -> dict[str, tuple[float, str]]:
    """Every compared quantity with its difference and the column of the table that bounds it."""
    if ours.values.keys() != twin.values.keys() or ours.grads.keys() != twin.grads.keys():
        raise AssertionError(
            f"different quantities: {sorted(ours.values)} and {sorted(twin.values)}"
        )
    out = {
        name: (value_gap(value, twin.values[name]), "loss") for name, value in ours.values.items()
    }
    out |= {
        f"grad {name}": (grad_gap(grad, twin.grads[name]), "grad")
        for name, grad in ours.grads.items()
    }
    return out


def assert_steps_close(ours: Step, twin: Step, dtype: torch.dtype) -> None:
    """Fail with every quantity that passes its row of the table; NaN fails."""
    row = TOLERANCES[dtype]
    limits = {"loss": row.loss, "grad": row.grad}
    found = gaps(ours, twin)
    wrong = {
        name: f"{gap:.2e} > {limits[kind]:.0e}"
        for name, (gap, kind) in found.items()
        if not gap <= limits[kind]
    }
    assert not wrong, f"{dtype}: {wrong}"
