"""One whole step, computed by the package and by the twin, in a form that can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spt_ds.batch import Batch, Contrast
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

PARTS = ("nll_loss", "selection", "fusion")
TWIN_GRADS = {
    "bank.weight": "prompts",
    "retriever.context.weight": "w_c",
    "retriever.context.bias": "b_c",
    "retriever.prompt.weight": "w_p",
    "retriever.prompt.bias": "b_p",
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

    @property
    def precise(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def build(case: Case, **options: float | int) -> tuple[Backbone, Spt]:
    """Backbone and method of a case."""
    backbone = tiny_backbone(case.arch, case.dtype, case.backend, case.checkpointing)
    prompts = {"placement": case.placement}
    losses = {"fusion_weights": case.fusion_weights, **options}
    return backbone, tiny_spt(
        backbone, case.count, case.tokens, case.precise, prompts=prompts, losses=losses
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
    values = dict(zip(PARTS, sum(out.parts for out in outs), strict=True))
    total = sum(out.total.detach() for out in outs)
    values["contrastive"] = torch.zeros_like(total)
    if contrast is not None:
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
    retriever: Any = spt.trainables.retriever
    linears = (retriever.context, retriever.prompt)
    sources = [
        spt.trainables.bank.weight,
        *(p for linear in linears for p in (linear.weight, linear.bias)),
    ]
    return TwinParts(*(p.detach().double().clone().requires_grad_() for p in sources))


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
    losses = spt.config.losses
    settings = TwinSettings(
        case.placement,
        losses.selection,
        losses.fusion,
        losses.contrastive,
        losses.tau_gold,
        losses.tau_sim,
        losses.fusion_weights == "normalised",
    )
    parts = twin_parts(spt)
    pairs: list[tuple[int, int, float]] = []
    if contrast is not None:
        pairs = [
            (int(i), int(j), float(t))
            for (i, j), t in zip(contrast.pairs, contrast.targets, strict=True)
        ]
    out = twin_step(lm, parts, examples_of(batch), pairs, settings, trained, batch.prompt_at)
    leaves = {name: getattr(parts, field) for name, field in TWIN_GRADS.items()}
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
