"""A training step at a given shape: base's forward, losses, backward and optimizer apart.

FLOPs are counted as 4N for each position that is read, N the weights of the layers: frozen weights
need the forward pass and the gradient of activations, none of weights. A context that is read
without gradient (suffix) counts 2N, a row of the vocabulary head 4VD. Attention is left out, and so
is what is computed a second time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from spt_ds.batch import Batch
from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.costs.meters import Clock, ForwardMeter, matmul_ceiling, peak_bytes, reset_peak
from spt_ds.costs.naive_step import naive_loss
from spt_ds.costs.random_bases import build, micro_batch
from spt_ds.model.backbone import Backbone, base_dtype
from spt_ds.model.spt import Spt
from spt_ds.placement.estimate import BaseShape, MicroBatch, needs_of

# precise is prefix in float64: it shows whose rounding a difference is. compiled is prefix too.
CASES = ("naive", "prefix", "suffix", "precise", "compiled")
DEFAULT = CASES[:3]
PARTS = ("forward", "losses", "backward", "optimizer")


def measure(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Losses, gradients, cost of each part, peak memory and throughput of one case.

    Beside the throughput is what matrix products reach on this device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_of(case, prompts, args)
    backbone, spt = build(args.shape, config, device)
    if case == "precise":
        backbone.double()
        spt.trainables.double()
    batch = micro_batch(args.data, args.tokenizer, args.batch, backbone.vocabulary, args.max_tokens)
    shape = BaseShape.from_config(backbone.config.to_dict())
    reads = Reads(case, batch, prompts, args)
    reset_peak(device)
    before = peak_bytes(device)
    stepper = Stepper(case, backbone, spt, batch, args)
    meter = ForwardMeter(backbone.lm.base_model, stepper.clock)
    rows = [stepper.step(meter) for _ in range(args.steps + 1)][1:]  # the first warms up
    peak = peak_bytes(device)
    parts = {name: statistics.median(row[name] for row in rows) for name in PARTS}
    cost = statistics.median(sum(row.values()) for row in rows)
    dtype = base_dtype(args.bits)
    ceiling = matmul_ceiling(device, dtype, min(reads.positions, 8192), shape.hidden, shape.ffn)
    tflop = reads.flops(shape) / 1e12
    return {
        "case": case,
        "prompts": prompts,
        "loss": stepper.loss.item(),
        "gradient": stepper.gradient().numpy(),
        "cost": cost,
        "cost_unit": stepper.clock.unit,
        "parts": parts,
        "peak_mib": peak / 2**20,
        "planned_mib": planned_bytes(config, shape, batch) / 2**20,
        "before_mib": before / 2**20,
        "tokens_read": reads.positions,
        "real_share": reads.real / reads.positions,
        "tflop": tflop,
        "tokens_per_cost": reads.real / cost,
        "examples_per_cost": len(batch) / cost,
        "tflop_per_cost": tflop / cost,
        "matmul_tflop_per_cost": ceiling,
        "share_of_matmul": tflop / cost / ceiling,
    }


def planned_bytes(config: Config, shape: BaseShape, batch: Batch) -> int:
    """What the plan counts for base, trainables and this micro-batch; not for the process."""
    largest = MicroBatch(len(batch), len(batch.context_ids), len(batch.response_ids))
    needs = needs_of(config, shape, 1, largest)
    recomputes = config.model.activation_checkpointing != "off"
    return needs.base + needs.trainables + (needs.recomputed if recomputes else needs.activations)


def config_of(
    case: str, prompts: int, args: argparse.Namespace, more: Sequence[str] = ()
) -> Config:
    """The settings of one case with so many prompts, with the overrides `more`."""
    # The reference always computes activations again in the backward pass.
    recompute = "non_reentrant" if case == "naive" else args.checkpointing
    return load_config(
        "demo",
        [
            f"prompts.count={prompts}",
            f"prompts.tokens={args.tokens}",
            f"prompts.position={'before_reply' if case == 'suffix' else 'before_text'}",
            f"model.base_bits={args.bits}",
            f"model.base_matmul={args.base_matmul}",
            f"model.compile={'on' if case == 'compiled' else 'off'}",
            f"model.attention={args.attention}",
            f"model.activation_checkpointing={recompute}",
            "losses.contrastive=0",
            *more,
        ],
    )


class Stepper:
    """Takes the same training step again and again.

    At a learning rate of 0 the optimizer does all of its work and moves nothing.
    """

    def __init__(
        self,
        case: str,
        backbone: Backbone,
        spt: Spt,
        batch: Batch,
        args: argparse.Namespace,
        shared: bool = False,
    ) -> None:
        """`shared` takes the steps of a warm start, in which all prompts are one."""
        self.shared = shared
        self.case, self.backbone, self.spt, self.batch, self.args = case, backbone, spt, batch, args
        self.clock = Clock(spt.trainables.bank.weight.device)
        self.optimizer = torch.optim.AdamW(spt.trainables.parameters(), lr=0.0, foreach=True)
        self.loss = torch.zeros(())

    def step(self, meter: ForwardMeter) -> dict[str, float]:
        """Cost of each part; `inside` watches the base."""
        self.optimizer.zero_grad()
        marks = [self.clock.now()]
        if self.case == "naive":
            self.loss = naive_loss(self.backbone, self.spt, self.batch, self.args.max_tokens)
        else:
            counts = (len(self.batch), len(self.batch.response_ids))
            losses = self.backbone(self.spt.micro_losses, self.batch, *counts, self.shared)
            self.loss = losses.total
        marks.append(self.clock.now())
        self.loss.backward()
        marks.append(self.clock.now())
        self.optimizer.step()
        marks.append(self.clock.now())
        whole, backward, update = (end - start for start, end in pairwise(marks))
        forward = meter.take()
        return dict(zip(PARTS, (forward, whole - forward, backward, update), strict=True))

    def gradient(self) -> torch.Tensor:
        """That of all trainables as one vector, float64."""
        grads = [
            p.grad.flatten().double().cpu()
            for p in self.spt.trainables.parameters()
            if p.grad is not None
        ]
        return torch.cat(grads)


class Reads:
    """What one step reads: positions of the base's layers and rows of the head."""

    def __init__(self, case: str, batch: Batch, prompts: int, args: argparse.Namespace) -> None:
        size, targets = len(batch), len(batch.response_ids)
        # The last target of each row is never read.
        branches = prompts * (size * args.tokens + targets - size)
        contexts = len(batch.context_ids)
        self.without_gradient, self.head_rows = 0, (prompts + 1) * targets
        self.real = self.positions = branches + prompts * contexts
        if case == "suffix":
            self.without_gradient = contexts
            self.real = self.positions = contexts + branches
        elif case == "naive":
            self.positions = prompts * size * (args.tokens + args.max_tokens)
            self.head_rows = self.positions

    def flops(self, shape: BaseShape) -> int:
        """See the module's docstring."""
        layers = shape.layers * shape.layer_parameters
        positions = 4 * self.positions - 2 * self.without_gradient
        return layers * positions + 4 * self.head_rows * shape.vocabulary * shape.embed
