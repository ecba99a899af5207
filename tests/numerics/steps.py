"""One whole step, computed by the package and by the twin, in a form that can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spt_ds.batch import Batch, Contrast
from spt_ds.model import losses
from spt_ds.model.backbone import Backbone
from spt_ds.model.spt import Spt
from tests.helpers.tiny import (
    all_pairs,
    examples_of,
    make_precise,
    tiny_backbone,
    tiny_lm,
    tiny_spt,
)
from tests.helpers.tolerances import Step
from tests.helpers.twins import TWIN, TwinParts, TwinSettings, twin_step

PARTS = {"paper": ("nll_loss", "selection", "fusion"), "mixture": ("nll_loss", "mixture")}
# What makes the mixture the objective; T is no power of two, so that a product with it rounds.
MIXTURE: dict[str, Any] = {
    "objective": "mixture",
    "temperature": 1.4,
    "balance": 0.8,
    "tau_sim": 0.1,  # sharp: else the weights of random prompts are nearly equal
    "selection": 0.0,
    "fusion": 0.0,
    "contrastive": 0.0,
}
TWIN_GRADS = {
    "bank.weight": "prompts",
    "retriever.context.weight": "w_c",
    "retriever.context.bias": "b_c",
    "retriever.prompt.weight": "w_p",
    "retriever.prompt.bias": "b_p",
    "retriever.keys": "keys",
}


@dataclass(frozen=True)
class Case:
    """What is computed; `dtype` is that of the base, the trainables are fp64 under an fp64 base and
    fp32 otherwise.
    """

    arch: str
    dtype: torch.dtype = torch.float64
    backend: str = "sdpa"
    checkpointing: str = "off"
    placement: str = "prefix"
    count: int = 3
    tokens: int = 2
    fusion_weights: str = "scores"
    objective: str = "paper"
    keys: str = "prompts"

    @property
    def precise(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def build(case: Case, **options: float | int) -> tuple[Backbone, Spt]:
    """Backbone and method of a case."""
    backbone = tiny_backbone(case.arch, case.dtype, case.backend, case.checkpointing)
    objective = MIXTURE if case.objective == "mixture" else {}
    return backbone, tiny_spt(
        backbone,
        case.count,
        case.tokens,
        case.precise,
        prompts={"placement": case.placement},
        retriever={"keys": case.keys},
        losses={"fusion_weights": case.fusion_weights, **objective, **options},
    )


def counts_of(batch: Batch) -> tuple[int, int]:
    """Examples and target tokens of a window that is this one micro-batch."""
    real = [r for r, weight in zip(batch.response_lens, batch.weights, strict=True) if weight]
    return len(real), sum(real)


def our_step(
    backbone: Backbone,
    spt: Spt,
    micro: Sequence[Batch],
    contrast: Contrast | None = None,
    counts: tuple[int, int] | None = None,
) -> Step:
    """Losses and gradients of a window of micro-batches, summed as a training step sums them."""
    examples, target_tokens = counts or map(sum, zip(*map(counts_of, micro), strict=True))
    for parameter in spt.trainables.parameters():
        parameter.grad = None
    outs = []
    for batch in micro:
        out = backbone(spt.micro_losses, batch, examples, target_tokens)
        out.total.backward()
        outs.append(out)
    objective = spt.config.losses.objective
    values = dict(zip(PARTS[objective], sum(out.parts for out in outs), strict=True))
    total = sum(out.total.detach() for out in outs)
    if objective == "paper":
        values["contrastive"] = torch.zeros_like(total)
    else:
        pooled, weights = (
            torch.cat(parts)
            for parts in zip(*((out.pooled, out.packed.weights) for out in outs), strict=True)
        )
        even = losses.balance(spt.mean_weights(pooled, weights, examples))
        (spt.config.losses.balance * even).backward()
        total = total + spt.config.losses.balance * even.detach()
        values["balance"] = even.detach()
    if objective == "paper" and contrast is not None:
        scores = torch.cat([out.scores for out in outs], dim=1)
        loss, share = spt.contrastive(
            torch.cat([out.pooled for out in outs]), scores[None], contrast, 0
        )
        (spt.config.losses.contrastive * loss).backward()
        total = total + spt.config.losses.contrastive * loss.detach()
        values["contrastive"] = share
    values |= {"total": total, "nll": torch.cat([out.nll for out in outs], dim=1)}
    values["scores"] = torch.cat([out.scores for out in outs], dim=1)
    return Step(values, grads_of(spt))


def grads_of(spt: Spt) -> dict[str, torch.Tensor]:
    """Gradient of every trainable by name, zeros where none arrived."""
    named = spt.trainables.named_parameters()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in named
    }


def twin_parts(spt: Spt) -> TwinParts:
    """The trainables' values as float64 leaves."""
    named: dict[str, Any] = dict(spt.trainables.named_parameters())
    if spt.config.retriever.projections == "shared":
        named |= {
            f"retriever.prompt.{name}": named[f"retriever.context.{name}"]
            for name in ("weight", "bias")
        }
    leaves = {
        TWIN_GRADS[name]: p.detach().double().clone().requires_grad_() for name, p in named.items()
    }
    return TwinParts(**leaves)


def twin_of(
    case: Case,
    spt: Spt,
    batch: Batch,
    contrast: Contrast | None,
    trained: Sequence[Sequence[int]] | None = None,
) -> Step:
    """The same step by the twin: the base's weights as `case.dtype` rounds them, everything else in
    float64.
    """
    lm = twin_lm(case.arch, case.dtype)
    given = spt.config.losses
    settings = TwinSettings(
        case.placement,
        given.selection,
        given.fusion,
        given.contrastive,
        given.tau_gold,
        given.tau_sim,
        given.fusion_weights == "normalised",
        given.temperature if given.objective == "mixture" else None,
        given.balance,
    )
    parts = twin_parts(spt)
    pairs: list[tuple[int, int, float]] = []
    if contrast is not None:
        pairs = [
            (int(i), int(j), float(t))
            for (i, j), t in zip(contrast.pairs, contrast.targets, strict=True)
        ]
    out = twin_step(lm, parts, examples_of(batch), pairs, settings, trained, batch.prompt_at)
    leaves = {
        name: leaf
        for name, field in TWIN_GRADS.items()
        if (leaf := getattr(parts, field)) is not None
    }
    grads = torch.autograd.grad(out["total"], list(leaves.values()), allow_unused=True)
    filled: Mapping[str, torch.Tensor] = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return Step({name: value.detach() for name, value in out.items()}, filled)


def twin_lm(arch: str, dtype: torch.dtype) -> torch.nn.Module:
    """A fresh base with the weights of `dtype`, computing in float64 with the twin's attention."""
    lm = tiny_lm(arch, dtype).double()
    if dtype != torch.float64:
        make_precise(lm)
    lm.requires_grad_(False)
    lm.set_attn_implementation(TWIN)
    return lm


def contrast_of(batch: Batch, dtype: torch.dtype) -> Contrast | None:
    """All pairs of a micro-batch; None where there are none."""
    return all_pairs(len(batch), dtype=dtype) if len(batch) > 1 else None
