"""What another bank costs on the same base: one of a prompt more, and those of other objectives.

The steps of all banks take turns. On a shared machine two runs one after the other differ by more
than a prompt or an objective costs. The contrastive loss, which only the paper's objective has, is
left out.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from spt_ds.config.schema import Config
from spt_ds.costs.meters import ForwardMeter, peak_bytes, reset_peak
from spt_ds.costs.random_bases import build, micro_batch
from spt_ds.costs.step import Stepper, config_of
from spt_ds.model.backbone import Backbone
from spt_ds.model.reference import functions_of
from spt_ds.model.spt import Spt, build_trainables

CASES = ("prefix", "suffix")
MIXTURE = (
    "losses.objective=mixture",
    "losses.selection=0",
    "losses.fusion=0",
    "retriever.keys=learned",
)


def measure_more(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Cost of a step of K prompts, and the share by which K + 1 prompts cost more."""
    backbone, spt = build(args.shape, config_of(case, prompts, args), _device())
    larger = _bank(config_of(case, prompts + 1, args), backbone)
    rounds, measured = _take_turns(
        case, prompts, args, backbone, {"own": (spt, False), "larger": (larger, False)}
    )
    return {
        **measured,
        "cost_of_one_more": statistics.median(costs["larger"] for costs in rounds),
        "share_of_one_more": statistics.median(
            (costs["larger"] - costs["own"]) / costs["own"] for costs in rounds
        ),
    }


def measure_objectives(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Cost of a step of the paper's objective, and the share of it that the others cost."""
    backbone, spt = build(args.shape, config_of(case, prompts, args), _device())
    mixture = _bank(config_of(case, prompts, args, MIXTURE), backbone)
    banks = {"paper": (spt, False), "mixture": (mixture, False), "warm start": (mixture, True)}
    rounds, measured = _take_turns(case, prompts, args, backbone, banks)
    shares = {
        name: statistics.median(costs[name] / costs["paper"] for costs in rounds) for name in banks
    }
    return {**measured, "share_of_paper": shares}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bank(config: Config, backbone: Backbone) -> Spt:
    functions = functions_of(config.reference, pad_id=0)
    return Spt(config, build_trainables(config, backbone, functions, [], seed=0), functions)


def _take_turns(
    case: str,
    prompts: int,
    args: argparse.Namespace,
    backbone: Backbone,
    banks: dict[str, tuple[Spt, bool]],
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Costs of the steps of each round by the name of the bank, and what is reported of the first.

    A bank comes with whether its prompts are one still. Shares are medians over rounds, in which
    each bank takes one step.
    """
    device = _device()
    batch = micro_batch(args.data, args.tokenizer, args.batch, backbone.vocabulary, args.max_tokens)
    steppers = {
        name: Stepper(case, backbone, spt, batch, args, shared=shared)
        for name, (spt, shared) in banks.items()
    }
    first = next(iter(steppers))
    meter = ForwardMeter(backbone.lm.base_model, steppers[first].clock)
    reset_peak(device)
    rounds = [
        {name: sum(stepper.step(meter).values()) for name, stepper in steppers.items()}
        for _ in range(args.steps + 1)
    ][1:]  # the first warms up
    return rounds, {
        "case": case,
        "prompts": prompts,
        "cost": statistics.median(costs[first] for costs in rounds),
        "cost_unit": steppers[first].clock.unit,
        "peak_mib": peak_bytes(device) / 2**20,
    }
