"""CPU seconds of a training step over a base in 32 and in 16 bits, on one core.

    python benchmarks/cpu_bits.py [smollm2-135m] [--steps 5] [--set KEY=VALUE]

Each case is a process of its own. The last one computes bf16 as a CPU without units for it
(AVX512-BF16, AMX) does: `ONEDNN_MAX_CPU_ISA` hides them. The first step is not counted, and the
median of the others counts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMALL = ["train.global_batch=4", "data.max_valid_examples=4", "data.workers=0"]
CASES = {"32 bits": (32, ""), "16 bits": (16, ""), "16 bits, emulated": (16, "AVX512_CORE")}


def worker(config_name: str, steps: int, overrides: list[str]) -> None:
    """Train; print the CPU seconds of each step behind the first."""
    from spt_ds import dist
    from spt_ds.config.load import load_config
    from spt_ds.engine.engine import Engine
    from spt_ds.engine.trainer import train_run
    from spt_ds.run.folder import RunFolder

    seconds: list[float] = []
    window = Engine.train_window

    def timed(self: Engine, *args: Any) -> Any:
        begin = time.process_time()
        out = window(self, *args)
        seconds.append(time.process_time() - begin)
        return out

    Engine.train_window = timed  # type: ignore[method-assign, assignment]
    config = load_config(config_name, [*SMALL, f"train.max_steps={steps + 1}", *overrides])
    with tempfile.TemporaryDirectory() as folder:
        train_run(config, RunFolder(Path(folder) / "run"), None, dist.init(600))
    print("SECONDS", json.dumps(seconds[1:]))


def main() -> None:
    """Print the median step of each case and, last, all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.config, args.steps, args.overrides)
        return
    found = {}
    for name, (bits, units) in CASES.items():
        hidden = {"ONEDNN_MAX_CPU_ISA": units} if units else {}
        done = subprocess.run(
            [
                sys.executable,
                __file__,
                *sys.argv[1:],
                "--worker",
                "--set",
                f"model.base_bits={bits}",
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", **hidden},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("SECONDS "))
        found[name] = round(statistics.median(json.loads(line.partition(" ")[2])), 3)
        print(f"{name}: {found[name]} CPU s a step", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
