"""Decoding over several prompts: each example once, beside the whole batch once per prompt.

A row-step is one row of one forward call of the base: what decoding costs, counted rather than
timed.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from spt_ds.batch import Batch
from spt_ds.config.generation import GenerateConfig
from spt_ds.config.load import load_config
from spt_ds.costs.meters import Clock, peak_bytes, reset_peak, timed
from spt_ds.costs.random_bases import build, micro_batch
from spt_ds.model.backbone import Backbone
from spt_ds.model.conversation import Endings
from spt_ds.model.decode import choose_prompts, decode
from spt_ds.model.spt import Spt

CASES = ("naive", "ours")
NO_END = 1 << 30  # an end-of-sequence id that no vocabulary holds: every reply has full length


class _RowSteps:
    """Counts the rows of every forward call of the first layer."""

    def __init__(self, backbone: Backbone) -> None:
        self.count = 0
        base: Any = backbone.lm.base_model
        getattr(base, "decoder", base).layers[0].register_forward_pre_hook(self._add)

    def _add(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.count += inputs[0].shape[0]


def measure(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens, row-steps, cost and peak memory of decoding `args.batch` examples."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    overrides = [
        f"prompts.count={prompts}",
        f"prompts.tokens={args.tokens}",
        f"model.base_bits={args.bits}",
    ]
    config = load_config("demo", [*overrides, "model.activation_checkpointing=off"])
    backbone, spt = build(args.shape, config, device)
    batch = micro_batch(args.data, args.tokenizer, args.batch, backbone.vocabulary, args.max_tokens)
    steps = _RowSteps(backbone)
    run = _once_per_prompt if case == "naive" else _each_once
    reset_peak(device)
    costs, tokens = timed(lambda: run(backbone, spt, batch, args.new_tokens), device, args.steps)
    return {
        "case": case,
        "prompts": prompts,
        "cost": statistics.median(costs),
        "cost_unit": Clock(device).unit,
        "row_steps": steps.count // (args.steps + 1),
        "examples_times_tokens": len(batch) * args.new_tokens,
        "peak_mib": peak_bytes(device) / 2**20,
        "tokens": tokens,
    }


def _decode(
    backbone: Backbone, spt: Spt, batch: Batch, mode: str, new_tokens: int
) -> tuple[list[list[int]], list[Any]]:
    # The prompt of each example is drawn: random weights would choose the same one for all.
    options = GenerateConfig(mode=mode, max_new_tokens=new_tokens)
    with torch.no_grad():
        out = backbone(decode, spt, batch, options, Endings((NO_END,), 0), False)
    return out.tokens, out.chosen


def _each_once(backbone: Backbone, spt: Spt, batch: Batch, new_tokens: int) -> list[list[int]]:
    return _decode(backbone, spt, batch, "random", new_tokens)[0]


def _once_per_prompt(
    backbone: Backbone, spt: Spt, batch: Batch, new_tokens: int
) -> list[list[int]]:
    chosen = choose_prompts(
        "random", torch.zeros(spt.config.prompts.count, len(batch)), batch.indices, 0
    )
    distinct = sorted({k for k in chosen if k is not None})
    whole = {k: _decode(backbone, spt, batch, f"fixed:{k}", new_tokens)[0] for k in distinct}
    return [whole[k][row] for row, k in enumerate(chosen) if k is not None]
