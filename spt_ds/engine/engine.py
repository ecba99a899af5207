"""One object that owns base, trainables and optimizer, and takes optimizer steps that are exact
over ranks.

Legend: K prompts, G examples of a step over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spt_ds import dist
from spt_ds.batch import Batch, Window, on_device
from spt_ds.config.schema import Config, OptimConfig
from spt_ds.engine.zero import Sharding
from spt_ds.errors import NonFiniteError
from spt_ds.model.spt import MicroLosses, Spt, Trainables

PARTS = ("nll", "selection", "fusion", "contrastive")
SIGNALS = ("stop", "save")


@dataclass(frozen=True)
class StepResult:
    """Sums over all ranks of one optimizer step."""

    reduced: list[float]  # [parts, signals, bad, usage of each prompt]
    grad_norm: float  # before clipping
    lr: float
    weights: tuple[float, ...]  # of the four losses

    def requested(self) -> tuple[bool, bool]:
        """Whether any rank asked to stop, to save."""
        stop, save = self.reduced[len(PARTS) : len(PARTS) + 2]
        return stop > 0, save > 0

    def metrics(self) -> dict[str, Any]:
        """Losses per part (unweighted), their weighted sum, gradient norm, learning rate, prompt
        usage counts.
        """
        values = self.reduced
        out: dict[str, Any] = dict(zip(PARTS, values[: len(PARTS)], strict=True))
        out["loss"] = sum(w * v for w, v in zip(self.weights, values[: len(PARTS)], strict=True))
        out["grad_norm"] = self.grad_norm
        out["lr"] = self.lr
        out["prompt_usage"] = [int(v) for v in values[len(PARTS) + len(SIGNALS) + 1 :]]
        return out


class Engine:
    """See the module's docstring. `root` is the (possibly sharded) backbone; call it, never its
    children.
    """

    def __init__(
        self, config: Config, world: dist.World, sharding: Sharding, root: nn.Module, spt: Spt
    ) -> None:
        self.config = config
        self.world = world
        self.sharding = sharding
        self.root = root
        self.spt = spt
        self.names = [name for name, _ in self.trainables.named_parameters()]
        parameters = list(self.trainables.parameters())
        for (
            parameter
        ) in parameters:  # the same numbers everywhere, whatever a rank's math library rounds
            dist.broadcast_(parameter.data)
        extra = len(PARTS) + len(SIGNALS) + 1 + config.prompts.count
        sizes = [parameter.numel() for parameter in parameters]
        # Gradients and the step's sums lie in one buffer: one reduction a step, nothing copied.
        self.buffer = torch.zeros(sum(sizes) + extra, device=world.device)
        for parameter, part in zip(parameters, self.buffer[:-extra].split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.gradients, self.sums = self.buffer[:-extra], self.buffer[-extra:]
        self.optimizer = _optimizer(config.optim, self.trainables)
        self._assert_rules()

    @property
    def trainables(self) -> Trainables:
        return self.spt.trainables

    def _assert_rules(self) -> None:
        """Our own invariants: what trains is fp32 and replicated, nothing else has a gradient."""
        assert all(
            p.dtype == torch.float32 and p.grad is not None for p in self.trainables.parameters()
        )
        assert all(
            p.grad.dtype == torch.float32
            for p in self.trainables.parameters()
            if p.grad is not None
        )
        trained = {id(p) for p in self.trainables.parameters()}
        assert not any(p.requires_grad for p in self.root.parameters() if id(p) not in trained)
        assert {id(p) for g in self.optimizer.param_groups for p in g["params"]} == trained

    def train_window(
        self, window: Window, step: int, total_steps: int, signals: tuple[float, float]
    ) -> StepResult:
        """Take optimizer step `step` (from 0) of `total_steps`; `signals` are this rank's stop and
        save requests.

        Losses are divided by the target tokens and examples of the whole step over all ranks, so
        the result does not depend on the split into ranks and micro-batches. Raises NonFiniteError
        on every rank, before the optimizer moves, when any rank's loss or gradient is NaN or
        infinite.
        """
        self.buffer.zero_()
        outs: list[MicroLosses] = []
        for batch in window.micro:
            out: MicroLosses = self.root(
                self.spt.micro_losses, batch, window.examples, window.target_tokens
            )
            out.total.backward()
            self._add(out)
            outs.append(out)
        weight = self.config.losses.contrastive
        if weight and window.contrast is not None:
            everyone = dist.all_gather(torch.cat([out.scores for out in outs], dim=1))
            pooled = torch.cat([out.pooled for out in outs])
            loss, share = self.spt.contrastive(pooled, everyone, window.contrast, self.world.rank)
            (weight * loss).backward()
            self.sums[3] += share
        self.sums[len(PARTS) : len(PARTS) + 2] += on_device(
            signals, self.sums.device, self.sums.dtype
        )
        dist.all_reduce_sum(self.buffer)
        norm = self.gradients.norm()
        grad_norm, *reduced = torch.cat(
            [norm[None], self.sums]
        ).tolist()  # the step's one wait for the device
        if not all(map(math.isfinite, (grad_norm, *reduced))):
            self._raise_non_finite(step, window, outs)
        if self.config.optim.clip_norm:
            self.gradients.mul_((self.config.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        lr = self._set_lr(step, total_steps)
        self.optimizer.step()
        losses = self.config.losses
        weights = (1.0, losses.selection, losses.fusion, losses.contrastive)
        return StepResult(reduced, grad_norm, lr, weights)

    def _add(self, out: MicroLosses) -> None:
        self.sums[:3] += out.parts
        self.sums[len(PARTS) + len(SIGNALS)] += out.bad.sum()
        usage = self.sums[len(PARTS) + len(SIGNALS) + 1 :]
        usage.index_add_(0, out.scores.argmax(dim=0), out.packed.weights)

    def _set_lr(self, step: int, total_steps: int) -> float:
        factor = lr_factor(self.config.optim, step, total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return self.config.optim.lr * factor

    def _raise_non_finite(self, step: int, window: Window, outs: list[MicroLosses]) -> None:
        bad: list[int] = []
        for batch, out in zip(window.micro, outs, strict=True):
            wrong = (out.bad > 0) | ~torch.isfinite(out.scores).all(dim=0)
            bad += [
                index
                for index, is_wrong in zip(batch.indices, wrong.tolist(), strict=True)
                if is_wrong
            ]
        rows = [(rank, found) for rank, found in enumerate(dist.gather_json(bad)) if found]
        where = (
            "; ".join(f"rank {rank}: examples {found}" for rank, found in rows)
            or "in the gradient only"
        )
        raise NonFiniteError(
            f"step {step + 1}: a loss or gradient is NaN or infinite ({where}). The optimizer did"
            " not move; the last checkpoint is good. Lower optim.lr, or look at those examples of"
            " data.train"
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean losses over a data set, each example once; `loss` weights them as training does,
        without contrast.
        """
        sums = torch.zeros(7, dtype=torch.float64, device=self.world.device)
        for batch in batches:
            out: MicroLosses = self.root(self.spt.micro_losses, batch, 1, 1)
            weights = out.packed.weights.to(sums.dtype)
            tokens = weights * out.packed.response_tokens
            nll = out.nll.double()
            selected = nll.gather(0, out.scores.argmax(dim=0)[None])[0]
            best = nll.min(dim=0).values
            sums[:3] += out.parts
            sums[3:] += torch.stack([selected @ tokens, best @ tokens, tokens.sum(), weights.sum()])
        nll_sum, selection, fusion, selected_sum, best_sum, tokens_sum, examples = (
            dist.all_reduce_sum(sums).tolist()
        )
        factors = self.config.losses
        means = {
            "nll": nll_sum / tokens_sum,
            "selection": selection / examples,
            "fusion": fusion / examples,
        }
        return {
            "loss": (
                means["nll"]
                + factors.selection * means["selection"]
                + factors.fusion * means["fusion"]
            ),
            **means,
            "nll_selected": selected_sum / tokens_sum,
            "nll_best": best_sum / tokens_sum,
            "ppl_selected": math.exp(min(selected_sum / tokens_sum, 700.0)),
        }


def lr_factor(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Share of the learning rate at step `step` (from 0): linear warm-up, then cosine to 0 or
    constant.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    length = max(1, total_steps - optim.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * (step - optim.warmup_steps) / length))


def _optimizer(optim: OptimConfig, trainables: Trainables) -> torch.optim.AdamW:
    named = list(trainables.named_parameters())
    groups = [
        {
            "params": [p for name, p in named if name.startswith("bank.")],
            "base_lr": optim.prompts_lr or optim.lr,
        },
        {"params": [p for name, p in named if not name.startswith("bank.")], "base_lr": optim.lr},
    ]
    return torch.optim.AdamW(
        groups,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        foreach=True,
    )
