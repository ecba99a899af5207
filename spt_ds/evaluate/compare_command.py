"""`spt-ds compare`: runs against a baseline, on the screen and in files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spt_ds.errors import DataError
from spt_ds.evaluate import tables
from spt_ds.evaluate.comparison import compare
from spt_ds.run.command import run_command


def main(argv: Sequence[str]) -> int:
    """Compare, print and, with --out, write; return the exit code."""
    return run_command(_parser(), argv, _compare)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spt-ds compare", description="Runs against a baseline, with tested gains."
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folder with predictions.jsonl or scores.json; each is a row, named by its folder",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="run that gains are measured over; default: the first RUN",
    )
    parser.add_argument(
        "--average-seeds",
        action="store_true",
        help="a row per recipe: mean and standard deviation of the runs that share a name",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for compare.json, .csv, .md and .tex"
    )
    return parser


def _compare(args: argparse.Namespace) -> None:
    result = compare(args.runs, args.baseline, average_seeds=args.average_seeds)
    if len(result.groups) == 1:
        one = result.baseline.name
        raise DataError(f"{one} is the only {result.kind}; name another one to compare it with")
    paths: list[Path] = []
    if args.out is not None:
        paths = tables.write_files(
            args.out, "compare", result.to_json(), result.long(), result.wide()
        )
    # Printed last: a reader that closes the pipe, such as `head`, must not cost the files.
    for group in result.groups[1:]:
        print(result.against_baseline(group).text())
    for group in result.groups[1:]:
        gain = result.diversity_gain(group)
        if gain is not None:
            print(
                f"{group.name}: mean gain of DIST-1 and DIST-2 over {result.baseline.name}"
                f" {gain:+.1f} %"
            )
    print("".join(f"{note}\n" for note in result.notes), end="")
    if paths:
        print("written: " + " ".join(map(str, paths)))
