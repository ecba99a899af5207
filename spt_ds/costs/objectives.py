"""What a step of each objective costs, beside one of the paper's objective on the same base.

The steps take turns. On a shared machine two runs one after the other differ by more than an
objective costs. The contrastive loss, which only the paper's objective has, is left out.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from spt_ds.costs.meters import ForwardMeter, peak_bytes, reset_peak
from spt_ds.costs.random_bases import build, micro_batch
from spt_ds.costs.step import Stepper, config_of
from spt_ds.model.spt import Spt, build_trainables

CASES = ("prefix", "suffix")
MIXTURE = (
    "losses.objective=mixture",
    "losses.selection=0",
    "losses.fusion=0",
    "retriever.keys=learned",
)


def measure(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Cost of a step of the paper's objective, and the share of it that the others cost.

    A share is the median over rounds, in which each objective takes one step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, spt = build(args.shape, config_of(case, prompts, args), device)
    config = config_of(case, prompts, args, MIXTURE)
    functions = spt.functions
    mixture = Spt(config, build_trainables(config, backbone, functions, [], seed=0), functions)
    batch = micro_batch(args.data, args.tokenizer, args.batch, backbone.vocabulary, args.max_tokens)
    steppers = {
        "paper": Stepper(case, backbone, spt, batch, args),
        "mixture": Stepper(case, backbone, mixture, batch, args),
        "warm start": Stepper(case, backbone, mixture, batch, args, shared=True),
    }
    meter = ForwardMeter(backbone.lm.base_model, steppers["paper"].clock)
    reset_peak(device)
    rounds = [
        {name: sum(stepper.step(meter).values()) for name, stepper in steppers.items()}
        for _ in range(args.steps + 1)
    ][1:]
    return {
        "case": case,
        "prompts": prompts,
        "cost": statistics.median(costs["paper"] for costs in rounds),
        "cost_unit": steppers["paper"].clock.unit,
        "share_of_paper": {
            name: statistics.median(costs[name] / costs["paper"] for costs in rounds)
            for name in steppers
        },
        "peak_mib": peak_bytes(device) / 2**20,
    }
