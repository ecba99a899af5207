"""One call on a new machine: is everything right on its GPU, and how fast is it.

    python benchmarks/gpu.py

First the checks, each in a process of its own: every attention kernel against plain attention in
fp32, 4-bit and 8-bit layers against their dequantised weights, ZeRO-3, host offload and a resumed
run against a plain run. Then one training step (forward, losses, backward, optimizer) of random
weights at several shapes and widths: tokens/s and peak memory. Without a GPU the same runs on the
CPU at a tiny shape. The last line is one JSON object, the exit code is 1 when a check or a step
failed, or when `--budget-s` was spent before all was done.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spt_ds.batch import Batch
from spt_ds.config.load import load_config
from spt_ds.config.schema import Config
from spt_ds.costs.random_bases import build, micro_batch
from spt_ds.errors import SptError
from spt_ds.model.attention import choose_backend
from spt_ds.model.backbone import Backbone
from spt_ds.model.spt import Spt

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TIMINGS = (
    "opt-1.3b:16,llama-7b:16,llama-7b:8,llama-7b:4,llama-70b:4" if GPU else "tiny:16,tiny:8,tiny:4"
)
KERNELS = ("flash", "varlen", "sdpa")
ROUNDING = 4.0  # times plain attention's own distance from fp32, in the same 16 bits
SAME_WEIGHTS = 1e-2  # relative; one kernel or another multiplies the same bf16 numbers
SAME_RUN = 5e-3  # relative; a GPU adds in another order each time
RUN = (
    "train.max_steps=4",
    "train.global_batch=4",
    "train.micro_batch=2",
    "data.max_train_examples=64",
    "data.max_valid_examples=8",
    "checkpoint.every_steps=2",
    "model.base_bits=4",
    "data.workers=0",
)
FILES = Path(__file__).parents[1] / "ds_configs"


def settings(placement: str, bits: int, attention: str = "sdpa") -> Config:
    """A tiny step without the contrastive loss, which takes no pass through the base."""
    position = {"prefix": "before_text", "suffix": "before_reply"}[placement]
    overrides = [
        f"prompts.position={position}",
        f"model.base_bits={bits}",
        f"model.attention={attention}",
    ]
    return load_config(
        "demo", [*overrides, "model.activation_checkpointing=off", "losses.contrastive=0"]
    )


def some_batch(backbone: Backbone) -> Batch:
    """Three real dialogues."""
    return micro_batch("embedded:valid", "embedded", 3, backbone.vocabulary, 256)


def gradients(backbone: Backbone, spt: Spt) -> list[torch.Tensor]:
    """Those of the trainables, float64 on the CPU."""
    batch = some_batch(backbone)
    spt.trainables.zero_grad()
    total = backbone(spt.micro_losses, batch, len(batch), len(batch.response_ids)).total
    total.backward()
    return [p.grad.double().cpu() for p in spt.trainables.parameters() if p.grad is not None]


def distance(got: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Relative, in the 2-norm, of the worst trainable; NaN where one is."""
    gaps = [(mine - theirs).norm() / theirs.norm() for mine, theirs in zip(got, right, strict=True)]
    return float(torch.stack(gaps).max())


def check_attention() -> dict[str, Any]:
    """Each kernel at most `ROUNDING` times as far from fp32 as plain attention in bf16."""
    outcome: dict[str, Any] = {"passed": True}
    for placement in ("prefix", "suffix"):
        backbone, spt = build("tiny", settings(placement, 16, "eager"), DEVICE)
        plain = gradients(backbone, spt)
        backbone.float()
        right = gradients(backbone, spt)
        unit = distance(plain, right)
        outcome[f"eager, {placement}"] = unit
        for kernel in KERNELS:
            if choose_backend(kernel, DEVICE, torch.bfloat16, strict=False) != kernel:
                outcome[f"{kernel}, {placement}"] = "not usable here"
                continue
            gap = distance(
                gradients(*build("tiny", settings(placement, 16, kernel), DEVICE)), right
            )
            outcome[f"{kernel}, {placement}"] = gap
            outcome["passed"] &= gap <= ROUNDING * unit
    return outcome


def check_quantised() -> dict[str, Any]:
    """Gradients through 4-bit and 8-bit layers, and through plain layers that hold the dequantised
    weights.
    """
    outcome: dict[str, Any] = {"passed": True}
    for bits in (4, 8):
        backbone, spt = build("tiny", settings("prefix", bits), DEVICE)
        backbone.check_quantised = True
        backbone.check()  # raises and names the layer
        got = gradients(backbone, spt)
        gap = distance(got, gradients(with_plain_layers(backbone), spt))
        outcome[f"{bits} bits"] = gap
        outcome["passed"] &= gap <= SAME_WEIGHTS
    return outcome


def with_plain_layers(backbone: Backbone) -> Backbone:
    """Put `nn.Linear` of the dequantised weight in the place of each quantised layer."""
    from spt_ds.model.quant import QuantLinear

    for name, layer in list(backbone.lm.named_modules()):
        if isinstance(layer, QuantLinear):
            plain = nn.Linear(
                layer.in_features,
                layer.out_features,
                bias=False,
                device=DEVICE,
                dtype=torch.bfloat16,
            )
            plain.weight.data = layer.dequantised(torch.bfloat16)
            plain.bias = layer.bias  # type: ignore[assignment]  # may be None
            backbone.lm.set_submodule(name, plain.requires_grad_(False))
    return backbone


def check_runs() -> dict[str, Any]:
    """Whole runs over a 4-bit base: under ZeRO-3, with shards in host memory, and resumed, all end
    as a plain one.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        right = train(plain)
        outcome: dict[str, Any] = {"plain run ends at": right}
        for file in ("zero3.json", "zero3_offload_cpu.json"):
            outcome[file] = (
                train(Path(folder) / file, "--deepspeed_config", str(FILES / file)) / right - 1
            )
        saved = sorted(path.name for path in (plain / "checkpoints").glob("step-*"))
        shutil.rmtree(plain / "checkpoints" / saved.pop())
        (plain / "DONE.json").unlink()
        outcome[f"resumed from {saved[-1]}"] = train(plain) / right - 1
    gaps = [value for key, value in outcome.items() if key != "plain run ends at"]
    return {"passed": all(abs(gap) <= SAME_RUN for gap in gaps), **outcome}


def train(out: Path, *more: str) -> float:
    """One short run over the embedded base; its last validation loss."""
    options = [word for setting in RUN for word in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "spt_ds.train",
        "--config",
        "demo",
        "--run-dir",
        str(out),
        *options,
        *more,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    done = json.loads((out / "DONE.json").read_text(encoding="utf-8"))
    return float(done["valid_after"]["loss"])


CHECKS = {"attention": check_attention, "quantised": check_quantised, "runs": check_runs}


def last_json(command: list[str], deadline: float) -> dict[str, Any]:
    """Run `command` and read its last line; {"error": ...} when it fails, or when no time is left
    for it.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        return {"error": "not run: the time is spent"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        return {"error": "stopped: the time is spent"}
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return {
            "error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        }
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def step_time(shape: str, bits: str, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """What `spt-ds bench step` measures for our prefix step."""
    command = [
        sys.executable,
        "-m",
        "spt_ds.cli",
        "bench",
        "step",
        "--cases",
        "prefix",
        "--shape",
        shape,
    ]
    command += ["--bits", bits, "--batch", str(args.batch), "--steps", str(args.steps)]
    command += ["--checkpointing", "non_reentrant", "--max-tokens", str(args.max_tokens)]
    report = last_json(command, deadline)
    measured = report["results"][0] if "results" in report else report
    return {"shape": shape, "bits": int(bits), **measured}


def show(row: dict[str, Any]) -> str:
    """One line of the table of steps."""
    start = f"{row['shape']:<10} {row['bits']:>2} bits"
    if "error" in row:
        return f"{start}  {row['error']}"
    cost = f"{row['cost']:>9.3f} {row['cost_unit']}  {row['tokens_per_cost']:>9.0f} tokens/s"
    return f"{start} {cost}  peak {row['peak_mib'] / 1024:>7.2f} GiB  loss {row['loss']:.4f}"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import bitsandbytes
    import deepspeed
    import transformers

    return {
        "device": torch.cuda.get_device_name() if GPU else "CPU",
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "date": date.today().isoformat(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--timings", default=TIMINGS, help=f"SHAPE:BITS, comma-separated (default {TIMINGS})"
    )
    parser.add_argument(
        "--batch", type=int, default=4, help="examples; each is read under 4 prompts"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help="measured steps after one to warm up; the median counts",
    )
    parser.add_argument("--max-tokens", type=int, default=512, help="longest text")
    parser.add_argument("--budget-s", type=float, default=590.0, help="seconds for everything")
    parser.add_argument("--check", choices=CHECKS, help="run this check alone, in this process")
    args = parser.parse_args()
    if args.check:
        try:
            print(json.dumps(CHECKS[args.check]()))
        except (SptError, subprocess.CalledProcessError) as error:
            print(json.dumps({"passed": False, "error": str(error)}))
        return 0
    deadline = time.monotonic() + args.budget_s
    report: dict[str, Any] = {"machine": machine(), "checks": {}, "steps": []}
    for name in CHECKS:
        outcome = last_json([sys.executable, __file__, "--check", name], deadline)
        report["checks"][name] = outcome
        print(
            f"{name:<10} {'right' if outcome.get('passed') else 'WRONG'}  {json.dumps(outcome)}",
            flush=True,
        )
    for timing in args.timings.split(","):
        shape, _, bits = timing.partition(":")
        row = step_time(shape, bits, args, deadline)
        report["steps"].append(row)
        print(show(row), flush=True)
    right = all(outcome.get("passed") for outcome in report["checks"].values())
    report["passed"] = right and not any("error" in row for row in report["steps"])
    print(json.dumps(report))
    return int(not report["passed"])


if __name__ == "__main__":
    raise SystemExit(main())
