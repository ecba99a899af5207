"""CPU time of a training step in two checkouts, which take turns step by step.

    git worktree add ../spt-0.1.0 97d1fa6^
    python benchmarks/two_checkouts.py ../spt-0.1.0 [--shape tiny] [--steps 40]

Each checkout runs in a process of its own and takes the step of `spt-ds bench step`. The one whose
turn it is computes, the other waits; who begins changes from pair to pair, so that other work on
the machine falls on both. The ratio is the median over pairs of this checkout's CPU seconds divided
by the other's, with the interval of the median by order statistics (95 %). Losses must agree within
1e-5. The exit code is 1 where the interval of a ratio lies above 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parents[1]
# Modules of `spt-ds bench`, now and at 0.1.0: the step, the bases, the meters.
NOW = ("spt_ds.costs.step", "spt_ds.costs.random_bases", "spt_ds.costs.meters", "ForwardMeter")
BEFORE = ("spt_ds.bench.step", "spt_ds.bench.shapes", "spt_ds.bench.measuring", "Inside")
CONTEXTS, RESPONSES = (106, 146, 174, 230), (12, 10, 14, 19)  # tokens, as in ConvAI2
CLOSE = 1e-5


def worker(checkout: Path, case: str, shape: str) -> None:
    """Answer each line of stdin with the CPU seconds of one step and its loss."""
    import torch

    from spt_ds.batch import Batch

    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    torch.set_num_threads(1)
    names = NOW if (checkout / "spt_ds" / "costs").is_dir() else BEFORE
    step, bases, meters = map(importlib.import_module, names[:3])
    args = argparse.Namespace(
        shape=shape, tokens=8, bits=32, attention="auto", checkpointing="off", max_tokens=512
    )
    config = step.config_of(case, 4, args)
    plain = type(config.losses)(contrastive=0)  # recipes change, defaults do not
    config = config.model_copy(update={"losses": plain})
    backbone, spt = bases.build(shape, config, torch.device("cpu"))
    ids = np.random.default_rng(0).integers(4, backbone.vocabulary, (2, sum(CONTEXTS)))
    held: Any = torch.from_numpy if names is BEFORE else np.array
    contexts, responses = held(ids[0]), held(ids[1, : sum(RESPONSES)])
    rows = len(CONTEXTS)
    batch = Batch(contexts, responses, CONTEXTS, RESPONSES, tuple(range(rows)), (1.0,) * rows)
    stepper = step.Stepper(case, backbone, spt, batch, args)
    meter = getattr(meters, names[3])(backbone.lm.base_model, stepper.clock)
    for _ in sys.stdin:
        seconds = sum(stepper.step(meter).values())
        line = json.dumps({"seconds": seconds, "loss": stepper.loss.item()})
        os.write(answer, f"{line}\n".encode())


class Side:
    """A process that takes steps in one checkout when it is asked to."""

    def __init__(self, checkout: Path, case: str, shape: str) -> None:
        self.checkout = checkout
        command = [sys.executable, __file__, "--worker", case, "--shape", shape, str(checkout)]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def step(self) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a step in {self.checkout} ended without an answer")
        answer: dict[str, float] = json.loads(line)
        return answer


def interval(values: list[float]) -> tuple[float, float]:
    """The values between which the median lies with a probability of 95 %."""
    ordered, below = sorted(values), 0.0
    for rank in range(len(ordered) // 2):
        below += math.comb(len(ordered), rank) / 2 ** len(ordered)
        if below > 0.025:
            return ordered[max(rank - 1, 0)], ordered[-max(rank, 1)]
    return ordered[0], ordered[-1]


def compare(before: Path, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Let both take turns; return medians, their ratio and how far the losses are apart."""
    sides = [Side(before, case, args.shape), Side(HERE, case, args.shape)]
    answers = [side.step() for side in sides]  # warms up
    apart = abs(answers[0]["loss"] - answers[1]["loss"])
    pairs = []
    for number in range(args.steps):
        order = (0, 1) if number % 2 else (1, 0)
        seconds = {side: sides[side].step()["seconds"] for side in order}
        pairs.append((seconds[0], seconds[1]))
    for side in sides:
        side.process.communicate()
    ratios = [now / old for old, now in pairs]
    return {
        "case": case,
        "shape": args.shape,
        "before_cpu_s": statistics.median(old for old, _ in pairs),
        "now_cpu_s": statistics.median(now for _, now in pairs),
        "ratio": statistics.median(ratios),
        "interval": interval(ratios),
        "pairs": len(pairs),
        "losses_apart": apart,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--shape", default="tiny", help="as for `spt-ds bench step`")
    parser.add_argument("--steps", type=int, default=40, help="pairs of steps for each case")
    parser.add_argument("--cases", default="prefix,suffix")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.before, args.worker, args.shape)
        return 0
    results = [compare(args.before.resolve(), case, args) for case in args.cases.split(",")]
    for result in results:
        low, high = result["interval"]
        print(
            f"{result['case']:7} {result['before_cpu_s']:.4f} s before, {result['now_cpu_s']:.4f} s"
            f" now: ratio {result['ratio']:.3f} ({low:.3f} to {high:.3f})"
        )
    print(json.dumps(results))
    return int(any(r["interval"][0] > 1 or r["losses_apart"] > CLOSE for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
