"""Training by several processes of one thread each that share out the micro-batches of a step.

A worker takes the next micro-batch as soon as it is free, so on a machine that others use too a
slow core delays nobody by more than one micro-batch. Weights and gradients lie in shared memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.embedded_base.batches import Packer
from benchmarks.embedded_base.network import Shape, weighted_loss
from spt_ds.log import get_logger

_PATIENCE_S = 1800  # a worker that is that late at the end of a step is dead


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn."""

    tokens: int  # of the whole run
    micro_batches: int  # of a step
    matrix_rate: float  # peak learning rate of Muon, for the matrices of the layers
    other_rate: float  # peak learning rate of AdamW, for embeddings and norms
    warmup_tokens: int
    decay_share: float  # of `tokens`, at the end: down to zero
    weight_decay: float
    log_every: int  # steps
    save_minutes: float

    def rate(self, tokens: int) -> float:
        """Return the share of the peak learning rates after `tokens`, 0 to 1."""
        rise = (tokens + 1) / max(1, self.warmup_tokens)
        fall = (self.tokens - tokens) / max(1.0, self.decay_share * self.tokens)
        return max(0.0, min(1.0, rise, fall))


@dataclass
class Progress:
    """What a resumed run starts from."""

    step: int = 0
    tokens: int = 0  # targets seen, padding not counted
    elapsed_s: float = 0.0


@dataclass
class Shared:
    """What the workers have in common."""

    weights: dict[str, Tensor]  # fp32
    momentum: dict[str, Tensor]  # fp32, Muon's, of each matrix of a layer
    gradients: list[dict[str, Tensor]]  # fp32, per worker
    sums: Tensor  # [workers, 3] float64: weighted nats, importance, tokens of this step
    ticket: Any = field(default_factory=lambda: mp.get_context("spawn").Value("q", 0))
    barrier: Any = None

    @classmethod
    def of(cls, weights: dict[str, Tensor], momentum: dict[str, Tensor], workers: int) -> Shared:
        """Return shared copies of `weights` and `momentum` and empty gradients."""
        return cls(
            {name: value.clone().share_memory_() for name, value in weights.items()},
            {
                name: momentum.get(name, torch.zeros_like(value)).clone().share_memory_()
                for name, value in weights.items()
                if is_matrix(name)
            },
            [
                {name: torch.zeros_like(value).share_memory_() for name, value in weights.items()}
                for _ in range(workers)
            ],
            torch.zeros(workers, 3, dtype=torch.float64).share_memory_(),
            barrier=mp.get_context("spawn").Barrier(workers),
        )


def is_matrix(name: str) -> bool:
    """Return whether Muon moves this weight: it moves the matrices of the layers."""
    return name.endswith(("qkv", "out", "gate_up", "down"))


class Mover:
    """Moves one worker's share of the weights: matrices by Muon, in worker 0 the rest by AdamW."""

    def __init__(self, rank: int, shared: Shared, plan: Plan) -> None:
        self._shared = shared
        by_size = sorted(shared.momentum, key=lambda name: (-shared.weights[name].numel(), name))
        matrices = by_size[rank :: len(shared.gradients)]
        self._parts: list[tuple[torch.optim.Optimizer, float]] = []
        self._names = list(matrices)
        if matrices:
            muon = torch.optim.Muon(
                [shared.weights[name] for name in matrices],
                lr=1.0,
                weight_decay=plan.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            for name in matrices:  # in shared memory, so that worker 0 can save it
                muon.state[shared.weights[name]]["momentum_buffer"] = shared.momentum[name]
            self._parts.append((muon, plan.matrix_rate))
        self.adamw: torch.optim.AdamW | None = None
        if rank == 0:
            norms = [name for name in shared.weights if name != "embed" and not is_matrix(name)]
            self.adamw = torch.optim.AdamW(
                [
                    {"params": [shared.weights["embed"]], "weight_decay": plan.weight_decay},
                    {"params": [shared.weights[name] for name in norms], "weight_decay": 0.0},
                ],
                betas=(0.9, 0.95),
            )
            self._parts.append((self.adamw, plan.other_rate))
            self._names += ["embed", *norms]

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Move this worker's weights at `share` of the peak learning rates."""
        total = float(self._shared.sums[:, 1].sum())
        for name in self._names:
            gradients = torch.stack([part[name] for part in self._shared.gradients])
            self._shared.weights[name].grad = gradients.sum(0) / total
        for part, rate in self._parts:
            for group in part.param_groups:
                group["lr"] = rate * share
            part.step()


def work(
    rank: int,
    shared: Shared,
    shape: Shape,
    plan: Plan,
    packer: Packer,
    state: Path,
    resume: bool,
) -> None:
    """Body of one worker; worker 0 also saves."""
    # A session of its own: Linux shares out a core by session, and a worker is to count as one.
    os.setsid()
    torch.set_num_threads(1)
    compiled = torch.compile(weighted_loss, dynamic=False)
    progress, mover = Progress(), Mover(rank, shared, plan)
    if resume:
        saved = torch.load(state, weights_only=True)
        progress = Progress(**saved["progress"])
        if mover.adamw is not None:
            mover.adamw.load_state_dict(saved["adamw"])
    begun, saved_s, shown = time.monotonic() - progress.elapsed_s, progress.elapsed_s, progress
    nats = torch.zeros(2, dtype=torch.float64)
    while progress.tokens < plan.tokens:
        _micro_batches(rank, shared, shape, plan, packer, compiled, progress.step)
        shared.barrier.wait(_PATIENCE_S)
        mover.step(plan.rate(progress.tokens))
        totals = shared.sums.sum(0)
        progress = Progress(
            progress.step + 1, progress.tokens + int(totals[2]), time.monotonic() - begun
        )
        nats += totals[:2]
        shared.barrier.wait(_PATIENCE_S)  # nobody resets its sums before all have read them
        if rank == 0 and progress.step % plan.log_every == 0:
            _log(progress, shown, nats, plan)
            nats, shown = torch.zeros_like(nats), progress
        over = progress.tokens >= plan.tokens
        if mover.adamw and (over or progress.elapsed_s - saved_s > 60 * plan.save_minutes):
            save(state, shared, mover.adamw, progress)
            saved_s = progress.elapsed_s


def _micro_batches(
    rank: int,
    shared: Shared,
    shape: Shape,
    plan: Plan,
    packer: Packer,
    compiled: Callable[..., Tensor],
    step: int,
) -> None:
    """Compute micro-batches of `step` until none is left; sums go to this worker's places."""
    weights = {name: v.bfloat16().requires_grad_() for name, v in shared.weights.items()}
    gradients, sums = shared.gradients[rank], shared.sums[rank]
    for value in gradients.values():
        value.zero_()
    sums.zero_()
    while True:
        with shared.ticket.get_lock():
            number = shared.ticket.value
            if number >= (step + 1) * plan.micro_batches:
                return
            shared.ticket.value = max(number, step * plan.micro_batches) + 1
            number = shared.ticket.value - 1
        rows, importance = packer.micro_batch(number)
        loss = compiled(weights, rows, importance, shape)
        loss.backward()
        # bf16 gradients of one micro-batch are added up in fp32.
        for name, value in weights.items():
            assert value.grad is not None
            gradients[name] += value.grad
            value.grad = None
        sums += torch.tensor(
            [loss.item(), float(importance.sum()), float((rows[:, 1:] != 0).sum())],
            dtype=torch.float64,
        )


def save(path: Path, shared: Shared, adamw: torch.optim.AdamW, progress: Progress) -> None:
    """Write the state whole or not at all."""
    state = {
        "weights": {name: value.detach().clone() for name, value in shared.weights.items()},
        "momentum": {name: value.clone() for name, value in shared.momentum.items()},
        "adamw": adamw.state_dict(),
        "progress": asdict(progress),
    }
    draft = path.with_suffix(".tmp")
    torch.save(state, draft)
    os.replace(draft, path)


def _log(progress: Progress, before: Progress, nats: Tensor, plan: Plan) -> None:
    speed = (progress.tokens - before.tokens) / max(1e-9, progress.elapsed_s - before.elapsed_s)
    get_logger().info(
        "step %d, %.2f M tokens, loss %.3f, rate %.2f, %.0f tokens/s",
        progress.step,
        progress.tokens / 1e6,
        float(nats[0] / nats[1]),
        plan.rate(progress.tokens),
        speed,
    )
