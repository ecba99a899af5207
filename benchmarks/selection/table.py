"""Audits the banks of a finished sweep against its single prompts, and makes one table over seeds.

    python -m benchmarks.selection.table runs/kinds --banks mixture spt --kinds FILE

A folder of the sweep is ROW.seed-N. Every bank is audited against all other rows of its seed, with
`spt-ds audit`; an audit that is there is not repeated. Prints the table, and JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spt_ds.evaluate.tables import Table


def seeds_of(root: Path, row: str) -> list[Path]:
    """The finished runs of a row, by seed."""
    return sorted(path.parent for path in root.glob(f"{row}.seed-*/DONE.json"))


def audit(run: Path, opponents: Sequence[Path], kinds: Path) -> dict[str, Any]:
    """The audit of a run, made where it is not there."""
    path = run / "audit.json"
    if not path.is_file():
        command = [sys.executable, "-m", "spt_ds.cli", "audit", str(run), "--kinds", str(kinds)]
        if opponents:
            command += ["--against", *map(str, opponents)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def figures(found: dict[str, Any]) -> dict[str, float]:
    """The numbers of one audit that the table shows."""
    rows = {row["name"]: row["nll"] for row in found["rows"]}
    usage = [count / found["examples"] for count in found["usage"]]
    gates = [row["r2"] for row in found["rows"] if row["r2"] is not None]
    numbers = {
        "selected": rows["selected prompt"],
        "best single": rows["best single prompt"],
        "random": rows["random prompt"],
        "oracle": rows["best prompt of each reply"],
        "kind %": 100 * found["kind_accuracy"],
        "least used %": 100 * min(usage),
        "most used %": 100 * max(usage),
        "entropy": found["usage_entropy"],
        "R2": max(gates, default=0.0),
    }
    for name, pair in found["against"].items():
        numbers[f"minus {name.partition('.seed-')[0]}"] = pair["difference"]
        numbers[f"p {name.partition('.seed-')[0]}"] = pair["p"]
    return numbers


def main(argv: Sequence[str]) -> int:
    """Audit, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("root", type=Path, help="folder of the sweep")
    parser.add_argument("--banks", nargs="+", required=True, help="rows that have a bank")
    parser.add_argument("--kinds", type=Path, required=True, help="kinds of data.test")
    args = parser.parse_args(argv)
    names = {path.parent.name.partition(".seed-")[0] for path in args.root.glob("*/DONE.json")}
    singles = sorted(names - set(args.banks))
    report: dict[str, Any] = {}
    lines = []
    for bank in args.banks:
        found = []
        for run in seeds_of(args.root, bank):
            seed = run.name.partition(".seed-")[2]
            opponents = [args.root / f"{row}.seed-{seed}" for row in singles]
            there = [path for path in opponents if (path / "DONE.json").is_file()]
            found.append(audit(run, there, args.kinds))
        columns = [figures(each) for each in found]
        shared = [key for key in columns[0] if all(key in each for each in columns)]
        report[bank] = {key: [each[key] for each in columns] for key in shared}
        report[bank]["verdicts"] = [each["verdict"]["word"] for each in found]
        lines.append([bank, *(_spread(report[bank][key]) for key in shared)])
    print(Table(["bank", *shared], lines).text())
    print(json.dumps(report))
    return 0


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
