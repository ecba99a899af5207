"""Trains SPT over the base in 16, 8 and 4 bits and compares where the validation losses end.

    python benchmarks/quality_bits.py [--seeds 0,1,2] [--set prompts.position=before_reply]

One run per seed and width, one after another, with the settings of `--recipe`; only
`model.base_bits` and `train.seed` differ. Limit: the last validation loss, and the nll of the
selected prompt, of each quantised run lie within 2 % of those of the 16-bit run of the same seed.
The last line is one JSON object, the exit code is 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIMIT = 0.02
REFERENCE_BITS = 16
WIDTHS = {16: "bf16", 8: "int8", 4: "nf4"}
LOSSES = ("loss", "nll_selected")


def train(recipe: str, bits: int, seed: int, overrides: list[str], out: Path) -> dict[str, Any]:
    """One run in a process of its own; its validation losses before the first and after the last
    step.
    """
    settings = [*overrides, f"model.base_bits={bits}", f"train.seed={seed}"]
    options = [word for setting in settings for word in ("--set", setting)]
    command = [
        sys.executable,
        "-m",
        "spt_ds.train",
        "--config",
        recipe,
        "--run-dir",
        str(out),
        *options,
    ]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}"
        )
    result = json.loads((out / "DONE.json").read_text(encoding="utf-8"))
    row: dict[str, Any] = {"bits": bits, "seed": seed, "steps": result["step"]}
    for key in LOSSES:
        row |= {f"{key}_before": result["valid_before"][key], key: result["valid_after"][key]}
    return row


def judge(rows: list[dict[str, Any]], limit: float = LIMIT) -> bool:
    """Add to each row its distances from the 16-bit run of its seed, relative and signed; whether
    all keep `limit`.
    """
    reference = {row["seed"]: row for row in rows if row["bits"] == REFERENCE_BITS}
    for row in rows:
        beside = reference[row["seed"]]
        row |= {f"{key}_distance": row[key] / beside[key] - 1 for key in LOSSES}
    return all(abs(row[f"{key}_distance"]) <= limit for row in rows for key in LOSSES)


def table(rows: list[dict[str, Any]]) -> str:
    """One line per run."""
    lines = [
        f"{'seed':>4} {'base':>5} {'loss before':>12} {'after':>8} {'':>8} {'nll selected':>13}"
        f" {'':>8}"
    ]
    for row in sorted(rows, key=lambda row: (row["seed"], -row["bits"])):
        start = (
            f"{row['seed']:>4} {WIDTHS[row['bits']]:>5} {row['loss_before']:>12.4f}"
            f" {row['loss']:>8.4f}"
        )
        gaps = [f"{row[f'{key}_distance']:>+8.2%}" for key in LOSSES]
        lines.append(f"{start} {gaps[0]} {row['nll_selected']:>13.4f} {gaps[1]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in (int(part) for part in args.seeds.split(",")):
            for bits in WIDTHS:
                row = train(
                    args.recipe, bits, seed, args.overrides, Path(folder) / f"{bits}-{seed}"
                )
                print(
                    f"seed {seed}, {WIDTHS[bits]}: validation loss {row['loss']:.4f}",
                    file=sys.stderr,
                    flush=True,
                )
                rows.append(row)
    passed = judge(rows)
    print(table(rows))
    print(json.dumps({"limit": LIMIT, "passed": passed, "overrides": args.overrides, "rows": rows}))
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
