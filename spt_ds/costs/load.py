"""What happens before the first step: reading the base and proving it usable, and tokenising."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from spt_ds.config.model import ModelConfig
from spt_ds.costs.meters import Clock, peak_bytes, reset_peak, timed
from spt_ds.costs.random_bases import SHAPES
from spt_ds.data.encode import encode_many
from spt_ds.data.readers import read
from spt_ds.model.backbone import base_dtype, build_backbone
from spt_ds.model.loading import load_base_config, load_tokenizer, new_lm

CASES = ("base", "data")


def measure(case: str, prompts: int, args: argparse.Namespace) -> dict[str, Any]:
    """Cost, memory above that before, and MiB or examples per unit of cost."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    costs, amount, unit, peak = (_base if case == "base" else _data)(args, device)
    cost = statistics.median(costs)
    return {
        "case": case,
        "prompts": prompts,
        "cost": cost,
        "cost_unit": Clock(device).unit,
        "peak_mib": peak / 2**20,
        "per_cost": amount / cost,
        "per_cost_unit": f"{unit} per {Clock(device).unit}",
    }


def _base(args: argparse.Namespace, device: torch.device) -> tuple[list[float], float, str, int]:
    """Random weights of the shape, written to a folder and read from it as a run reads them."""
    with tempfile.TemporaryDirectory() as folder:
        lm = new_lm(SHAPES[args.shape](), base_dtype(args.bits))
        lm.save_pretrained(folder)
        del lm
        weights = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        config = ModelConfig(base=folder, base_bits=args.bits, attention=args.attention)
        reset_peak(device)
        before = peak_bytes(device)

        def load() -> None:
            base = load_base_config(config)
            backbone = build_backbone(config, base, device, strict=False)
            backbone.to(device)(lambda inner: inner.check())

        costs, _ = timed(load, device, args.steps)
        return costs, weights / 2**20, "MiB", peak_bytes(device) - before


def _data(args: argparse.Namespace, device: torch.device) -> tuple[list[float], float, str, int]:
    tokenizer = load_tokenizer(ModelConfig(base=args.tokenizer))
    dialogues = list(islice(read(args.data, "auto"), args.examples))
    reset_peak(device)
    before = peak_bytes(device)
    costs, encoded = timed(
        lambda: len(list(encode_many(dialogues, tokenizer, args.max_tokens))), device, args.steps
    )
    return costs, encoded, "examples", peak_bytes(device) - before
