"""Long life: every command under kills, stops, full and slow disks, clock jumps and no memory.

    python -m benchmarks.soak OUT [--steps 20000] [--faults 28] [--examples 1000000] [--seed 0]

Each part runs a command once undisturbed and once under faults, and compares what they leave: the
same trained tensors, losses and learning rates bit for bit, the same bytes of replies, scores and
quantised weights. The undisturbed training must not grow in memory or descriptors. A part that is
done is not repeated; one that was interrupted is resumed. Needs root, for a small disk in memory.
The last line is one JSON object; the exit code is 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.soak import parts
from benchmarks.soak.parts import Plan

PARTS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "train": parts.train,
    "generate": parts.generate,
    "evaluate": parts.evaluate,
    "quantize": parts.quantize,
    "sweep": parts.sweep,
    "examples": parts.examples,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps")
    parser.add_argument("--faults", type=int, default=28, help="faults of the training")
    parser.add_argument("--replies", type=int, default=2000, help="replies to generate")
    parser.add_argument("--examples", type=int, default=1_000_000, help="of the large data file")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    plan = Plan(args.out.resolve(), args.steps, args.faults, args.replies, args.examples, args.seed)
    results: dict[str, Any] = {}
    for name in args.parts:
        path = plan.out / f"{name}.json"
        if not path.exists():
            began = time.monotonic()
            plan.out.mkdir(parents=True, exist_ok=True)
            result = PARTS[name](plan)
            path.write_text(json.dumps({**result, "seconds": round(time.monotonic() - began)}))
        results[name] = json.loads(path.read_text())
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    wrong = [
        f"{name}: {what}"
        for name, result in results.items()
        for what, holds in result["holds"].items()
        if not holds
    ]
    print("\n".join(wrong) or "everything holds")
    print(json.dumps(results))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
