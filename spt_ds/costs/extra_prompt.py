"""What one prompt more in the bank costs: steps with K and with K + 1 prompts on the same base.

The two take turns. On a shared machine two runs one after the other differ by more than a prompt
costs.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from spt_ds.costs.meters import ForwardMeter, peak_bytes, reset_peak
from spt_ds.costs.random_bases import build, micro_batch
from spt_ds.costs.step import Stepper, config_of
from spt_ds.model.reference import functions_of
from spt_ds.model.spt import Spt, build_trainables

CASES = ("prefix", "suffix")


def measure(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Cost of a step of K prompts, and the share by which K + 1 prompts cost more.

    The share is the median over pairs of steps.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, spt = build(args.shape, config_of(case, prompts, args), device)
    config = config_of(case, prompts + 1, args)
    functions = functions_of(config.reference, pad_id=0)
    trainables = build_trainables(config, backbone, functions, [], seed=0)
    larger = Spt(config, trainables, functions)
    batch = micro_batch(args.data, args.tokenizer, args.batch, backbone.vocabulary, args.max_tokens)
    steppers = [Stepper(case, backbone, bank, batch, args) for bank in (spt, larger)]
    meter = ForwardMeter(backbone.lm.base_model, steppers[0].clock)
    reset_peak(device)
    pairs = [
        [sum(stepper.step(meter).values()) for stepper in steppers] for _ in range(args.steps + 1)
    ][1:]
    share = statistics.median((more - less) / less for less, more in pairs)
    return {
        "case": case,
        "prompts": prompts,
        "cost": statistics.median(less for less, _ in pairs),
        "cost_unit": steppers[0].clock.unit,
        "cost_of_one_more": statistics.median(more for _, more in pairs),
        "share_of_one_more": share,
        "peak_mib": peak_bytes(device) / 2**20,
    }
