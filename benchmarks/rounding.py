"""How far a real base in 16 bits is from itself in fp32: start-up check, nll, gradient, head.

    python benchmarks/rounding.py runs/real-base/smollm2-135m [--placement suffix] [--examples 4]

For each way to compute the head (logits rounded to bf16, as up to 0.1.0; fp32 logits) it prints the
error of nll between prompts in nats a token: rms over prompts and examples, each example's mean
over the prompts taken out. It also prints the spread over prompts, which selection learns from, and
the error of the gradient to the prompts. `head` starts from the exact head on the same hidden
states, `all` from the same bf16 weights with everything in fp32. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any
from unittest import mock

import torch

from spt_ds.batch import Batch
from spt_ds.config.load import load_config
from spt_ds.costs.random_bases import micro_batch
from spt_ds.model import head
from spt_ds.model.backbone import Backbone, build_backbone
from spt_ds.model.base_check import check_base
from spt_ds.model.loading import load_base_config
from spt_ds.model.reference import functions_of
from spt_ds.model.spt import Spt, build_trainables

CPU = torch.device("cpu")
POSITIONS = {"prefix": "before_text", "suffix": "before_reply"}


def exact(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`head.product` in float64."""
    return out.copy_(rows.double() @ weight.double().T)


def rounded(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`head.product` as a plain product of 16-bit matrices."""
    return out.copy_(torch.mm(rows, weight.T))


def step(backbone: Backbone, spt: Spt, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, float]:
    """nll [K, B] and the gradient of L_nll to the prompts, float64; CPU seconds in the head."""
    seconds = 0.0
    right = backbone.head

    def timed(*args: Any) -> torch.Tensor:
        nonlocal seconds
        start = time.process_time()
        out: torch.Tensor = right(*args)
        seconds += time.process_time() - start
        return out

    spt.trainables.zero_grad()
    with mock.patch.object(backbone, "head", timed):
        out = backbone(spt.micro_losses, batch, len(batch), len(batch.response_ids))
    out.total.backward()
    grad = spt.trainables.bank.weight.grad
    assert grad is not None
    return out.nll.double(), grad.double().clone(), seconds


def between(nll: torch.Tensor) -> torch.Tensor:
    """nll [K, B] without each example's mean over the prompts."""
    return nll - nll.mean(dim=0, keepdim=True)


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="folder of the base")
    parser.add_argument("--placement", choices=("prefix", "suffix"), default="suffix")
    parser.add_argument("--examples", type=int, default=4, help="dialogues of the shipped set")
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()
    config = load_config(
        "demo",
        [
            f"model.base={args.base}",
            "model.base_bits=16",
            f"prompts.position={POSITIONS[args.placement]}",
            "losses.selection=0",
            "losses.fusion=0",
            "losses.contrastive=0",
        ],
    )
    backbone = build_backbone(config.model, load_base_config(config.model), CPU, strict=False)
    functions = functions_of(config.reference, pad_id=0)
    spt = Spt(config, build_trainables(config, backbone, functions, [], seed=0), functions)
    batch = micro_batch(
        "embedded:valid", args.base, args.examples, backbone.vocabulary, args.max_tokens
    )
    rows: dict[str, Any] = {"check": check_base(backbone, suffix=args.placement == "suffix")}
    ways = {"bf16 logits": rounded, "fp32 logits": head.product, "exact": exact}
    seen = {}
    for name, way in ways.items():
        with mock.patch.object(head, "product", way):
            seen[name] = step(backbone, spt, batch)
    right = {"head": seen.pop("exact")[:2]}
    backbone.float()
    right["all"] = step(backbone, spt, batch)[:2]
    rows["spread_nats"] = rms(between(right["all"][0]))
    for name, (own_nll, own_grad, seconds) in seen.items():
        rows[name] = {"head_cpu_s": round(seconds, 2)}
        for part, (nll, grad) in right.items():
            rows[name][f"{part}: between_prompts_nats"] = rms(between(own_nll) - between(nll))
            rows[name][f"{part}: gradient"] = float((own_grad - grad).norm() / grad.norm())
        print(f"{name}: {rows[name]}")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
