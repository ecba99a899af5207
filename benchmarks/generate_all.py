"""Generates replies to a whole split, scores them, and watches throughput and memory.

    python benchmarks/generate_all.py RUN --data valid.txt [--ranks 2] [--set KEY=VALUE]

Starts `spt_ds.generate` on `--ranks` processes of one thread each and samples their resident memory
(VmRSS, the worst rank) while the replies grow; then runs `spt-ds evaluate`. Limit: memory is flat,
the peak of the last half is at most 5 % over that of the first quarter. The last line is one JSON
object, the exit code is 1 when the limit is passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 2**20
FLAT = 1.05
SAMPLE_S = 1.0


def resident_bytes(pid: int) -> int:
    """VmRSS of a process; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next(
        (int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmRSS")), 0
    )


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    try:
        return [
            int(word)
            for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def replies(out: Path) -> int:
    """Replies written so far."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob(".parts-*/rank-*.jsonl"))


def watch(process: subprocess.Popen[bytes], out: Path) -> list[dict[str, Any]]:
    """Sample until the launcher `process` ends: seconds, replies, memory of its worst rank."""
    samples, begin = [], time.monotonic()
    while process.poll() is None:
        time.sleep(SAMPLE_S)
        worst = max((resident_bytes(pid) for pid in children(process.pid)), default=0)
        samples.append({"s": time.monotonic() - begin, "replies": replies(out), "bytes": worst})
    return [sample for sample in samples if sample["replies"]]  # from the first reply on


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True, help="the split, as data.test names it")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default RUN/generate-all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args()
    out = args.out or args.run / "generate-all"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    overrides = [f"data.test={args.data}", "data.max_test_examples=0", *args.overrides]
    options = [word for override in overrides for word in ("--set", override)]
    command = [
        sys.executable,
        *launcher,
        "-m",
        "spt_ds.generate",
        str(args.run),
        "--out",
        str(out),
        *options,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment) as process:
        samples = watch(process, out)
    if process.returncode or not samples:
        raise SystemExit(f"generation failed with {process.returncode}; its messages are above")
    predictions = out / "predictions.jsonl"
    begin = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "spt_ds.cli", "evaluate", str(predictions), "--out", str(out)],
        check=True,
    )
    evaluate_s = time.monotonic() - begin
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    result = summary(samples, lines) | {"ranks": args.ranks, "evaluate_s": round(evaluate_s, 1)}
    print(json.dumps(result))
    return int(not result["passed"])


def summary(samples: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Throughput from the first written batch to the last, and memory by the share of replies that
    is done.
    """
    first, last = samples[0], samples[-1]
    seconds, done = last["s"] - first["s"], last["replies"] - first["replies"]

    def peak(low: float, high: float) -> float:
        inside = [
            s["bytes"] for s in samples if low * len(lines) <= s["replies"] <= high * len(lines)
        ]
        return max(inside, default=0) / MIB

    tokens = sum(line["new_tokens"] for line in lines)
    start, end = peak(0, 0.25), peak(0.5, 1)
    return {
        "replies": len(lines),
        "new_tokens": tokens,
        "seconds": round(seconds, 1),
        "replies_per_s": round(done / seconds, 2),
        "tokens_per_s": round(done / seconds * tokens / len(lines), 1),
        "peak_first_quarter_mib": round(start, 1),
        "peak_last_half_mib": round(end, 1),
        "passed": end <= FLAT * start,
    }


if __name__ == "__main__":
    raise SystemExit(main())
