"""One call on a new machine: is everything right on its GPU, and how fast is it.

    python benchmarks/gpu.py --out gpu.jsonl

First what the device reaches, then the checks (attention kernels, quantised layers, whole runs),
then steps and decoding of random weights at several shapes, the largest last. Each row is a process
of its own with a limit of time, so one that fails is a row and not the end. A row is skipped where
a package is missing that it needs. Without a GPU the same rows run on the CPU at a tiny shape.

A line of JSON follows each row, in `--out` too. The exit code is 1 where a row failed, or where
`--budget-s` was spent before all was done.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
FOLDER = Path(__file__).parent
BIG, SMALL, HUGE = ("llama-7b", "opt-125m", "llama-70b") if GPU else ("tiny",) * 3
BATCHES, REPLIES = ((2, 16), (16, 64, 256)) if GPU else ((2,), (2, 4))


@dataclass(frozen=True)
class Row:
    """A process that prints one JSON object as its last line."""

    name: str
    seconds: int  # that it may take
    words: tuple[str, ...]  # of the command, after `python`
    needs: tuple[str, ...] = ()  # packages without which it is skipped


def check(name: str, seconds: int, *needs: str) -> Row:
    """One of benchmarks/gpu_checks.py."""
    return Row(name, seconds, (str(FOLDER / "gpu_checks.py"), name), needs)


def bench(name: str, seconds: int, options: str, *needs: str) -> Row:
    """One of `spt-ds bench`."""
    return Row(name, seconds, ("-m", "spt_ds.cli", "bench", *shlex.split(options)), needs)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """All of them, what matters most first."""
    step = f"step --steps {args.steps} --max-tokens {args.max_tokens}"
    yield check("ceilings", 60)
    yield check("attention", 120)
    yield check("heads", 120)
    yield check("quantised", 60, "bitsandbytes")
    # Recomputation costs a third: it is off wherever the memory allows.
    for placement in ("prefix", "suffix"):
        for size in BATCHES:
            options = f"{step} --shape {BIG} --bits 16 --cases {placement} --batch {size}"
            yield bench(f"{placement} {BIG} x{size}", 90, options)
    options = f"{step} --shape {BIG} --bits 16 --cases prefix,compiled --batch {BATCHES[-1]}"
    yield bench(f"compiled {BIG} x{BATCHES[-1]}", 150, options)
    for size in REPLIES:
        options = f"decode --shape {BIG} --bits 16 --cases ours --batch {size} --steps 1"
        yield bench(f"decode {BIG} x{size}", 90, options)
    for size in (4, 32) if GPU else (3,):
        options = f"{step} --shape {SMALL} --bits 16 --cases prefix --batch {size}"
        yield bench(f"prefix {SMALL} x{size}", 60, options)
    for bits in (4, 8):
        options = f"{step} --shape {BIG} --bits {bits} --cases prefix --batch 4"
        yield bench(f"prefix {BIG} {bits} bits", 90, options, "bitsandbytes")
    options = (
        f"{step} --shape {BIG} --bits 16 --base-matmul fp8 --cases prefix --batch {BATCHES[-1]}"
    )
    yield bench(f"prefix {BIG} fp8 x{BATCHES[-1]}", 90, options)
    yield check("runs", 180, "deepspeed", "bitsandbytes")
    options = f"{step} --shape {HUGE} --bits 4 --cases prefix --checkpointing non_reentrant"
    yield bench(f"prefix {HUGE} 4 bits", 180, options, "bitsandbytes")


def outcome_of(row: Row, deadline: float) -> dict[str, Any]:
    """What its last line says, with `passed`; or `skipped` or `error` and why."""
    missing = [name for name in row.needs if find_spec(name) is None]
    if missing:
        return {"skipped": f"needs {', '.join(missing)}"}
    left = deadline - time.monotonic()
    if left <= 0:
        return {"error": "not run: the time is spent"}
    command = [sys.executable, *row.words]
    limit = min(left, row.seconds if GPU else left)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {limit:.0f} s"}
    last = done.stdout.strip().rpartition("\n")[2]
    if not last.startswith("{"):
        said = done.stderr.strip().rpartition("\n")[2]
        return {"error": said or f"ended with exit code {done.returncode}"}
    told: dict[str, Any] = json.loads(last)
    if "results" not in told:
        return told
    *others, measured = told["results"]
    eager = {
        f"{key}_{other['case']}": other[key]
        for other in others
        for key in ("cost", "loss", "peak_mib")
        if key in other
    }
    passed = not any("error" in result for result in told["results"])
    return {"passed": passed, **eager, **measured}


def shown(name: str, outcome: dict[str, Any]) -> str:
    """One line for a reader."""
    if "skipped" in outcome:
        text = f"skipped: {outcome['skipped']}"
    elif "error" in outcome:
        text = f"FAILED: {outcome['error']}"
    elif "tokens_per_cost" in outcome:
        text = (
            f"{outcome['cost']:.3f} {outcome['cost_unit']}"
            f"  {outcome['tokens_per_cost']:.0f} tokens/s"
            f"  {100 * outcome['share_of_matmul']:.0f} % of the products' ceiling"
            f"  peak {outcome['peak_mib'] / 1024:.2f} GiB,"
            f" planned {outcome['planned_mib'] / 1024:.2f} GiB"
        )
        if "cost_prefix" in outcome:
            text += f"  {outcome['cost_prefix'] / outcome['cost']:.2f} times as fast as eager"
    elif "row_steps" in outcome:
        rate = outcome["examples_times_tokens"] / outcome["cost"]
        text = f"{outcome['cost']:.3f} {outcome['cost_unit']}  {rate:.0f} new tokens/s"
    else:
        text = "right" if outcome["passed"] else "WRONG"
    return f"{name:<24} {text}"


def main() -> int:
    """Run all rows; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file for the lines of JSON")
    parser.add_argument("--only", help="rows whose name begins so, alone")
    parser.add_argument("--steps", type=int, default=3, help="measured steps after one to warm up")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest text")
    parser.add_argument("--budget-s", type=float, default=590.0, help="seconds for everything")
    args = parser.parse_args()
    deadline, whole = time.monotonic() + args.budget_s, True
    for row in rows(args):
        if args.only and not row.name.startswith(args.only):
            continue
        outcome = {"row": row.name, **outcome_of(row, deadline)}
        whole &= "skipped" in outcome or bool(outcome.get("passed"))
        line = json.dumps(outcome | {"command": shlex.join(row.words)})
        print(f"{shown(row.name, outcome)}\n{line}", flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    return int(not whole)


if __name__ == "__main__":
    raise SystemExit(main())
