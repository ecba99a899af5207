"""One table of the runs of a sweep, over its seeds.

    python -m benchmarks.selection.table runs/kinds --against pt-64 [--kinds FILE]

A folder of the sweep is ROW.seed-N. Each run is measured once, on `data.test`, by the code of
`spt-ds audit`, and what was measured stays in RUN/measured.npz. The differences to the row
`--against` are paired by reply. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spt_ds import dist
from spt_ds.audit.judge import (
    Judge,
    best_of_kinds,
    best_single,
    entropy,
    kind_accuracy,
    kind_counts,
)
from spt_ds.audit.measure import measure
from spt_ds.audit.measured import Measured, Text
from spt_ds.engine.session import open_split, open_trained
from spt_ds.evaluate.tables import Table
from spt_ds.run.folder import RunFolder


def measured(run: Path) -> Measured:
    """What the run does on its test examples: read from its folder, or measured now."""
    path = run / "measured.npz"
    if not path.is_file():
        folder, world = RunFolder(run), dist.init(600)
        session, _ = open_trained(folder.load_config(), folder, "best", None, world)
        found = measure(session, open_split(session, "test"))
        words = [[list(t.persona), list(t.history), t.response, t.dialogue] for t in found.texts]
        np.savez(
            path,
            losses=found.losses,
            tokens=found.tokens,
            ensemble=found.ensemble,
            scores=found.scores,
            texts=json.dumps(words),
        )
    saved = np.load(path)
    texts = [
        Text(tuple(persona), tuple(history), response, dialogue)
        for persona, history, response, dialogue in json.loads(str(saved["texts"]))
    ]
    losses, tokens, ensemble, scores = (
        saved[name] for name in ("losses", "tokens", "ensemble", "scores")
    )
    return Measured(losses, tokens, ensemble, scores, features={}, texts=texts)


def figures(run: Measured, other: Measured, kinds: Sequence[str]) -> dict[str, float]:
    """The numbers of one run that the table shows; `other` is the run that it is compared with."""
    judge = Judge(run)

    def per_token(losses: Any) -> float:
        return float(losses.sum() / run.tokens.sum())

    pair = judge.compare(run.of(run.selected), other.of(other.selected))
    numbers = {"nll": per_token(run.of(run.selected)), "minus": pair.difference, "p": pair.p}
    if run.count == 1:
        return numbers
    usage = np.bincount(run.selected, minlength=run.count)
    if kinds:
        numbers["by kind"] = per_token(run.of(best_of_kinds(run, kinds)))
        numbers["kind %"] = 100 * kind_accuracy(kind_counts(run.selected, kinds, run.count))
    return {
        **numbers,
        "best single": per_token(run.of(best_single(run))),
        "random": per_token(run.losses.mean(axis=1)),
        "ensemble": per_token(run.ensemble),
        "oracle": per_token(judge.oracle),
        "least %": 100 * usage.min() / usage.sum(),
        "most %": 100 * usage.max() / usage.sum(),
        "entropy": entropy(usage) or 0.0,
    }


def main(argv: Sequence[str]) -> int:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("root", type=Path, help="folder of the sweep")
    parser.add_argument("--against", required=True, help="row that the others are compared with")
    parser.add_argument("--kinds", type=Path, help="kinds of data.test, one a line")
    args = parser.parse_args(argv)
    kinds = args.kinds.read_text(encoding="utf-8").splitlines() if args.kinds else []
    runs: dict[str, dict[str, Measured]] = {}
    for done in sorted(args.root.glob("*.seed-*/DONE.json")):
        row, _, seed = done.parent.name.partition(".seed-")
        runs.setdefault(row, {})[seed] = measured(done.parent)
    report: dict[str, dict[str, list[float]]] = {}
    for row, by_seed in runs.items():
        columns = [
            figures(run, runs[args.against][seed], kinds)
            for seed, run in by_seed.items()
            if seed in runs[args.against]
        ]
        report[row] = {key: [numbers[key] for numbers in columns] for key in columns[0]}
    names = list(dict.fromkeys(key for numbers in report.values() for key in numbers))
    lines: list[list[str | int | float | None]] = [
        [row, len(numbers["nll"]), *(_cell(key, numbers.get(key, ())) for key in names)]
        for row, numbers in sorted(report.items(), key=lambda item: item[1]["nll"][0])
    ]
    print(Table(["row", "seeds", *names], lines).text())
    print(json.dumps(report))
    dist.shutdown()
    return 0


def _cell(key: str, values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds; of p-values the largest."""
    if key == "p" and values:
        return f"{max(values):.4f}"
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
