"""A training step (forward, losses, backward) of one case at a given shape.

FLOPs are counted as 4N per token: frozen weights need the forward pass and the gradient of activations, none of
weights. Attention is left out.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from spt_ds.bench.measuring import peak_bytes, reset_peak, timed
from spt_ds.bench.naive import naive_loss
from spt_ds.bench.shapes import build, micro_batch
from spt_ds.config.load import load_config
from spt_ds.model.spt import Counts

CASES = ("naive", "prefix", "suffix")


def measure(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Losses, gradient norms, cost and peak memory of one case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    overrides = [f"prompts.count={prompts}", f"prompts.tokens={args.tokens}", f"model.base_bits={args.bits}"]
    overrides += [
        f"prompts.placement={'suffix' if case == 'suffix' else 'prefix'}",
        f"model.attention={args.attention}",
    ]
    recompute = "non_reentrant" if case == "naive" else args.checkpointing
    overrides += [f"model.activation_checkpointing={recompute}", "losses.contrastive=0"]
    config = load_config("demo", overrides)
    backbone, spt = build(args.shape, config, device)
    batch = micro_batch(args.data, args.tokenizer, args.batch, backbone.vocabulary, args.max_tokens)
    counts = Counts(len(batch), len(batch.response_ids))

    def step() -> torch.Tensor:
        if case == "naive":
            loss = naive_loss(backbone, spt, batch, args.max_tokens)
        else:
            loss = backbone(spt.micro_losses, batch, counts).total
        spt.trainables.zero_grad()
        loss.backward()
        return loss.detach()

    reset_peak(device)
    before = peak_bytes(device)
    costs, loss = timed(step, device, args.steps)
    unit = "CPU s" if device.type == "cpu" else "s"
    lens = batch.context_lens, batch.response_lens
    weights = sum(p.numel() for name, p in backbone.named_parameters() if "embed" not in name)
    tokens = tokens_read(case, *lens, prompts, args)
    cost = statistics.median(costs)
    return {
        "case": case, "prompts": prompts, "loss": float(loss), "cost": cost, "cost_unit": unit,
        "peak_mib": peak_bytes(device) / 2**20, "before_mib": before / 2**20, "tokens_read": tokens,
        "real_share": 1.0 if case != "naive" else real_tokens(*lens, prompts, args) / tokens,
        "tflops": 4 * weights * tokens / 1e12, "tokens_per_cost": tokens / cost,
        "gradient": {n: float(p.grad.norm()) for n, p in spt.trainables.named_parameters() if p.grad is not None},
    }  # fmt: skip


def real_tokens(contexts: tuple[int, ...], responses: tuple[int, ...], prompts: int, args: argparse.Namespace) -> int:
    return prompts * sum(args.tokens + c + r for c, r in zip(contexts, responses, strict=True))


def tokens_read(case: str, contexts: tuple[int, ...], responses: tuple[int, ...], prompts: int, args: Any) -> int:
    """Positions that the base's layers see in one forward pass."""
    if case == "naive":
        return prompts * args.batch * (args.tokens + args.max_tokens)
    last = len(responses)  # the last target of each row is never read
    if case == "prefix":
        return real_tokens(contexts, responses, prompts, args) - prompts * last
    return sum(contexts) + prompts * (sum(args.tokens + r for r in responses) - last)
