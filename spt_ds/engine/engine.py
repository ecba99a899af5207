"""Optimizer steps and validation that give the same numbers on any split into ranks.

Legend: K prompts, G examples of a step over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NoReturn

import torch

from spt_ds import dist
from spt_ds.batch import Batch, Window, on_device
from spt_ds.engine.optimizer import build_optimizer, set_lr
from spt_ds.engine.session import Session
from spt_ds.engine.step_sums import StepResult, StepSums
from spt_ds.errors import NonFiniteError
from spt_ds.model import losses
from spt_ds.model.spt import MicroLosses, Trainables

COUNTED = ("nll_selected", "nll_best", "tokens", "examples")


class Engine:
    """Takes optimizer steps on the trainables, which are whole and fp32 on every rank.

    Only the frozen base may be sharded. It is reached by calls of `backbone`, never of its
    children.
    """

    def __init__(self, session: Session) -> None:
        self.config = session.config
        self.world = session.world
        self.backbone = session.backbone
        self.spt = session.spt
        self.names = [name for name, _ in self.trainables.named_parameters()]
        parameters = list(self.trainables.parameters())
        for parameter in parameters:
            # Every rank has drawn the same numbers, up to what its math library rounds.
            dist.broadcast_(parameter.data)
        # Gradients and the step's sums are views into one buffer, so one reduction takes them all
        # and nothing is copied. This is why no gradient may ever be set to None.
        sizes = [parameter.numel() for parameter in parameters]
        counts = StepSums.length(self.config.prompts.count)
        self.buffer = torch.zeros(sum(sizes) + counts, device=self.world.device)
        self.gradients = self.buffer[:-counts]
        self.sums = StepSums(self.buffer[-counts:])
        for parameter, part in zip(parameters, self.gradients.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.optimizer = build_optimizer(self.config.optim, self.trainables)
        self._assert_rules()

    @property
    def trainables(self) -> Trainables:
        return self.spt.trainables

    def _assert_rules(self) -> None:
        """Our own invariants: what trains is fp32 and has a gradient, and nothing else has one."""
        trained = {id(parameter) for parameter in self.trainables.parameters()}
        for parameter in self.trainables.parameters():
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
        assert not any(p.requires_grad for p in self.backbone.parameters() if id(p) not in trained)
        assert {id(p) for g in self.optimizer.param_groups for p in g["params"]} == trained

    def train_window(
        self, window: Window, step: int, total_steps: int, signals: tuple[float, float]
    ) -> StepResult:
        """Take optimizer step `step` (from 0) of `total_steps`.

        `signals` are this rank's requests (stop, save), 1.0 where there is one.

        Losses are divided by the target tokens and examples of the whole step over all ranks, so
        the result does not depend on the split into ranks and micro-batches. Raises NonFiniteError
        on every rank, before the optimizer moves, when any rank's loss or gradient is NaN or
        infinite.
        """
        # Backward passes add into views of the buffer: to zero it is to zero every gradient.
        self.buffer.zero_()
        settings = self.config.prompts
        shared = step < settings.warm_start_steps
        if settings.warm_start_steps and step == settings.warm_start_steps:
            self.trainables.part_ways(self.config.train.seed)
        outs = [self._forward_backward(batch, window, shared) for batch in window.micro]
        if not shared:
            self._contrast(window, outs)
            self._balance(window, outs)
        self.sums.signals.add_(on_device(signals, self.buffer.device, self.buffer.dtype))
        dist.all_reduce_sum(self.buffer)
        norm = self.gradients.norm()
        # The one place of a step where the host waits for the device.
        totals = torch.cat([norm[None], self.sums.values]).cpu()
        if not torch.isfinite(totals).all():
            self._raise_non_finite(step, window, outs)
        if self.config.optim.clip_norm:
            # The norm is that of the whole step over all ranks, so every rank clips alike.
            self.gradients.mul_((self.config.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        if shared:
            self.trainables.tie_gradients()
        lr = set_lr(self.optimizer, self.config.optim, step, total_steps)
        self.optimizer.step()
        sums = StepSums(totals[1:])
        return StepResult.of(sums, self.config.losses, totals[0].item(), lr, shared)

    def _forward_backward(self, batch: Batch, window: Window, shared: bool) -> MicroLosses:
        out: MicroLosses = self.backbone(
            self.spt.micro_losses, batch, window.examples, window.target_tokens, shared
        )
        out.total.backward()
        self.sums.add(out)
        # A graph that is spent still holds its layouts, and they the keys of all contexts.
        return replace(out, total=out.total.detach())

    def _contrast(self, window: Window, outs: list[MicroLosses]) -> None:
        """Add the contrastive loss, whose pairs run across micro-batches and ranks.

        It needs scores and pooled contexts alone, so no second pass through the base.
        """
        weight = self.config.losses.contrastive
        if not weight or window.contrast is None:
            return
        # Scores of other ranks come without a graph: each rank makes the gradient of its own side
        # of a pair, and the reduction adds both sides.
        everyone = dist.all_gather(torch.cat([out.scores for out in outs], dim=1))
        pooled = torch.cat([out.pooled for out in outs])
        loss, share = self.spt.contrastive(pooled, everyone, window.contrast, self.world.rank)
        (weight * loss).backward()
        self.sums.losses[len(losses.factors(self.config.losses)) - 1] += share

    def _balance(self, window: Window, outs: list[MicroLosses]) -> None:
        """Add the balance loss of a mixture, which is a function of a mean over the whole window.

        As the contrastive loss it makes no pass through the base.
        """
        weight = self.config.losses.balance
        if not weight:
            return
        pooled = torch.cat([out.pooled for out in outs])
        weights = torch.cat([out.packed.weights for out in outs])
        own = self.spt.mean_weights(pooled, weights, window.examples)
        # The other ranks' part comes without a graph: each rank makes the gradient of its own
        # contexts, and the reduction adds them.
        everyone = dist.all_reduce_sum(own.detach().clone())
        loss = losses.balance(own + (everyone - own.detach()))
        (weight * loss).backward()
        last = len(losses.factors(self.config.losses)) - 1
        # Every rank has the same loss, and the reduction adds them up.
        self.sums.losses[last] += loss.detach() / self.world.size

    def _raise_non_finite(self, step: int, window: Window, outs: list[MicroLosses]) -> NoReturn:
        bad: list[int] = []
        for batch, out in zip(window.micro, outs, strict=True):
            wrong = (out.bad > 0) | ~torch.isfinite(out.scores).all(dim=0)  # [B]
            bad += [batch.indices[row] for row in wrong.nonzero().flatten().tolist()]
        # A collective is safe here: the sums are the same on all ranks, so all of them are here.
        by_rank = [
            f"rank {rank}: examples {rows}"
            for rank, rows in enumerate(dist.gather_json(bad))
            if rows
        ]
        raise NonFiniteError(
            f"step {step + 1}: a loss or gradient is NaN or infinite"
            f" ({'; '.join(by_rank) or 'in the gradient only'}). The optimizer did"
            " not move; the last checkpoint is good. Lower optim.lr, or look at those examples of"
            " data.train"
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean losses over a data set, each example once.

        `loss` weights them as training does, without the one that is of a whole window.
        """
        settings = self.config.losses
        names = [*list(losses.factors(settings))[:-1], *COUNTED]
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.world.device)
        for batch in batches:
            # Divided by 1: the counts of the whole set are known at the end only.
            out: MicroLosses = self.backbone(self.spt.micro_losses, batch, 1, 1)
            weights = out.packed.weights.to(sums.dtype)  # [B], 0 for a filler
            tokens = weights * out.packed.response_tokens  # [B]
            # Weighted by tokens, not by examples: the mean of per-example means is another number.
            nll = out.nll.double()  # [K, B]
            selected = nll.gather(0, out.scores.argmax(dim=0)[None])[0]
            best = nll.min(dim=0).values
            means = torch.stack([selected @ tokens, best @ tokens, tokens.sum(), weights.sum()])
            sums += torch.cat([out.parts, means])
        total = dict(zip(names, dist.all_reduce_sum(sums).tolist(), strict=True))
        values = {
            name: total[name] / total["tokens" if name in losses.PER_TOKEN else "examples"]
            for name in names[: -len(COUNTED)]
        }
        loss = sum(losses.factors(settings)[name] * value for name, value in values.items())
        selected_nll = total["nll_selected"] / total["tokens"]
        return {
            "loss": loss,
            **values,
            "nll_selected": selected_nll,
            "nll_best": total["nll_best"] / total["tokens"],
            "ppl_selected": math.exp(min(selected_nll, 700.0)),
        }
